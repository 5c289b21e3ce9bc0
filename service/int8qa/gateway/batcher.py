"""Windows of many callers in, padded batches out to the engine, logits back to each.

In: unpadded windows, one ``submit`` per request. Out: each window's own logits, or one
error per request. Only shapes (B, S) that the contract names reach the engine. Knows
neither HTTP nor Triton nor text: the engine is one awaitable, time is one clock.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    EngineOutputError,
    EngineUnavailableError,
    Int8qaError,
    QueueFullError,
    ShuttingDownError,
)
from int8qa.gateway.pace import DrainRate, compute_retry_after_s
from int8qa.gateway.tracing import NO_TRACING, CallTrace, Tracing
from int8qa.reader.windows import Window
from int8qa.settings import BatcherSettings

_log = logging.getLogger(__name__)

MAX_HOLD_S = 1.0
"""Longest time an abandoned batch counts as in flight: what Triton began, it ends."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B windows padded to S tokens, every row a real window."""

    input_ids: NDArray[np.int32]  # [B, S], ``pad_token_id`` behind each window
    attention_mask: NDArray[np.int32]  # [B, S], 1 on a window's own tokens
    token_type_ids: NDArray[np.int32]  # [B, S]


@dataclass(frozen=True, slots=True)
class BatchLogits:
    """The engine's answer to a batch."""

    start: NDArray[np.float32]  # [B, S]
    end: NDArray[np.float32]  # [B, S]


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What became of one window; the arrays are views cut to its own length."""

    start: NDArray[np.float32]  # [S], S unpadded
    end: NDArray[np.float32]  # [S], S unpadded
    queue_s: float  # arrival to dispatch
    inference_s: float  # dispatch to logits


Infer = Callable[[Precision, PaddedBatch, float | None], Awaitable[BatchLogits]]
"""The engine. Last comes an absolute deadline on the batcher's clock, the latest among
the batch's callers, None if one of them has none. The engine must return or raise by
then: a call that never ends keeps its place among ``max_in_flight``."""


class BatchObserver(Protocol):
    """Telemetry's view of a batcher; every call is cheap and never raises."""

    def on_queue(self, precision: Precision, windows: int) -> None:
        """So many windows are queued now."""

    def on_batch(
        self, precision: Precision, windows: int, tokens: int, padding_tokens: int
    ) -> None:
        """A batch of B x S ``tokens`` goes out, so many of them padding."""


@dataclass(eq=False, slots=True)
class _Request:
    """One submit; ``answer`` settles once, with all results or the first error."""

    windows: Sequence[Window]
    arrival: float
    deadline: float
    answer: asyncio.Future[list[WindowResult]]
    trace: CallTrace
    results: dict[int, WindowResult] = field(default_factory=dict)

    def receive(self, index: int, result: WindowResult) -> None:
        self.results[index] = result
        if len(self.results) == len(self.windows) and not self.answer.done():
            self.answer.set_result([self.results[i] for i in range(len(self.windows))])


_Row = tuple[_Request, int]  # a window: its request, its index there


class _Bucket:
    """The waiting windows of one padded length S, a lane for each request.

    A request gives one window per turn and goes back to the end of the line, so a long
    document advances and yet blocks nobody who comes later. Turn numbers are common to
    all buckets: their lines are one line.
    """

    def __init__(self, length: int, batch_sizes: list[int]) -> None:
        self.length = length
        self.batch_sizes = batch_sizes
        self.windows = 0
        self._lanes: OrderedDict[_Request, deque[int]] = OrderedDict()  # by arrival
        self._turns: OrderedDict[_Request, int] = OrderedDict()  # by turn

    @property
    def is_full(self) -> bool:
        return self.windows >= self.batch_sizes[-1]

    @property
    def next_turn(self) -> int:
        return next(iter(self._turns.values()))

    @property
    def oldest_arrival(self) -> float:
        return next(iter(self._lanes)).arrival

    def upcoming(self) -> list[_Request]:
        """All requests that the next batch could take from."""
        return list(itertools.islice(self._turns, self.batch_sizes[-1]))

    def count_ahead(self, turns: int) -> int:
        """Windows that go before one more request has had so many turns."""
        return sum(min(len(lane), turns) for lane in self._lanes.values())

    def join(self, request: _Request, lane: deque[int], turn: int) -> None:
        self._lanes[request] = lane
        self._turns[request] = turn
        self.windows += len(lane)

    def leave(self, request: _Request) -> int:
        """Drop what ``request`` has waiting; return how many windows that was."""
        lane = self._lanes.pop(request, deque())
        self._turns.pop(request, None)
        self.windows -= len(lane)
        return len(lane)

    def take(self, turns: Iterator[int]) -> list[_Row]:
        """Remove the largest legal batch, one window per turn."""
        rows: list[_Row] = []
        for _ in range(max(b for b in self.batch_sizes if b <= self.windows)):
            request, _turn = self._turns.popitem(last=False)
            lane = self._lanes[request]
            rows.append((request, lane.popleft()))
            if lane:
                self._turns[request] = next(turns)
            else:
                del self._lanes[request]
        self.windows -= len(rows)
        return rows


