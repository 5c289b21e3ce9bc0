"""Documents of several lengths against a gateway in memory, and the report of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from int8qa.bench import documents as documents_module
from int8qa.bench.documents import DocumentOptions, bench_documents, compute_cost_ratio
from int8qa.bench.documents_page import write_documents_verdict
from int8qa.bench.report import write_report
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.command_line import Run
from tests.gateway.fakes import TOKENIZER_JSON, listen, open_service
from tests.stub_gateway import problem_reply, run_gateway


@pytest.fixture
async def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(documents_module, "_NEIGHBOURS", 5)
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    async with open_service(tokenizer) as one, listen(one) as url:
        options = DocumentOptions(
            url=url, precision=Precision.FP16, windows=(12, 1, 30), rounds=2
        )
        return await asyncio.to_thread(bench_documents, options)


async def test_documents_are_of_the_lengths_asked_for(
    result: dict[str, Any], tmp_path: Path
) -> None:
    """Each is asked about in each round; memory and neighbours are measured."""
    rows = result["documents"]
    assert [row["windows"] for row in rows] == [1, 12, 30]
    assert result["precision"] == "fp16"
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        # The gateway's own stages are part of what the client waited.
        assert sum(row["stages_ms"].values()) < 1e3 * max(row["seconds"])
        expected = 1e3 * row["median_s"] / row["windows"]
        assert row["ms_per_window"] == pytest.approx(expected, abs=0.1)
    assert result["cost_ratio"] == compute_cost_ratio(rows)
    assert result["memory_mib"]["peak"] >= result["memory_mib"]["before"] > 10
    neighbours = result["neighbours"]
    assert neighbours["windows"] == 30
    assert neighbours["alone_ms"]["asked"] == 5
    assert neighbours["alone_ms"]["p50"] <= neighbours["alone_ms"]["p99"]

    data, page = write_report(result, tmp_path)
    assert json.loads(data.read_text())["documents"] == rows
    text = page.read_text()
    assert "A document of 30 windows takes" in text
    assert "nothing beside them" in text


def build_rows(*costs: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"windows": n, "ms_per_window": ms} for n, ms in costs]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([(1, 40.0), (10, 20.0), (100, 30.0)], 1.5),
        ([(1, 40.0), (100, 30.0)], None),
        ([(1, 40.0)], None),
    ],
)
def test_cost_ratio(costs: list[tuple[int, float]], expected: float | None) -> None:
    """Lone windows do not fill a batch, and are no measure of growth."""
    assert compute_cost_ratio(build_rows(*costs)) == expected


def test_verdict_without_memory_or_ratio() -> None:
    """What is not known is not spoken of."""
    rows = [{"windows": 1, "median_s": 0.02, "ms_per_window": 20.0}]
    result = {
        "documents": rows,
        "cost_ratio": None,
        "memory_mib": None,
        "neighbours": {"alone_ms": {"p50": 20.0}, "beside_ms": None},
    }
    assert write_documents_verdict(result) == (
        "A document of 1 window takes 0.0200 s, 20.0 ms a window."
    )


def test_gateway_that_refuses() -> None:
    """Its own words are the error's."""
    with (
        run_gateway(lambda _: problem_reply(413, "too long")) as gateway,
        pytest.raises(GatewayRequestError, match="HTTP 413: too long"),
    ):
        bench_documents(DocumentOptions(url=gateway.url))


def test_command_without_a_gateway(run: Run, tmp_path: Path) -> None:
    """One line, and no report."""
    finished = run(
        *("bench", "documents", "--url", "http://127.0.0.1:9", "--output", tmp_path)
    )
    assert (finished.code, finished.out) == (69, "")
    assert "no gateway answers" in finished.err
    assert not list(tmp_path.iterdir())
