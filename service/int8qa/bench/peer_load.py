"""A closed loop of questions over HTTP, in a process of its own.

In: a ``PeerSpec``, one line of JSON on standard input. Out: an ``Outcome`` in the file
that it names. So many requests are under way until every question is answered, as in
MLPerf's Offline. Every contestant is loaded by a program of this form: the services by
this one, Triton alone by its own client, the engine by ``ceiling.py``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from int8qa.bench.load import TIMEOUT_S, new_event_loop, read_cpu_s
from int8qa.bench.wire import Address, ConnectionPool, Reply

UNREADABLE = "not an answer"
"""Failure of a 200 whose body holds none."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One run."""

    url: str
    """Of the server; empty for the engine alone."""
    questions: str
    """Path of a JSON list of ``id``, ``question``, ``context``, in the order to ask."""
    outcome: str
    """Path of the outcome."""
    repository: str
    """Path of the model repository."""
    concurrency: int
    """Requests under way at once."""
    warm_up: int
    """Questions asked before the clock runs."""
    path: str = "/answer"
    fields: dict[str, Any] = field(default_factory=dict)
    """Of a request's body, beside question and context."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the contestant's variant."""


@dataclass(slots=True)
class Outcome:
    """What came back."""

    seconds: float
    """From the first request to the last answer."""
    latency_ms: list[float]
    """Of each answered request."""
    answers: dict[str, str]
    """Text by question id."""
    failures: dict[str, int] = field(default_factory=dict)
    """Requests without an answer, by kind."""
    cpu_s: float = 0.0
    """Of the loading process."""

    def write(self, path: str) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_spec() -> PeerSpec:
    """The line on standard input."""
    return PeerSpec(**json.loads(sys.stdin.readline()))


def read_questions(spec: PeerSpec) -> list[dict[str, str]]:
    """What is to be asked."""
    found: list[dict[str, str]] = json.loads(
        Path(spec.questions).read_text(encoding="utf-8")
    )
    return found


def read_answer(body: bytes) -> str | None:
    """The text in a reply: ``{"answer": "…"}`` or ``{"answer": {"text": "…"}}``.

    Returns:
        "" if the service says that there is no answer; None if the body holds none.
    """
    try:
        answer = json.loads(body)["answer"]
        if answer is None:
            return ""
        return str(answer["text"]) if isinstance(answer, dict) else str(answer)
    except (ValueError, KeyError, TypeError):
        return None


async def load_service(spec: PeerSpec) -> Outcome:
    """Warm up, then ask every question once."""
    address = Address.parse(spec.url)
    questions = read_questions(spec)
    requests = [
        address.post(
            spec.path,
            {"question": item["question"], "context": item["context"]} | spec.fields,
        )
        for item in questions
    ]
    pool = ConnectionPool(address, spec.concurrency, TIMEOUT_S)
    await asyncio.gather(*(pool.ask(one) for one in requests[: spec.warm_up]))
    cpu_s = read_cpu_s()
    begin = time.perf_counter()
    replies: list[Reply] = await asyncio.gather(*(pool.ask(one) for one in requests))
    seconds = time.perf_counter() - begin
    cpu_s = read_cpu_s() - cpu_s
    pool.close()
    answers: dict[str, str] = {}
    latency_ms: list[float] = []
    failures: Counter[str] = Counter()
    for item, reply in zip(questions, replies, strict=True):
        text = None if reply.failure else read_answer(reply.body)
        if text is None:
            failures[reply.failure or UNREADABLE] += 1
            continue
        answers[item["id"]] = text
        latency_ms.append(round(1e3 * reply.seconds, 3))
    return Outcome(seconds, latency_ms, answers, dict(failures), cpu_s)


def main() -> None:
    """Read the line, load, write the outcome."""
    spec = read_spec()
    loop = new_event_loop()
    try:
        outcome = loop.run_until_complete(load_service(spec))
    finally:
        loop.close()
    outcome.write(spec.outcome)


if __name__ == "__main__":
    main()