@dataclass(eq=False, slots=True)
class _Flight:
    """A batch inside the engine, and whose windows it holds."""

    requests: list[_Request]
    tokens: int
    dispatched: float
    orphaned: bool = False


class Batcher:
    """The queue before one precision's engine, and the task that empties it.

    When does a batch go out?

    - Nothing in flight: at once, whatever is there. Waiting would idle the engine.
    - Something in flight, and room for more: when a batch is full or its bucket's
      oldest window came ``max_wait_s`` ago. The engine is busy, so waiting for company
      costs little, and a small batch now would delay the fuller one behind it.
    - ``max_in_flight`` batches out: when one comes back.
    - Closing: nobody else will come, so as soon as there is room.

    If several buckets may go, the head that stood in line longest goes first, with the
    largest legal B that its bucket fills; no row is ever a dummy.
    """

    def __init__(
        self,
        precision: Precision,
        contract: Contract,
        settings: BatcherSettings,
        infer: Infer,
        *,
        observer: BatchObserver | None = None,
        tracing: Tracing = NO_TRACING,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._precision = precision
        self._contract = contract
        self._settings = settings
        self._infer = infer
        self._observer = observer
        self._tracing = tracing
        self._clock = clock
        self._draw = draw
        budget, sizes = contract.max_batch_tokens, contract.batch_sizes
        self._buckets = {
            s: _Bucket(s, [b for b in sizes if b == 1 or b * s <= budget])
            for s in contract.sequence_buckets
        }
        self._turns = itertools.count()
        self._requests: set[_Request] = set()
        self._in_flight: dict[asyncio.Task[None], _Flight] = {}  # by dispatch
        self._pace = DrainRate()
        self._closing = False
        self._wake = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_rang = -math.inf
        self._dispatcher: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether the supervised task lives; without it nothing is ever answered."""
        return self._dispatcher is not None and not self._dispatcher.done()

    @property
    def queued_windows(self) -> int:
        return sum(bucket.windows for bucket in self._buckets.values())

    @property
    def in_flight(self) -> int:
        """Batches in the engine, those among them that nobody waits for any more."""
        return len(self._in_flight)

    @property
    def queued_tokens(self) -> int:
        """Padded tokens."""
        return sum(b.windows * b.length for b in self._buckets.values())

    @property
    def drain_s(self) -> float:
        """How long the engine needs for what is queued, at its recent pace."""
        return self._pace.estimate_s(self.queued_tokens) + self._measure_delay_s()

    async def start(self) -> None:
        """Start the supervised task on the running event loop."""
        self._dispatcher = asyncio.create_task(self._dispatch_batches())
        self._dispatcher.add_done_callback(self._on_dispatcher_end)

    async def submit(
        self, windows: Sequence[Window], *, deadline: float | None = None
    ) -> list[WindowResult]:
        """Queue a request's windows and wait for all their results, in order.

        The first error ends the request. Then, or when the caller is cancelled, its
        waiting windows are dropped and those in flight ignored.

        Args:
            windows: any number. An empty queue accepts even a request larger than its
                bound: a long document is legal and would else be refused for ever.
            deadline: of the whole request, on the batcher's clock.

        Raises:
            ContractError: at once; a window is longer than the longest bucket.
            QueueFullError: at once; the queue holds as many padded tokens as it may.
            DeadlineUnreachableError: at once; the queue ahead takes until later.
            ShuttingDownError: at once, or when closing ran out of time.
            DeadlineExceededError: on time, whatever the engine does.
            EngineError: the first failure among the windows' batches.
        """
        lanes: dict[int, deque[int]] = {}
        for index, window in enumerate(windows):
            lane = lanes.setdefault(self._contract.bucket_for(len(window)), deque())
            lane.append(index)
        tokens = sum(s * len(lane) for s, lane in lanes.items())
        self._check_admission(tokens)
        if not windows:
            return []

        loop, now = asyncio.get_running_loop(), self._clock()
        until = math.inf if deadline is None else deadline
        self._check_deadline(until - now, len(windows), tokens)
        trace = self._tracing.trace_call(self._precision, len(windows))
        request = _Request(windows, now, until, loop.create_future(), trace)
        timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            timer = loop.call_later(deadline - now, self._expire, request)
        self._requests.add(request)
        for s, lane in lanes.items():
            self._buckets[s].join(request, lane, next(self._turns))
        self._report_queue()
        self._wake.set()
        try:
            return await request.answer
        finally:
            if timer is not None:
                timer.cancel()
            self._requests.discard(request)
            self._drop(request)
            if len(request.results) < len(windows):
                self._cancel_orphans(request)
            trace.end(request.answer)

    async def close(self, timeout_s: float) -> None:
        """Refuse what is new, answer what was accepted, stop within ``timeout_s``.

        What is left by then fails with ShuttingDownError.
        """
        until = self._clock() + timeout_s
        self._closing = True
        self._wake.set()
        try:
            if answers := [request.answer for request in self._requests]:
                await asyncio.wait(answers, timeout=timeout_s)
        finally:
            if self._dispatcher is not None:
                self._dispatcher.cancel()
            self._abandon_all(
                ShuttingDownError(
                    f"the service stopped after {timeout_s} s of draining, before the "
                    f"request was answered; ask again"
                )
            )
        if tasks := [task for task in (self._dispatcher, *self._in_flight) if task]:
            await asyncio.wait(tasks, timeout=max(0.0, until - self._clock()))

    def _check_admission(self, tokens: int) -> None:
        if self._closing:
            raise ShuttingDownError("the service is draining; ask again")
        if not self.healthy:
            raise EngineUnavailableError(
                f"the batcher of {self._precision} does not run; restart the gateway"
            )
        queued, allowed = self.queued_tokens, self._settings.max_queue_tokens
        if queued and queued + tokens > allowed:
            raise QueueFullError(
                f"{queued} padded tokens wait for {self._precision} and the request "
                f"needs {tokens}; allowed are {allowed} together. They take "
                f"{self.drain_s:.1f} s: ask again then",
                retry_after_s=compute_retry_after_s(self.drain_s, self._draw),
            )

    def _check_deadline(self, left_s: float, windows: int, tokens: int) -> None:
        """Refuse what could only be worked on in vain.

        Only behind others: a request alone is tried, or a pace measured in bad times
        would stand for ever. One that is late already is the timer's.
        """
        queued = self.queued_tokens
        if not (queued and self._pace.measured and 0 < left_s < math.inf):
            return
        delay_s = self._measure_delay_s()
        if delay_s + self._pace.estimate_s(queued + tokens) <= left_s:
            return
        # Requests take turns, so that a short one passes most of a long one.
        ahead = sum(b.length * b.count_ahead(windows) for b in self._buckets.values())
        needed_s = delay_s + self._pace.estimate_s(ahead + tokens)
        if needed_s > left_s:
            raise DeadlineUnreachableError(
                f"the request has {left_s:.2f} s left, and with {ahead} padded tokens "
                f"of others before it {self._precision} needs about {needed_s:.2f} s; "
                f"allow more time, or ask again later",
                retry_after_s=compute_retry_after_s(self.drain_s, self._draw),
            )

    def _measure_delay_s(self) -> float:
        for flight in self._in_flight.values():
            if not flight.orphaned:
                return self._pace.measure_delay_s(
                    self._clock(), flight.dispatched, flight.tokens
                )
        return 0.0

    # The supervised task: it decides, and never waits for the engine.

    async def _dispatch_batches(self) -> None:
        while True:
            self._wake.clear()
            while batch := self._take_batch():
                length, rows = batch
                requests = [request for request, _ in rows]
                flight = _Flight(requests, length * len(rows), self._clock())
                task = asyncio.create_task(self._run_batch(length, rows, flight))
                self._in_flight[task] = flight
                task.add_done_callback(self._on_batch_end)
            self._set_alarm()
            await self._wake.wait()

    def _take_batch(self) -> tuple[int, list[_Row]] | None:
        occupied = self._count_occupied()
        if occupied >= self._settings.max_in_flight:
            return None
        now = max(self._clock(), self._alarm_rang)
        for bucket in self._buckets.values():
            self._drop_gone(bucket, now)
        at_once = self._closing or not occupied
        wait_s = self._settings.max_wait_s
        ready = [
            b
            for b in self._buckets.values()
            if b.windows and (at_once or b.is_full or b.oldest_arrival + wait_s <= now)
        ]
        if not ready:
            return None
        bucket = min(ready, key=lambda b: b.next_turn)
        rows = bucket.take(self._turns)
        self._report_queue()
        return bucket.length, rows

    def _count_occupied(self) -> int:
        """Batches in flight that somebody waits for."""
        return sum(not flight.orphaned for flight in self._in_flight.values())

    def _drop_gone(self, bucket: _Bucket, now: float) -> None:
        """Clear the next batch of requests that nobody waits for any more.

        A cancelled caller cleans up one turn of the event loop late, and a busy event
        loop rings deadline timers late. Expiring the former only drops its windows.
        """
        while gone := [
            r for r in bucket.upcoming() if r.answer.done() or r.deadline <= now
        ]:
            for request in gone:
                self._expire(request)

    def _set_alarm(self) -> None:
        """Wake the task when the oldest window has waited long enough."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        arrivals = [b.oldest_arrival for b in self._buckets.values() if b.windows]
        if arrivals and self._count_occupied() < self._settings.max_in_flight:
            due = min(arrivals) + self._settings.max_wait_s
            self._alarm = asyncio.get_running_loop().call_later(
                due - self._clock(), self._ring_alarm, due
            )

    def _ring_alarm(self, due: float) -> None:
        # uvloop's timers count milliseconds and may ring before the clock shows
        # ``due``; taking the alarm's word spares a spin until both agree.
        self._alarm_rang = due
        self._wake.set()

    def _on_dispatcher_end(self, task: asyncio.Task[None]) -> None:
        error = EngineUnavailableError(
            f"the batcher of {self._precision} died; restart the gateway"
        )
        error.__cause__ = None if task.cancelled() else task.exception()
        if not self._closing:
            _log.critical("%s", error, exc_info=error)
        self._abandon_all(error)

    # One task for each batch in flight.

    async def _run_batch(self, length: int, rows: list[_Row], flight: _Flight) -> None:
        """Assemble, infer, fan out; whatever fails here fails these rows alone."""
        failure: type[Int8qaError] = EngineUnavailableError
        try:
            batch = self._assemble_batch(length, rows)
            deadline = max(request.deadline for request, _ in rows)
            dispatched = self._clock()
            with self._tracing.trace_batch(
                [request.trace for request, _ in rows],
                self._precision,
                batch.input_ids.shape,
            ):
                logits = await self._infer(
                    self._precision, batch, None if math.isinf(deadline) else deadline
                )
            answered = self._clock()
            failure = EngineOutputError
            _check_shapes(logits, batch.input_ids.shape)
            self._pace.record(batch.input_ids.size, dispatched, answered)
            for row, (request, index) in enumerate(rows):
                own = len(request.windows[index])
                start, end = logits.start[row, :own], logits.end[row, :own]
                if not (np.isfinite(start).all() and np.isfinite(end).all()):
                    # Its neighbours' logits are sound.
                    self._fail([request], _not_finite_error(self._precision, own))
                    continue
                queue_s = dispatched - request.arrival
                inference_s = answered - dispatched
                request.receive(index, WindowResult(start, end, queue_s, inference_s))
        except (Exception, asyncio.CancelledError) as cause:  # noqa: BLE001
            # gRPC answers a closed channel with CancelledError; it strands nobody here.
            error = cause
            if not isinstance(cause, Int8qaError):
                error = failure(
                    f"a batch of {len(rows)} windows x {length} tokens failed in "
                    f"{self._precision} with {type(cause).__name__}; ask again"
                )
                error.__cause__ = cause
            self._fail((request for request, _ in rows), error)
        if flight.orphaned:
            # Triton drops a batch that waits there; one it has begun it ends, and
            # tells nobody. It keeps no place, but ``in_flight`` counts it until then.
            spent_s = self._clock() - flight.dispatched
            rest_s = self._pace.estimate_s(flight.tokens) - spent_s
            await asyncio.sleep(min(max(rest_s, 0.0), MAX_HOLD_S))

    def _assemble_batch(self, length: int, rows: list[_Row]) -> PaddedBatch:
        shape = (len(rows), length)
        input_ids = np.full(shape, self._contract.pad_token_id, dtype=np.int32)
        attention_mask = np.zeros(shape, dtype=np.int32)
        token_type_ids = np.zeros(shape, dtype=np.int32)
        for row, (request, index) in enumerate(rows):
            window = request.windows[index]
            own = len(window)
            input_ids[row, :own] = window.input_ids
            attention_mask[row, :own] = 1
            token_type_ids[row, :own] = window.token_type_ids
        if self._observer is not None:
            tokens = attention_mask.size
            padding_tokens = tokens - int(attention_mask.sum())
            self._observer.on_batch(self._precision, len(rows), tokens, padding_tokens)
        return PaddedBatch(input_ids, attention_mask, token_type_ids)

    def _on_batch_end(self, task: asyncio.Task[None]) -> None:
        del self._in_flight[task]
        self._wake.set()

    def _cancel_orphans(self, left: _Request) -> None:
        """Cancel the batches of a request that left, if nobody else is in them."""
        for task, flight in self._in_flight.items():
            if (
                left in flight.requests
                and not flight.orphaned
                and all(request.answer.done() for request in flight.requests)
            ):
                flight.orphaned = True
                task.cancel()
                self._wake.set()

    # Ends without an answer. Each may come second, so a settled request stays as it is.

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        for request in requests:
            if not request.answer.done():
                request.answer.set_exception(error)
            self._drop(request)

    def _expire(self, request: _Request) -> None:
        error = DeadlineExceededError(
            f"deadline reached {self._clock() - request.arrival:.3f} s after arrival "
            f"with {len(request.results)} of {len(request.windows)} windows answered; "
            f"send less text or allow more time"
        )
        self._fail([request], error)

    def _abandon_all(self, error: Int8qaError) -> None:
        self._fail(tuple(self._requests), error)
        for task in self._in_flight:
            task.cancel()

    def _drop(self, request: _Request) -> None:
        if sum(bucket.leave(request) for bucket in self._buckets.values()):
            self._report_queue()

    def _report_queue(self) -> None:
        if self._observer is not None:
            self._observer.on_queue(self._precision, self.queued_windows)


def _check_shapes(logits: BatchLogits, expected: tuple[int, ...]) -> None:
    if not logits.start.shape == logits.end.shape == expected:
        raise EngineOutputError(
            f"logits of shapes {logits.start.shape} and {logits.end.shape} answer a "
            f"batch of {expected}; rebuild with `int8qa build` and restart Triton"
        )


def _not_finite_error(precision: Precision, tokens: int) -> EngineOutputError:
    return EngineOutputError(
        f"{precision} returned NaN or infinite logits for a window of {tokens} tokens, "
        f"finite ones are expected; ask another precision"
    )
