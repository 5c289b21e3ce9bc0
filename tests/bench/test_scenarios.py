"""LoadGen against a gateway that answers as it is told."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from int8qa.bench import scenarios
from int8qa.bench.load import Scenario
from int8qa.bench.scenarios import (
    LoadOptions,
    bench_gateway,
    check_loadgen,
    search_rate,
)
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError, Int8qaError, MissingDependencyError
from tests.bench.conftest import QUESTIONS, SHORT
from tests.stub_gateway import Reply, answer_reply, problem_reply, run_gateway

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def loadgen() -> None:
    pytest.importorskip(
        "mlperf_loadgen", reason="needs MLPerf LoadGen: pip install -e '.[bench]'"
    )


def answer_well(body: dict[str, Any]) -> Reply:
    return answer_reply("behind the bar", precision=body["precision"])


def began(question_file: Path) -> bool:
    """Whether LoadGen's test runs, so that the warm-up is over."""
    files = question_file.parent / "out/loadgen/SingleStream-int8"
    return (files / "mlperf_log_trace.json").exists()


def make_options(url: str, question_file: Path, **changes: Any) -> LoadOptions:
    given: dict[str, Any] = {
        "precisions": (Precision.INT8,),
        "scenarios": (Scenario.SINGLE_STREAM,),
        "concurrency": 4,
        "rules": SHORT,
    }
    return LoadOptions(
        url=url,
        output=question_file.parent / "out",
        data=question_file,
        **given | changes,
    )


def test_all_scenarios(question_file: Path) -> None:
    """Two precisions through all three: figures from LoadGen, its files kept."""
    said: list[str] = []
    with run_gateway(answer_well) as gateway:
        result = bench_gateway(
            make_options(
                gateway.url,
                question_file,
                precisions=(Precision.INT8, Precision.FP16),
                scenarios=tuple(Scenario),
            ),
            said.append,
        )
    runs = result["runs"]
    assert len(said) >= len(runs) >= 6
    order = list(dict.fromkeys((run["scenario"], run["precision"]) for run in runs))
    assert order == [(str(s), p) for s in Scenario for p in ("int8", "fp16")]
    assert result["problems"] == []
    for run in runs:
        assert run["failures"] == {}
        assert run["queries"] >= 80
        files = question_file.parent / "out" / run["files"]
        summary = (files / "mlperf_log_summary.txt").read_text()
        assert ("Result is : VALID" in summary) == run["valid"]
        if run["scenario"] == "Offline":
            assert run["latency_ms"] is run["cdf_ms"] is None
        else:
            latency = run["latency_ms"]
            assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
            assert run["cdf_ms"] == sorted(run["cdf_ms"])
            assert run["cdf_ms"][-1] == pytest.approx(latency["max"], abs=0.002)
            assert run["generator"]["request_ms"] <= latency["mean"]
        grouped = sum(group["queries"] for group in run["by_length"])
        assert grouped == (run["queries"] if run["scenario"] == "SingleStream" else 0)
    for name in ("int8", "fp16"):
        server = [
            run
            for run in runs
            if (run["scenario"], run["precision"]) == ("Server", name)
        ]
        first, *others = server
        assert first["light"]
        assert others
        assert not any(run["light"] for run in others)
        assert first["target_qps"] < min(run["target_qps"] for run in others)
    for row in result["headline"]:
        assert row["offline_qps"] > row["server_qps"] > 0
        assert row["single_stream_ms"]["p50"] > 0
    # The stub has no metrics, and that is said.
    assert all(run["gateway"] is run["time_ms"] is None for run in runs)
    assert any("no metrics" in remark for remark in result["remarks"])
    assert result["provenance"]["questions"] == QUESTIONS
    assert result["provenance"]["loadgen"][0].isdigit()
    assert json.loads(json.dumps(result)) == result
    asked = Counter(body["question"] for body in gateway.requests)
    assert len(asked) == QUESTIONS
    assert {body["precision"] for body in gateway.requests} == {"int8", "fp16"}


def test_refusals_count(question_file: Path) -> None:
    """Every seventh answer is a 503 once it counts: the test is invalid for it."""
    asked = refused_here = 0

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal asked, refused_here
        asked += began(question_file)
        if asked and asked % 7 == 0:
            refused_here += 1
            return problem_reply(503, "full", retry_after="0")
        return answer_well(body)

    rules = scenarios.Rules(min_seconds=0.1, min_queries=100)
    with run_gateway(answer) as gateway:
        result = bench_gateway(make_options(gateway.url, question_file, rules=rules))
    (run,) = result["runs"]
    refused = run["failures"]["HTTP 503"]
    assert refused > 0
    assert not run["valid"]
    assert run["reasons"][0] == f"{refused} × HTTP 503"
    assert result["problems"][0].startswith(f"SingleStream int8 is invalid: {refused}")
    assert result["headline"][0]["single_stream_ms"] is None
    assert refused == refused_here


