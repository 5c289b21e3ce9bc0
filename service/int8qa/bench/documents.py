"""What long documents cost a running gateway, and what they cost their neighbours.

In: a gateway's address, texts, numbers of windows. Out: a JSON-ready result: the time
of documents of each length in turns, the gateway's memory meanwhile, and single-window
questions beside the longest document and without it. Judges nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from int8qa.bench.gateway_metrics import STAGES, CounterChange
from int8qa.bench.provenance import describe_run, remark_load
from int8qa.build.subject import data_name, questions_file
from int8qa.client import GatewayClient, build_key_headers
from int8qa.contract import Precision
from int8qa.reader.squad import SquadQuestion, load_questions

FORMAT_VERSION = 1
PACKAGES = ("httpx", "fastapi", "uvicorn", "uvloop", "tritonclient")
WINDOWS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
DOC_STRIDE = 192
"""Overlap of the windows, tokens. With the default of 128, 500 windows of English are
more than the 500,000 characters that a gateway allows by default."""
FULL = 10
"""Windows from which on a document fills batches; before, calls cost more than rows."""
_CHARS_PER_WINDOW = 850
"""Of English, about: the first guess."""
_TRIES = 12
_POLL_S = 0.1
_NEIGHBOURS = 60
_TIMEOUT_S = 600.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DocumentOptions:
    """What ``int8qa bench documents`` was told."""

    url: str
    data: Path = field(default_factory=lambda: questions_file("evaluation"))
    precision: Precision | None = None
    """None: what the gateway answers in by default."""
    windows: Sequence[int] = WINDOWS
    rounds: int = 3


@dataclass(slots=True)
class _Document:
    """A text of so many windows, and what each of its turns took."""

    windows: int
    text: str
    seconds: list[float] = field(default_factory=list)
    stages_ms: list[dict[str, float]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        median_s = statistics.median(self.seconds)
        return {
            "windows": self.windows,
            "chars": len(self.text),
            "seconds": [round(value, 4) for value in self.seconds],
            "median_s": round(median_s, 4),
            "ms_per_window": round(1e3 * median_s / self.windows, 3),
            "stages_ms": {
                stage: round(statistics.median(s[stage] for s in self.stages_ms), 3)
                for stage in STAGES
            },
        }


def bench_documents(
    options: DocumentOptions, say: Say = lambda _: None
) -> dict[str, Any]:
    """Ask one question about documents of each length, in turns.

    Returns:
        The result, of JSON types only.

    Raises:
        GatewayRequestError: no gateway there, or it refused a document.
        DataFileError: the questions cannot be read.
    """
    questions = load_questions(options.data)
    provenance = describe_run(PACKAGES) | {
        "data": data_name(options.data, "evaluation"),
        "questions": len(questions),
    }
    bench = _Bench(options, questions, say)
    result = asyncio.run(bench.run())
    remarks = [*remark_load(provenance), *result["remarks"]]
    return result | {"provenance": provenance, "remarks": remarks}


class _Bench:
    def __init__(
        self, options: DocumentOptions, questions: Sequence[SquadQuestion], say: Say
    ) -> None:
        self._options = options
        self._question = questions[0].question
        self._neighbours = questions
        self._texts = list(dict.fromkeys(one.context for one in questions))
        self._say = say
        self._client = GatewayClient(options.url, timeout_s=_TIMEOUT_S)

    async def run(self) -> dict[str, Any]:
        async with self._client:
            documents = [
                await self._find_document(windows)
                for windows in sorted(set(self._options.windows))
            ]
            async with self._watch_memory() as memory:
                for number in range(self._options.rounds):
                    # Every second round the other way: what slows the machine for a
                    # while does not always meet the same lengths.
                    for document in documents[:: -1 if number % 2 else 1]:
                        await self._measure(document)
                    self._say(f"[{number + 1}/{self._options.rounds}] round")
                neighbours = await self._measure_neighbours(documents[-1])
        rows = [document.report() for document in documents]
        remarks = [
            f"no document of {wanted} windows: the next that could be made has "
            f"{row['windows']}"
            for wanted, row in zip(
                sorted(set(self._options.windows)), rows, strict=True
            )
            if wanted != row["windows"]
        ]
        if not memory:
            remarks.append("the gateway shows no metrics; its memory is not known")
        return {
            "kind": "documents",
            "format_version": FORMAT_VERSION,
            "precision": self._precision,
            "doc_stride": DOC_STRIDE,
            "rounds": self._options.rounds,
            "documents": rows,
            "cost_ratio": compute_cost_ratio(rows),
            "memory_mib": memory and {"before": memory[0], "peak": max(memory)},
            "neighbours": neighbours,
            "remarks": remarks,
        }

    async def _find_document(self, windows: int) -> _Document:
        """A text of exactly so many windows, or what came nearest to it."""
        chars = windows * _CHARS_PER_WINDOW
        shorter, longer = 0, math.inf
        best: _Document | None = None
        for _ in range(_TRIES):
            text = self._write(chars)
            found = (await self._ask(text))["windows"]
            if best is None or abs(found - windows) < abs(best.windows - windows):
                best = _Document(found, text)
            if found == windows:
                break
            shorter, longer = (
                (chars, longer) if found < windows else (shorter, min(longer, chars))
            )
            # Midst of the last window, by the length of those so far.
            chars = round(chars * (windows - 0.5) / max(found - 0.5, 0.5))
            if not shorter < chars < longer:
                chars = round((shorter + min(longer, 2 * shorter)) / 2)
        assert best is not None
        self._say(f"{best.windows} windows: {len(best.text):,} characters")
        return best

    def _write(self, chars: int) -> str:
        """The file's paragraphs, from the first again where they do not do."""
        parts: list[str] = []
        missing = chars
        for text in itertools.cycle(self._texts):
            parts.append(text[:missing])
            missing -= len(text) + 1
            if missing <= 0:
                return "\n".join(parts)
        raise AssertionError("a file without paragraphs is refused")

    async def _ask(self, text: str, question: str | None = None) -> dict[str, Any]:
        request: dict[str, Any] = {
            "question": question or self._question,
            "context": text,
            "doc_stride": DOC_STRIDE,
        }
        if self._options.precision is not None:
            request["precision"] = self._options.precision.value
        answer = await self._client.answer(request)
        self._precision: str = answer["precision"]
        return answer

    async def _measure(self, document: _Document) -> None:
        started = time.perf_counter()
        answer = await self._ask(document.text)
        document.seconds.append(time.perf_counter() - started)
        document.stages_ms.append(answer["timing_ms"])

    async def _measure_neighbours(self, document: _Document) -> dict[str, Any]:
        """Questions one after the other: with nothing beside them, then with it."""
        alone = [await self._time_neighbour(n) for n in range(_NEIGHBOURS)]
        beside: list[float] = []
        started = time.perf_counter()
        task = asyncio.create_task(self._ask(document.text))
        for n in itertools.count():
            took = await self._time_neighbour(n)
            if task.done():
                break
            beside.append(took)
        await task
        return {
            "windows": document.windows,
            "document_s": round(time.perf_counter() - started, 3),
            "alone_ms": _summarize(alone),
            "beside_ms": _summarize(beside),
        }

    async def _time_neighbour(self, number: int) -> float:
        one = self._neighbours[number % len(self._neighbours)]
        started = time.perf_counter()
        await self._ask(one.context, one.question)
        return time.perf_counter() - started

    @asynccontextmanager
    async def _watch_memory(self) -> AsyncIterator[list[float]]:
        """Resident memory of the gateway, MiB, all along; empty if it does not say."""
        seen: list[float] = []
        async with httpx.AsyncClient(
            base_url=self._options.url, headers=build_key_headers(), trust_env=False
        ) as client:
            first = await _read_memory_mib(client)
            if first is not None:
                seen.append(first)

            async def poll() -> None:
                while True:
                    await asyncio.sleep(_POLL_S)
                    value = await _read_memory_mib(client)
                    if value is not None:
                        seen.append(value)

            task = asyncio.create_task(poll())
            try:
                yield seen
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def _read_memory_mib(client: httpx.AsyncClient) -> float | None:
    try:
        response = await client.get("/metrics")
    except httpx.HTTPError:
        return None
    if response.status_code != httpx.codes.OK:
        return None
    change = CounterChange("", response.text)
    if not change.has("process_resident_memory_bytes"):
        return None
    return round(change.sum("process_resident_memory_bytes") / 2**20, 1)


def compute_cost_ratio(rows: Sequence[dict[str, Any]]) -> float | None:
    """Cost of a window in the longest document to that in the shortest with ``FULL``.

    1 is a cost that grows in proportion; None where fewer than two lengths have so
    many windows.
    """
    full = [row["ms_per_window"] for row in rows if row["windows"] >= FULL]
    return round(full[-1] / full[0], 3) if len(full) > 1 else None


def _summarize(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile (nearest rank) and maximum, ms; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(1e3 * value for value in seconds)
    rank = max(0, -(-99 * len(ordered) // 100) - 1)
    return {
        "asked": len(ordered),
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[rank], 2),
        "max": round(ordered[-1], 2),
    }
