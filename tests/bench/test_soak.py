"""The soak's judgement, and a short one against a gateway in memory."""

from __future__ import annotations

import os
import sys

import httpx
import pytest

from int8qa.bench import soak as soak_module
from int8qa.bench.soak import Soak, build_report, judge_growth, write_page
from int8qa.errors import EngineOutputError
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import TOKENIZER_JSON, listen, open_service

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_growth_is_judged_after_the_warm_up():
    """What a process takes at its start is no leak, what it takes for ever is."""
    assert judge_growth([1.0] * 20 + [100.0] * 80) == (100.0, 100.0)
    first, last = judge_growth([float(n) for n in range(100)])
    assert last > first * 2


@pytest.mark.parametrize("broken", [False, True])
async def test_short_soak(tmp_path, monkeypatch, broken: bool):
    """A sound gateway passes with its curves drawn; one that fails requests does not."""
    monkeypatch.setattr(soak_module, "SAMPLE_S", 0.1)
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    async with open_service(tokenizer) as one, listen(one) as url:
        if broken:
            one.engine.fault = EngineOutputError("as told")
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            soak = Soak(client, os.getpid(), seed=1)
            await soak.run(1.5, rate=40)
    # This process is test runner, client and gateway in one: it may grow.
    monkeypatch.setattr(soak_module, "MAX_GROWTH", 10.0)
    monkeypatch.setattr(soak_module, "MAX_DESCRIPTORS_MORE", 1000)
    report = build_report(soak, duration_s=1.5, rate=40)
    assert report["sent"].keys() >= {"short", "bad", "cancelled"}
    assert bool(report["failures"]) is broken
    assert (report["lost"] > 0) is broken
    write_page(report, tmp_path / "soak.html")
    assert "resident memory" in (tmp_path / "soak.html").read_text()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ({"rss_mib": [100.0] * 50 + [110.0] * 50}, "memory grew"),
        ({"descriptors": [20] * 50 + [40] * 50}, "descriptors grew"),
        ({}, ""),
    ],
)
async def test_growth_fails_the_soak(samples: dict, expected: str):
    """Memory and descriptors each have their own verdict."""
    async with httpx.AsyncClient() as client:
        soak = Soak(client, os.getpid(), seed=1)
    soak.samples.rss_mib = samples.get("rss_mib", [100.0] * 100)
    soak.samples.descriptors = samples.get("descriptors", [20] * 100)
    failures = build_report(soak, duration_s=1, rate=1)["failures"]
    assert [text[: len(expected)] for text in failures] == [expected][: bool(expected)]