def test_too_many_refusals_end_a_test(
    question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that refuses everything is not asked for two minutes."""
    monkeypatch.setattr(scenarios, "_MOST_WARM_UP_S", 0.1)

    def answer(body: dict[str, Any]) -> Reply:
        if began(question_file):
            return problem_reply(429, "full")
        return answer_well(body)

    rules = scenarios.Rules(min_seconds=120.0, min_queries=1)
    with run_gateway(answer) as gateway:
        result = bench_gateway(make_options(gateway.url, question_file, rules=rules))
    (run,) = result["runs"]
    assert run["failures"] == {"HTTP 429": 100}
    assert "cut short: 100 requests failed" in run["reasons"]
    assert run["throughput_qps"] is None


def test_no_gateway(question_file: Path) -> None:
    """One line, and LoadGen never begins."""
    with run_gateway(answer_well) as gateway:
        url = gateway.url
    with pytest.raises(GatewayRequestError, match="no gateway answers at") as caught:
        bench_gateway(make_options(url, question_file))
    assert "\n" not in str(caught.value)
    with pytest.raises(GatewayRequestError, match="no address of a gateway"):
        bench_gateway(make_options("gateway:8080", question_file))


def test_gateway_that_dies(
    question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said that it is gone, at once, not after the test's two minutes."""
    monkeypatch.setattr(scenarios, "_MOST_WARM_UP_S", 0.1)
    rules = scenarios.Rules(min_seconds=120.0, min_queries=1)

    def answer(body: dict[str, Any]) -> Reply:
        if began(question_file):
            died.set()
        reply = answer_well(body)
        # Its connections must not outlive the stub.
        reply.headers["connection"] = "close"
        return reply

    died = threading.Event()
    with contextlib.ExitStack() as life, ThreadPoolExecutor(1) as pool:
        gateway = life.enter_context(run_gateway(answer))
        options = make_options(gateway.url, question_file, rules=rules)
        running = pool.submit(bench_gateway, options)
        assert died.wait(60)
        life.close()
        with pytest.raises(GatewayRequestError, match="is gone: it answered"):
            running.result(60)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (problem_reply(422, "precision: fp32 only"), "HTTP 422: precision: fp32 only"),
        (answer_reply("x", precision="fp16"), "asked for int8 and answers otherwise"),
        (Reply("<html>"), "asked for int8 and answers otherwise"),
    ],
)
def test_warm_up_is_held_to_the_question(
    question_file: Path, reply: Reply, reason: str
) -> None:
    """A gateway that refuses, or answers in another precision, is not measured."""
    with (
        run_gateway(lambda _: reply) as gateway,
        pytest.raises(GatewayRequestError, match=reason),
    ):
        bench_gateway(make_options(gateway.url, question_file))


def test_precision_not_served(
    question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is run, with what there is."""
    from tests import stub_gateway

    monkeypatch.setitem(stub_gateway.MODELS, "precisions", ["int8", "fp32", "both"])
    with run_gateway(answer_well) as gateway:
        options = make_options(gateway.url, question_file, precisions=(Precision.FP16,))
        with pytest.raises(GatewayRequestError, match="fp16: it has int8, fp32"):
            bench_gateway(options)


def test_load_generator_that_fails(
    question_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last words are the error's."""
    fake = question_file.parent / "python"
    fake.write_text('#!/bin/sh\nread line\necho "the disk is full" >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    with (
        run_gateway(answer_well) as gateway,
        pytest.raises(Int8qaError, match="status 3: the disk is full"),
    ):
        bench_gateway(make_options(gateway.url, question_file))


def test_missing_loadgen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says how to get it."""
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingDependencyError, match=r"'\.\[bench\]'"):
        check_loadgen()


@pytest.mark.parametrize("limit", [0.05, 13.0, 55.0, 70.0, 94.0, 120.0])
def test_search(limit: float) -> None:
    """The rate found passes, and no rate 5 % above it and below the ceiling does."""
    tried: list[float] = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = search_rate(passes, 100.0, tolerance=0.05)
    assert tried[0] == pytest.approx(70.0)
    assert len(tried) <= scenarios.MAX_RATES
    assert max(tried) < 100
    if limit < 0.5:
        assert found is None
        assert len(tried) == scenarios.MAX_RATES
    else:
        assert found in tried
        assert found <= limit
        assert found >= 0.94 * min(limit, 100.0)
