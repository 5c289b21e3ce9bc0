"""How fast an engine drains a queue, and what that means to whoever waits.

In: batches with their padded tokens and times. Out: seconds that so many tokens will
take, and when a refused client should ask again. Knows no queue and no clock.
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
    """Padded tokens per second of engine time, over a sliding window."""

    def __init__(self) -> None:
        self._batches: deque[tuple[float, int, float]] = deque()
        self._tokens = 0
        self._busy_s = 0.0
        self._last_answer = -math.inf

    @property
    def measured(self) -> bool:
        """Whether any batch was answered yet."""
        return bool(self._batches)

    def record(self, tokens: int, dispatched: float, answered: float) -> None:
        """Take in one answered batch."""
        # Calls overlap, the engine's work does not: count from the answer before.
        busy_s = answered - max(dispatched, self._last_answer)
        self._last_answer = answered
        self._batches.append((answered, tokens, busy_s))
        self._tokens += tokens
        self._busy_s += busy_s
        while (
            len(self._batches) > MIN_BATCHES
            and self._batches[0][0] < answered - WINDOW_S
        ):
            _, old_tokens, old_busy_s = self._batches.popleft()
            self._tokens -= old_tokens
            self._busy_s -= old_busy_s

    def estimate_s(self, tokens: int) -> float:
        """Engine time for ``tokens``."""
        if not self._tokens:
            return UNMEASURED_S if tokens else 0.0
        return max(0.0, tokens * self._busy_s / self._tokens)

    def measure_delay_s(self, now: float, dispatched: float, tokens: int) -> float:
        """How much longer than usual the oldest batch in the engine has taken so far.

        An engine that hangs says nothing: who has been late for ten seconds is
        expected to be late for ten more.
        """
        taken_s = now - max(dispatched, self._last_answer)
        return max(0.0, taken_s - self.estimate_s(tokens))


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
