"""How fast an engine drains a queue, and what that means to whoever waits.

In: batches with their work and times. Out: seconds that so much work will take, and
when a refused client should ask again. Work is what the build measured batches to cost,
or padded tokens; the pace is what that comes to here. Knows no queue and no clock.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable

WINDOW_S = 30.0
"""Batches answered longer ago tell nothing of now, unless they are all there is."""

MIN_BATCHES = 8
"""So many are kept, however old: an idle night forgets no pace."""

UNMEASURED_S = 1.0
"""What any work is said to take until a batch was measured."""

MAX_RETRY_AFTER_S = 60.0
"""No client is sent away for longer: the load will have changed by then."""


class DrainRate:
    """Work per second of engine time, over a sliding window."""

    def __init__(self) -> None:
        self._batches: deque[tuple[float, float, float]] = deque()
        self._work = 0.0
        self._busy_s = 0.0
        self._last_answer = -math.inf

    @property
    def measured(self) -> bool:
        """Whether any batch was answered yet."""
        return bool(self._batches)

    def record(self, work: float, dispatched: float, answered: float) -> None:
        """Take in one answered batch."""
        # Calls overlap, the engine's work does not: count from the answer before.
        busy_s = answered - max(dispatched, self._last_answer)
        self._last_answer = answered
        self._batches.append((answered, work, busy_s))
        self._work += work
        self._busy_s += busy_s
        while (
            len(self._batches) > MIN_BATCHES
            and self._batches[0][0] < answered - WINDOW_S
        ):
            _, old_work, old_busy_s = self._batches.popleft()
            self._work -= old_work
            self._busy_s -= old_busy_s

    def estimate_s(self, work: float) -> float:
        """Engine time for ``work``."""
        if not self._work:
            return UNMEASURED_S if work else 0.0
        return max(0.0, work * self._busy_s / self._work)

    def measure_delay_s(self, now: float, dispatched: float, work: float) -> float:
        """How much longer than usual the oldest batch in the engine has taken so far.

        An engine that hangs says nothing: who has been late for ten seconds is
        expected to be late for ten more.
        """
        taken_s = now - max(dispatched, self._last_answer)
        return max(0.0, taken_s - self.estimate_s(work))


def compute_retry_after_s(
    drain_s: float, draw: Callable[[], float] = random.random
) -> float:
    """When to ask again, 0 to 90 s: once the queue is empty, and not all at once.

    Args:
        drain_s: how long what is queued will take.
        draw: a random number in [0, 1). It spreads those refused together over half
            of the time again, and over a second at least, the header's unit.
    """
    bounded_s = min(drain_s, MAX_RETRY_AFTER_S)
    return bounded_s + draw() * max(1.0, bounded_s / 2)
