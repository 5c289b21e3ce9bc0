"""Bytes of request bodies held at once, of all requests together.

In: bytes as they arrive. Out: leave to keep them, or a refusal. A limit for each
body bounds one client; this one bounds the process.
"""

from __future__ import annotations

from int8qa.errors import QueueFullError


class ByteBudget:
    """A common allowance; what was taken is given back when its request ends."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes taken and not given back."""
        return self._held

    def take(self, count: int) -> None:
        """Keep ``count`` bytes more. A request alone is never refused.

        Raises:
            QueueFullError: with what others hold it would be too much.
        """
        if self._held and self._held + count > self._limit:
            raise QueueFullError(
                f"requests in work hold {self._held} bytes; allowed are {self._limit} "
                f"together. Ask again in a second, or raise "
                f"INT8QA_LIMITS__MAX_PENDING_BYTES"
            )
        self._held += count

    def give_back(self, count: int) -> None:
        """Release what ``take`` kept."""
        self._held -= count
