"""The soak's judgement, and a short one against a gateway in memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from int8qa.bench import soak as soak_module
from int8qa.bench.processes import Watch
from int8qa.bench.report import write_report
from int8qa.bench.soak import Soak, SoakOptions, build_result, judge_growth, run_soak
from int8qa.errors import EngineOutputError, GatewayRequestError
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.command_line import Run
from tests.gateway.fakes import TOKENIZER_JSON, listen, open_service
from tests.stub_gateway import problem_reply, run_gateway

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_growth_is_judged_after_the_warm_up() -> None:
    """What a process takes at its start is no leak, what it takes for ever is."""
    assert judge_growth([1.0] * 20 + [100.0] * 80) == (100.0, 100.0)
    first, last = judge_growth([float(n) for n in range(100)])
    assert last > first * 2
    assert judge_growth([]) == (0, 0)


@pytest.mark.parametrize("broken", [False, True])
async def test_short_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """A sound gateway passes with its curves drawn; one that fails requests does not."""
    monkeypatch.setattr(soak_module, "SAMPLE_S", 0.1)
    seconds: list[float] = []
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    async with open_service(tokenizer) as one, listen(one) as url:
        if broken:
            one.engine.fault = EngineOutputError("as told")
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            soak = Soak(client, Watch(os.getpid()), seed=1)
            await soak.run(1.5, rate=40, on_second=seconds.append)
    # This process is test runner, client and gateway in one: it may grow.
    monkeypatch.setattr(soak_module, "MAX_GROWTH", 10.0)
    monkeypatch.setattr(soak_module, "MAX_DESCRIPTORS_MORE", 1000)
    result = build_result(soak, duration_s=1.5, rate=40)
    assert result["sent"].keys() >= {"short", "bad", "cancelled"}
    assert bool(result["problems"]) is broken
    assert (result["lost"] > 0) is broken
    assert len(seconds) == len(result["time_s"]) == len(result["answered"]) > 5
    machine = {
        "processor": "Abacus",
        "cores": 2,
        "features": [],
        "memory_gb": 1,
        "system": "Linux",
    }
    provenance = {"machine": machine, "versions": {}, "started_at": "", "command": ""}
    data, page = write_report(result | {"provenance": provenance}, tmp_path)
    assert json.loads(data.read_text())["sent"] == result["sent"]
    text = page.read_text()
    assert "resident memory" in text
    assert ("nothing lost, nothing grew" in text) is not broken


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ({"rss_mib": [100.0] * 50 + [110.0] * 50}, "gateway: memory grew"),
        ({"descriptors": [20] * 50 + [40] * 50}, "gateway: descriptors grew"),
        ({"ended": True, "rss_mib": [], "descriptors": []}, "gateway ended"),
        ({}, ""),
    ],
)
async def test_growth_fails_the_soak(samples: dict[str, Any], expected: str) -> None:
    """Memory, descriptors and an end each have their own verdict."""
    watch = Watch(os.getpid())
    (curve,) = watch.curves = watch.curves[:1]
    curve.name = "gateway"
    curve.rss_mib, curve.descriptors = [100.0] * 100, [20] * 100
    for name, values in samples.items():
        setattr(curve, name, values)
    async with httpx.AsyncClient() as client:
        soak = Soak(client, watch, seed=1)
    problems = build_result(soak, duration_s=1, rate=1)["problems"]
    assert [text[: len(expected)] for text in problems] == [expected][: bool(expected)]


def test_gateway_that_refuses_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the run begins; the key of the environment is shown to it."""
    monkeypatch.setattr(soak_module, "CALIBRATION_S", 0.3)
    monkeypatch.setenv("INT8QA_API_KEY", "int8qa-test-key")
    with run_gateway(lambda _: problem_reply(401, "no such key")) as gateway:
        options = SoakOptions(url=gateway.url, pid=os.getpid(), duration_s=1)
        with pytest.raises(GatewayRequestError, match="nothing was measured"):
            run_soak(options, lambda *_: None)


def test_command_without_a_process(run: Run, tmp_path: Path) -> None:
    """One line, before anything is sent."""
    finished = run("bench", "soak", "--pid", 2**22 + 1, "--output", tmp_path)
    assert (finished.code, finished.out) == (69, "")
    assert "cannot watch process 4194305" in finished.err
