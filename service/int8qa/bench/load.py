"""One LoadGen test against a gateway, in a process of its own.

In: a ``LoadSpec`` on standard input. Out: LoadGen's logs and ``outcome.json`` in the
directory it names. LoadGen calls from its own side of the GIL; queries cross to an
event loop's thread, answers go straight back to LoadGen. The process ends with its
parent, on any signal, and by itself where going on would measure nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from int8qa.bench.wire import REFUSED, TIMED_OUT, Address, ConnectionPool, Reply
from int8qa.errors import Int8qaError
from int8qa.reader.squad import ANSWER_TOKENS, load_questions

OUTCOME_FILENAME = "outcome.json"
TIMEOUT_S = 75.0
"""Without an answer for so long a request has failed, and the test ends. Longer than
the gateway's own deadline, whose 504 says more."""
MAX_FAILURES = 100
"""The test ends after so many: one is enough to make it invalid."""
SEED = 20_261_123
"""Of questions, their order and their arrival: every precision sees the same."""


class Scenario(str, Enum):
    """MLPerf's traffic patterns, in the order they run."""

    SINGLE_STREAM = "SingleStream"
    OFFLINE = "Offline"
    SERVER = "Server"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """One test."""

    url: str
    scenario: str
    """A ``Scenario``."""
    precision: str
    data: str
    """Path of a SQuAD-format file."""
    directory: str
    """Where LoadGen's logs and the outcome go."""
    min_seconds: float
    min_queries: int
    percentile: float
    """Of latency, 0-1: what SingleStream reports and Server bounds."""
    connections: int
    """Requests under way at once, at most."""
    warm_up_s: float
    limit: int | None = None
    """Use only the first so many questions."""
    target_qps: float = 0.0
    """Server: mean rate of arrivals per second. Offline: expected throughput; 0: what
    the warm-up finds."""
    bound_ms: float = 0.0
    """Server's bound on that percentile."""
    max_outstanding: int = 0
    """Server: LoadGen ends a test with more queries under way than this; 0: never."""


