"""Server's search for a rate, over tests that come out as they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from int8qa.bench import scenarios
from int8qa.bench.load import LoadSpec, Scenario
from int8qa.bench.scenarios import LoadOptions, _Bench
from int8qa.contract import Precision
from tests.bench.conftest import SHORT, make_run


def search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, light: dict[str, Any], best: float
) -> _Bench:
    """A search at an Offline of 100/s: the light test as given, then all up to best."""

    def run_trial(spec: LoadSpec) -> dict[str, Any]:
        valid = spec.target_qps <= best
        outcome = {"valid": valid, "reasons": [] if valid else ["over the bound"]}
        if spec.target_qps == 10.0:
            outcome = light
        rate = {"target_qps": spec.target_qps, "too_short": False}
        return make_run("Server", "int8", **rate | outcome) | {
            "loadgen": "6",
            "remarks": [],
        }

    monkeypatch.setattr(scenarios, "run_trial", run_trial)
    options = LoadOptions(
        url="http://127.0.0.1:1",
        output=tmp_path,
        data=tmp_path / "questions.json",
        precisions=(Precision.INT8,),
        scenarios=(Scenario.SERVER,),
        rules=replace(SHORT, bound_ms=130.0),
    )
    bench = _Bench(options, tmp_path, lambda _: None)
    bench.runs.append(make_run("Offline", "int8", throughput_qps=100.0))
    bench.run_scenario(Scenario.SERVER, Precision.INT8)
    return bench


def fail_light(p99_ms: float, **changes: Any) -> dict[str, Any]:
    """A light test that LoadGen does not pass."""
    reasons = ["too few queries to be sure of the percentile"]
    latency = {"p50": 20.0, "p99": p99_ms}
    return {"valid": False, "reasons": reasons, "latency_ms": latency, **changes}


def test_unsure_is_not_over_the_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A light test of too few questions, all of them fast, does not end the search."""
    bench = search(monkeypatch, tmp_path, fail_light(82.0), best=40.0)
    passed = [run["target_qps"] for run in bench.runs[1:] if run["valid"]]
    assert bench.problems == []
    assert 36.0 < max(passed) <= 40.0


@pytest.mark.parametrize(
    "light",
    [
        fail_light(131.0),
        fail_light(20.0, failures={"503": 1}),
        fail_light(20.0, latency_ms=None),
    ],
)
def test_what_no_rate_will_keep_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, light: dict[str, Any]
) -> None:
    """Too slow, failed or without figures even so: one test, and a reason."""
    bench = search(monkeypatch, tmp_path, light, best=40.0)
    assert len(bench.runs) == 2
    (problem,) = bench.problems
    assert "the lowest tried was 10/s" in problem


def test_nothing_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The problem names the lowest rate of all tests, not the last."""
    bench = search(monkeypatch, tmp_path, fail_light(82.0), best=0.0)
    lowest = min(run["target_qps"] for run in bench.runs[1:])
    assert len(bench.runs) > 3
    assert f"the lowest tried was {lowest:.3g}/s" in bench.problems[0]
