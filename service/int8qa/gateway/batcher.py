"""Windows of many callers in, padded batches out to the engine, logits back to each.

In: unpadded windows, one ``submit`` per request. Out: each window's own logits, or one
error per request. Here are the door and the task that empties the line; what leaves is
``line.py``'s to say, what becomes of it ``flights.py``'s. Only shapes (B, S) that the
contract names reach the engine. Knows neither HTTP nor Triton nor text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    EngineUnavailableError,
    Int8qaError,
    QueueFullError,
    ShuttingDownError,
)
from int8qa.gateway.flights import BatchObserver, Flights, Infer
from int8qa.gateway.line import Batch, WaitingLine, derive_policy
from int8qa.gateway.pace import DrainRate, compute_retry_after_s
from int8qa.gateway.submission import Submission, WindowResult
from int8qa.gateway.tracing import NO_TRACING, Tracing
from int8qa.reader.windows import Window
from int8qa.settings import BatcherSettings

_log = logging.getLogger(__name__)


class Batcher:
    """The door before one precision's engine, and the task that empties its line."""

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
        self._observer = observer
        self._tracing = tracing
        self._clock = clock
        self._draw = draw
        self._line: WaitingLine[Submission] = WaitingLine(
            derive_policy(contract, precision, settings)
        )
        self._requests: set[Submission] = set()
        self._pace = DrainRate()
        self._wake = asyncio.Event()
        self._flights = Flights(
            precision,
            infer,
            contract.pad_token_id,
            self._pace,
            fail=self._fail,
            on_end=self._wake.set,
            observer=observer,
            tracing=tracing,
            clock=clock,
        )
        self._closing = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_rang = -math.inf
        self._dispatcher: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        """Whether the supervised task lives; without it nothing is ever answered."""
        return self._dispatcher is not None and not self._dispatcher.done()

    @property
    def queued_windows(self) -> int:
        """Windows that wait."""
        return self._line.windows

    @property
    def in_flight(self) -> int:
        """Batches in the engine, those among them that nobody waits for any more."""
        return len(self._flights)

    @property
    def queued_tokens(self) -> int:
        """Padded tokens that wait."""
        return self._line.tokens

    @property
    def drain_s(self) -> float:
        """How long the engine needs for what is queued, at its recent pace."""
        waiting_s = self._pace.estimate_s(self._line.work)
        return waiting_s + self._flights.measure_delay_s()

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
        lengths = [self._contract.bucket_for(len(window)) for window in windows]
        self._check_admission(sum(lengths))
        if not windows:
            return []

        loop, now = asyncio.get_running_loop(), self._clock()
        until = math.inf if deadline is None else deadline
        self._check_deadline(until - now, lengths)
        trace = self._tracing.trace_call(self._precision, len(windows))
        request = Submission(windows, now, until, loop.create_future(), trace)
        timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            timer = loop.call_later(deadline - now, self._expire, request)
        self._requests.add(request)
        self._line.join(request, lengths)
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
                self._flights.cancel_orphans(request)
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
        if tasks := [task for task in (self._dispatcher, *self._flights.tasks) if task]:
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

    def _check_deadline(self, left_s: float, lengths: Sequence[int]) -> None:
        """Refuse what could only be worked on in vain.

        Only behind others: a request alone is tried, or a pace measured in bad times
        would stand for ever. One that is late already is the timer's.
        """
        line, pace = self._line, self._pace
        if not (line.windows and pace.measured and 0 < left_s < math.inf):
            return
        delay_s = self._flights.measure_delay_s()
        own = line.measure_work(lengths)
        if delay_s + pace.estimate_s(line.work + own) <= left_s:
            return
        # Requests take turns, so that a short one passes most of a long one.
        tokens, ahead = line.measure_ahead(len(lengths))
        needed_s = delay_s + pace.estimate_s(ahead + own)
        if needed_s > left_s:
            raise DeadlineUnreachableError(
                f"the request has {left_s:.2f} s left, and with {tokens} padded tokens "
                f"of others before it {self._precision} needs about {needed_s:.2f} s; "
                f"allow more time, or ask again later",
                retry_after_s=compute_retry_after_s(self.drain_s, self._draw),
            )

    # The supervised task: it decides, and never waits for the engine.

    async def _dispatch_batches(self) -> None:
        while True:
            self._wake.clear()
            while batch := self._take_batch():
                self._flights.send(batch)
            self._set_alarm()
            await self._wake.wait()

    def _take_batch(self) -> Batch[Submission] | None:
        occupied = self._flights.occupied
        if occupied >= self._settings.max_in_flight:
            return None
        now_s = max(self._clock(), self._alarm_rang)
        self._drop_gone(now_s)
        batch = self._line.take(now_s, occupied, closing=self._closing)
        if batch is not None:
            self._report_queue()
        return batch

    def _drop_gone(self, now_s: float) -> None:
        """Clear the next batch of requests that nobody waits for any more.

        A cancelled caller cleans up one turn of the event loop late, and a busy event
        loop rings deadline timers late. Expiring the former only drops its windows.
        """
        while gone := [
            request
            for request in self._line.iter_upcoming()
            if request.answer.done() or request.deadline_s <= now_s
        ]:
            for request in gone:
                self._expire(request)

    def _set_alarm(self) -> None:
        """Wake the task when the oldest window has waited long enough."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due_s = self._line.next_alarm_s(self._flights.occupied)
        if due_s < math.inf:
            self._alarm = asyncio.get_running_loop().call_later(
                due_s - self._clock(), self._ring_alarm, due_s
            )

    def _ring_alarm(self, due_s: float) -> None:
        # uvloop's timers count milliseconds and may ring before the clock shows
        # ``due_s``; taking the alarm's word spares a spin until both agree.
        self._alarm_rang = due_s
        self._wake.set()

    def _on_dispatcher_end(self, task: asyncio.Task[None]) -> None:
        error = EngineUnavailableError(
            f"the batcher of {self._precision} died; restart the gateway"
        )
        error.__cause__ = None if task.cancelled() else task.exception()
        if not self._closing:
            _log.critical("%s", error, exc_info=error)
        self._abandon_all(error)

    # Ends without an answer. Each may come second: a settled request stays as it is.

    def _fail(self, requests: Iterable[Submission], error: BaseException) -> None:
        for request in requests:
            request.fail(error)
            self._drop(request)

    def _expire(self, request: Submission) -> None:
        error = DeadlineExceededError(
            f"deadline reached {self._clock() - request.arrival_s:.3f} s after arrival "
            f"with {len(request.results)} of {len(request.windows)} windows answered; "
            f"send less text or allow more time"
        )
        self._fail([request], error)

    def _abandon_all(self, error: Int8qaError) -> None:
        self._fail(tuple(self._requests), error)
        self._flights.cancel()

    def _drop(self, request: Submission) -> None:
        if self._line.leave(request):
            self._report_queue()

    def _report_queue(self) -> None:
        if self._observer is not None:
            self._observer.on_queue(self._precision, self.queued_windows)
