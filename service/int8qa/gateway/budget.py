"""Bytes of request bodies held at once, of all requests of all processes together.

In: bytes as they arrive. Out: leave to keep them, or a refusal. A limit for each
body bounds one client; this one bounds the gateway.
"""

from __future__ import annotations

from int8qa.errors import QueueFullError
from int8qa.gateway.load import Figure, Load, stand_alone


class ByteBudget:
    """A common allowance; what was taken is given back when its request ends."""

    def __init__(self, limit: int, load: Load | None = None) -> None:
        self._limit = limit
        self._load = load or stand_alone()
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes taken and not given back, in all processes."""
        return self._held + self._load.add_up_others(Figure.BODY_BYTES)

    def take(self, count: int) -> None:
        """Keep ``count`` bytes more. A request alone is never refused.

        Raises:
            QueueFullError: with what others hold it would be too much.
        """
        held = self.held
        if held and held + count > self._limit:
            raise QueueFullError(
                f"requests in work hold {held} bytes; allowed are {self._limit} "
                f"together. Ask again in a second, or raise "
                f"INT8QA_LIMITS__MAX_PENDING_BYTES"
            )
        self._set(self._held + count)

    def give_back(self, count: int) -> None:
        """Release what ``take`` kept."""
        self._set(self._held - count)

    def _set(self, held: int) -> None:
        self._held = held
        self._load.set(Figure.BODY_BYTES, held)
