"""How long to wait before what ended is started again.

In: how long it had been well. Out: seconds. Knows no process.
"""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_RESTART_DELAY_S = 0.5
HEALTHY_AFTER_S = 30.0
"""Well for so long, a death counts as the first one again."""


class RestartBackoff:
    """Exponential delays with jitter, forgotten after a healthy time."""

    def __init__(
        self,
        *,
        max_delay_s: float,
        first_delay_s: float = FIRST_RESTART_DELAY_S,
        healthy_after_s: float = HEALTHY_AFTER_S,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._max_delay_s = max_delay_s
        self._first_delay_s = first_delay_s
        self._healthy_after_s = healthy_after_s
        self._uniform = uniform
        self._failures = 0

    def next_delay_s(self, healthy_s: float) -> float:
        """Return the wait before the next start.

        Args:
            healthy_s: how long it had been well, 0 where it never was.

        Returns:
            Seconds in [d/2, d], where d doubles from the first delay up to the
            greatest one.
        """
        if healthy_s >= self._healthy_after_s:
            self._failures = 0
        # The exponent is bounded only to keep the float finite.
        delay_s = self._first_delay_s * 2 ** min(self._failures, 60)
        self._failures += 1
        share = self._uniform(0.5, 1.0)
        return float(share * min(delay_s, self._max_delay_s))