@dataclass(slots=True)
class Outcome:
    """What LoadGen does not know of its test."""

    fatal: str | None = None
    """Why there was no test worth the name."""
    failures: dict[str, int] = field(default_factory=dict)
    """Requests without a 200, by kind."""
    cut_short: str | None = None
    answers: int = 0
    request_seconds: float = 0.0
    """Sum over the answers, from a request's first byte to its answer's last."""
    cpu_s: float = 0.0
    """This process's, while the test ran."""
    warm_up_qps: float = 0.0
    metrics_before: str | None = None
    """The gateway's ``/metrics``; None if it has none."""
    metrics_after: str | None = None
    timings: list[tuple[int, float]] = field(default_factory=list)
    """Of SingleStream's answers: bytes of the request, seconds until the answer."""

    def write(self, directory: str) -> None:
        """As ``outcome.json``."""
        path = Path(directory) / OUTCOME_FILENAME
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class LoadDriver:
    """The system under test, as LoadGen sees it."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.outcome = Outcome()
        # From the environment, so that no record of the test holds it.
        key = os.environ.get("INT8QA_API_KEY", "")
        self._address = Address.parse(spec.url, key=key)
        questions = load_questions(Path(spec.data))[: spec.limit]
        self._requests = [
            self._address.post(
                "/v1/answer",
                {
                    "question": question.question,
                    "context": question.context,
                    "precision": spec.precision,
                    "max_answer_tokens": ANSWER_TOKENS,
                },
            )
            for question in questions
        ]
        self._pool = ConnectionPool(self._address, spec.connections, TIMEOUT_S)
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def run(self) -> None:
        """Warm up, test, and gather what belongs to it."""
        self._thread.start()
        outcome = self.outcome
        self._await(self._warm_up())
        if outcome.fatal is None:
            outcome.metrics_before = self._await(self._read_metrics())
            cpu_s = read_cpu_s()
            self._test()
            outcome.cpu_s = read_cpu_s() - cpu_s
            outcome.metrics_after = self._await(self._read_metrics())
        outcome.write(self.spec.directory)

    def _await(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _test(self) -> None:
        import mlperf_loadgen

        count = len(self._requests)
        settings = make_settings(self.spec, self.outcome.warm_up_qps)
        logs = mlperf_loadgen.LogSettings()
        logs.log_output.outdir = self.spec.directory
        logs.log_output.copy_summary_to_stdout = False
        # Each query's latency as LoadGen counts it is only there.
        logs.enable_trace = True
        system = mlperf_loadgen.ConstructFastSUT(self._issue, lambda: None)
        # The questions are in memory as bytes; nothing is left to load.
        library = mlperf_loadgen.ConstructQSL(
            count, count, lambda _: None, lambda _: None
        )
        try:
            mlperf_loadgen.StartTestWithLogSettings(system, library, settings, logs, "")
        finally:
            mlperf_loadgen.DestroyQSL(library)
            mlperf_loadgen.DestroySUT(system)

    def _issue(self, ids: list[int], indices: list[int]) -> None:
        """LoadGen's callback: hand over and return, for it waits to issue the next."""
        self._loop.call_soon_threadsafe(self._send, ids, indices)

    def _send(self, ids: list[int], indices: list[int]) -> None:
        for query, index in zip(ids, indices, strict=True):
            done = partial(self._complete, query, index)
            self._pool.send(self._requests[index], done)

    def _complete(self, query: int, index: int, reply: Reply) -> None:
        import mlperf_loadgen

        # LoadGen's clock stops here.
        mlperf_loadgen.QuerySamplesComplete(
            [mlperf_loadgen.QuerySampleResponse(query, 0, 0)]
        )
        outcome = self.outcome
        if reply.failure is None:
            outcome.answers += 1
            outcome.request_seconds += reply.seconds
            if self.spec.scenario == "SingleStream":
                outcome.timings.append((len(self._requests[index]), reply.seconds))
            return
        kinds = outcome.failures
        kinds[reply.failure] = kinds.get(reply.failure, 0) + 1
        failed = sum(kinds.values())
        if reply.failure == REFUSED:
            self._end(
                fatal=f"the gateway at {self.spec.url} is gone: it answered "
                f"{outcome.answers} questions of this test, and now takes no connection"
            )
        elif reply.failure == TIMED_OUT:
            self._end(cut_short=f"no answer for {TIMEOUT_S:g} s")
        elif failed >= MAX_FAILURES:
            self._end(cut_short=f"{failed} requests failed")

    def _end(self, *, fatal: str | None = None, cut_short: str | None = None) -> None:
        """LoadGen cannot be told to stop: the process does."""
        self.outcome.fatal = fatal
        self.outcome.cut_short = cut_short
        self.outcome.write(self.spec.directory)
        os._exit(0)

    async def _warm_up(self) -> None:
        """Ask over all connections for a while, untimed; LoadGen's rules allow it."""
        spec, outcome = self.spec, self.outcome
        begin = time.perf_counter()
        count = len(self._requests)
        # To and fro in the file, so that every length occurs early.
        strides = range(count // 7 + 1, 2 * count + 1)
        stride = next(n for n in strides if math.gcd(n, count) == 1)
        turn = asked = 0

        async def work() -> None:
            nonlocal turn, asked
            while outcome.fatal is None:
                turn += 1
                reply = await self._pool.ask(self._requests[turn * stride % count])
                asked += 1
                outcome.fatal = outcome.fatal or self._check(reply)
                if time.perf_counter() - begin >= spec.warm_up_s:
                    return

        workers = 1 if spec.scenario == "SingleStream" else min(spec.connections, 32)
        await asyncio.gather(*(work() for _ in range(workers)))
        outcome.warm_up_qps = asked / (time.perf_counter() - begin)

    def _check(self, reply: Reply) -> str | None:
        """Why an answer to the warm-up is none; None if it is."""
        try:
            body = json.loads(reply.body)
        except ValueError:
            body = {}
        if not isinstance(body, dict):
            body = {}
        where = f"the gateway at {self.spec.url}"
        if reply.failure is not None:
            detail = body.get("detail")
            return (
                f"{where} does not answer the warm-up of {self.spec.precision}: "
                f"{reply.failure}{f': {detail}' if detail else ''}"
            )
        if body.get("precision") != self.spec.precision:
            return f"{where} was asked for {self.spec.precision} and answers otherwise"
        return None

    async def _read_metrics(self) -> str | None:
        reply = await self._pool.ask(self._address.get("/metrics"))
        return reply.body.decode() if reply.failure is None else None


def make_settings(spec: LoadSpec, warm_up_qps: float) -> Any:
    """LoadGen's settings of a test.

    Source: the scenarios' rules in MLPerf Inference's policies; docs/benchmarks.md
    lists where we depart from them.
    """
    import mlperf_loadgen

    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, spec.scenario)
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * spec.min_seconds)
    settings.min_query_count = spec.min_queries
    settings.qsl_rng_seed = SEED
    settings.sample_index_rng_seed = SEED
    settings.schedule_rng_seed = SEED
    if spec.scenario == "SingleStream":
        settings.single_stream_target_latency_percentile = spec.percentile
        # Only how many queries are drawn beforehand: four times what will be needed.
        settings.single_stream_expected_latency_ns = round(2.5e8 / warm_up_qps)
    elif spec.scenario == "Server":
        settings.server_target_qps = spec.target_qps
        settings.server_target_latency_ns = round(1e6 * spec.bound_ms)
        settings.server_target_latency_percentile = spec.percentile
        settings.server_max_async_queries = spec.max_outstanding
    else:
        settings.offline_expected_qps = spec.target_qps or warm_up_qps
    return settings


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where there is one: it costs the machine less."""
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def read_cpu_s() -> float:
    """What this process has used so far, seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Run the test that standard input names; its end ends the process."""
    # While LoadGen runs, Python sees no signal.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spec = LoadSpec(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        LoadDriver(spec).run()
    except Int8qaError as error:
        Outcome(fatal=str(error)).write(spec.directory)
    # Not through the interpreter's shutdown: a thread still reads standard input.
    os._exit(0)


if __name__ == "__main__":
    main()
