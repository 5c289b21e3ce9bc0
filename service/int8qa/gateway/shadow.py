"""A share of the answered questions is asked again, of INT8 and FP16, in quiet moments.

In: questions that were answered, already cut into windows. Out: pairs for the
comparison, measured like with like: the same windows, each precision alone on an idle
engine, the order alternating. Waiting requests always come first, and no more than a
share of the time is spent. Knows no HTTP and no engine; texts live here until replayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from int8qa.contract import Precision
from int8qa.errors import Int8qaError, OverloadedError
from int8qa.gateway.activity import Activity
from int8qa.gateway.comparison import Pair, ShadowReport, build_pair
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.query import PAIR, Query, Run
from int8qa.gateway.telemetry import SKIP_REASONS
from int8qa.gateway.waiting import finish_within
from int8qa.reader.windows import Window
from int8qa.settings import ComparisonSettings

MAX_WAITING = 16
"""Samples kept for a quiet moment. Newer ones push the oldest out: they say more about
now, and no text is kept long."""

BURST_S = 1.0
"""Seconds of replay that a long pause may save up."""

GRACE_S = 0.001
"""Between the last question's end and a replay: its reply leaves first."""

PATIENCE_S = 5.0
"""Without a quiet moment for so long, a sample is content with empty queues: its times
will not count, but agreement is known at any load that leaves a gap."""

ORPHAN_CHECK_S = 0.005
"""How often a batch is looked for whose callers are gone; it ends within engine time,
and nobody announces it."""

SkipReason = Literal["busy", "capacity", "too_long"]


@dataclass(frozen=True, slots=True)
class Sample:
    """An answered question, to be asked again."""

    query: Query
    windows: list[Window]


class EngineQueues(Protocol):
    """What lies before the engines, and in them, of requests and replays together."""

    @property
    def queued(self) -> bool:
        """Whether windows wait for a batch."""

    @property
    def in_flight(self) -> bool:
        """Whether batches are in an engine."""


class ShadowObserver(Protocol):
    """Telemetry's view; every call is cheap and never raises."""

    def on_skip(self, reason: str) -> None:
        """A sample was given up."""

    def on_replay(self, busy_s: float) -> None:
        """So much wall time went into one precision's replay."""


