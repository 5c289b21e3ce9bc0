"""A token bucket: so many a second on average, so many at once.

In: takings. Out: whether there was one, or when there will be. Knows nothing of keys
and requests.
"""

from __future__ import annotations

from collections.abc import Callable


class TokenBucket:
    """Fills with ``rate_per_s`` tokens a second, up to ``capacity``; full at first."""

    def __init__(
        self, rate_per_s: float, capacity: int, clock: Callable[[], float]
    ) -> None:
        self.rate_per_s = rate_per_s
        self.capacity = capacity
        self._clock = clock
        self._tokens = float(capacity)
        self._seen_s = clock()

    def take(self) -> float:
        """Take one token: 0.0, or the seconds until there is one, and none taken."""
        self._fill()
        # As many rounded sums as one likes; a token short by 1e-9 is there.
        if self._tokens >= 1 - 1e-9:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self.rate_per_s

    def charge(self, tokens: int) -> None:
        """Take tokens that are gone already, if need be as a debt."""
        self._fill()
        self._tokens -= tokens

    def _fill(self) -> None:
        now_s = self._clock()
        gained = max(0.0, now_s - self._seen_s) * self.rate_per_s
        self._tokens = min(self.capacity, self._tokens + gained)
        self._seen_s = now_s