class CapacityBudget:
    """Seconds of replay allowed: they accrue at ``share`` per second of wall time.

    A token bucket of ``BURST_S`` that may be overdrawn by one replay, which the time
    after it pays back: over any long span no more than ``share`` is spent.
    """

    def __init__(self, share: float, now_s: float) -> None:
        self._share = share
        self._level_s = BURST_S * share
        self._seen_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until a replay may begin; 0 if it may now."""
        self._accrue(now_s)
        return max(0.0, -self._level_s / self._share)

    def spend(self, seconds: float, now_s: float) -> None:
        """Take what a replay has cost."""
        self._accrue(now_s)
        self._level_s -= seconds

    def _accrue(self, now_s: float) -> None:
        earned_s = (now_s - self._seen_s) * self._share
        self._level_s = min(BURST_S * self._share, self._level_s + earned_s)
        self._seen_s = now_s


class Shadow:
    """One supervised task that replays samples while nobody waits.

    Args:
        settings: share of questions, share of time, longest document.
        activity: of the gateway; a replay begins while it has no question.
        queues: of all precisions.
        ask: one precision's answer to a sample, as a request would get it.
        report: takes each finished pair; None for a pair in which a side failed.
        observer: counts what was skipped and spent.
        draw: a random number in [0, 1) per question.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        activity: Activity,
        queues: EngineQueues,
        *,
        ask: Callable[[Sample, Precision], Awaitable[Run]],
        report: Callable[[Pair | None], None],
        observer: ShadowObserver,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._activity = activity
        self._queues = queues
        self._ask = ask
        self._report = report
        self._observer = observer
        self._clock = clock
        self._sleep = sleep
        self._draw = draw
        self._waiting: deque[Sample] = deque()
        self._offered = asyncio.Event()
        self._order = itertools.cycle((PAIR, PAIR[::-1]))
        self._started_s = clock()
        self._budget = CapacityBudget(settings.capacity_share, self._started_s)
        self._busy = False
        self._spent_s = 0.0
        self._replayed = 0
        self._disturbed = 0
        self._skipped: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a replay is in the engine now."""
        return self._busy

    async def start(self) -> None:
        """Begin to replay."""
        self._task = asyncio.create_task(self._run(), name="shadow")

    async def close(self) -> None:
        """Stop at once; what waits is forgotten."""
        task, self._task = self._task, None
        self._waiting.clear()
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def offer(self, sample: Sample) -> None:
        """Maybe keep an answered question; cheap, and never fails the request."""
        if self._task is None or self._draw() >= self._settings.fraction:
            return
        if len(sample.windows) > self._settings.max_windows:
            self._skip("too_long")
            return
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft()
            overdrawn = self._budget.wait_s(self._clock()) > 0
            self._skip("capacity" if overdrawn else "busy")
        self._waiting.append(sample)
        self._offered.set()

    def report(self) -> ShadowReport:
        """Describe the work so far."""
        elapsed_s = self._clock() - self._started_s
        return ShadowReport(
            replayed=self._replayed,
            waiting=len(self._waiting),
            skipped={reason: self._skipped[reason] for reason in SKIP_REASONS},
            disturbed=self._disturbed,
            spent_share=self._spent_s / elapsed_s if elapsed_s > 0 else 0.0,
        )

    async def _run(self) -> None:
        while True:
            await self._offered.wait()
            quiet = await self._wait_for_turn()
            if not self._waiting:
                self._offered.clear()
                continue
            sample = self._waiting.popleft()
            try:
                await self._replay(sample, undisturbed=quiet)
            except OverloadedError:
                self._skip("busy")
            except Int8qaError:
                self._report(None)
            except Exception as error:  # noqa: BLE001 - it outlives every replay
                get_logger().error("replay_failed", failure=describe_exception(error))
                self._report(None)

    async def _wait_for_turn(self) -> bool:
        """Return when the budget allows a replay and nobody waits.

        True in a quiet moment; False where patience ended and queues are empty.
        """
        while True:
            wait_s = self._budget.wait_s(self._clock())
            if wait_s > 0:
                await self._sleep(wait_s)
                continue
            quiet = await self._wait_for_quiet()
            if self._budget.wait_s(self._clock()) > 0:
                continue
            if quiet or not self._queues.queued:
                return quiet

    async def _wait_for_quiet(self) -> bool:
        """Wait for an idle gateway, at most ``PATIENCE_S``; say whether it is."""
        try:
            await finish_within(self._wait_until_idle(), PATIENCE_S)
        except asyncio.TimeoutError:
            return False
        return True

    async def _wait_until_idle(self) -> None:
        while True:
            await self._activity.wait_for_no_question()
            await self._sleep(GRACE_S)
            if self._activity.questions:
                continue
            if not self._queues.in_flight:
                return
            await self._sleep(ORPHAN_CHECK_S)

    async def _replay(self, sample: Sample, *, undisturbed: bool) -> None:
        runs: dict[Precision, Run] = {}
        for half, precision in enumerate(next(self._order)):
            # The first half may have overdrawn the budget: the second belongs to it.
            if half:
                undisturbed &= await self._wait_for_second_half()
            arrivals, started_s = self._activity.arrivals, self._clock()
            self._busy = True
            try:
                with self._activity.replay() as alone:
                    undisturbed &= alone
                    runs[precision] = await self._ask(sample, precision)
            finally:
                self._busy = False
                now_s = self._clock()
                self._spend(now_s - started_s, now_s)
            undisturbed &= self._activity.arrivals == arrivals
        self._replayed += 1
        self._disturbed += not undisturbed
        query = sample.query
        self._report(
            build_pair(
                runs,
                undisturbed=undisturbed,
                request_id=query.request_id,
                windows=len(sample.windows),
                question_chars=len(query.question),
                context_chars=len(query.context),
                seen_s=self._clock(),
            )
        )

    async def _wait_for_second_half(self) -> bool:
        while True:
            quiet = await self._wait_for_quiet()
            if quiet or not self._queues.queued:
                return quiet

    def _spend(self, seconds: float, now_s: float) -> None:
        self._spent_s += seconds
        self._budget.spend(seconds, now_s)
        self._observer.on_replay(seconds)

    def _skip(self, reason: SkipReason) -> None:
        self._skipped[reason] += 1
        self._observer.on_skip(reason)
