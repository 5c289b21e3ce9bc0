"""Windows that wait for one engine, sorted by padded length; requests take turns.

In: requests, with the indices of their windows of each length. Out: rows, one window
each, in the order of turns. Decides neither when a batch leaves nor which: that is
``choice.py`` and ``line.py``. Knows no engine, no tensors and no event loop.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Hashable, Protocol):
    """What is asked of a request; it is equal to itself alone."""

    @property
    def arrival_s(self) -> float:
        """On the clock of whoever asks for batches."""


R = TypeVar("R", bound=Waiting)
Row = tuple[R, int]
"""A window: its request, its index there."""


class Bucket(Generic[R]):
    """The waiting windows of one padded length S, a lane for each request.

    A request gives one window per turn and goes back to the end of the line, so a long
    document advances and yet blocks nobody who comes later. Turn numbers are common to
    all buckets: their lines are one line.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.windows = 0
        self._lanes: OrderedDict[R, deque[int]] = OrderedDict()  # by arrival
        self._turns: OrderedDict[R, int] = OrderedDict()  # by turn

    @property
    def next_turn(self) -> int:
        """Of the request at the head; there must be one."""
        return next(iter(self._turns.values()))

    @property
    def oldest_arrival_s(self) -> float:
        """Of all windows here; there must be one."""
        return next(iter(self._lanes)).arrival_s

    def list_upcoming(self, count: int) -> list[R]:
        """The requests of the next so many turns."""
        return list(itertools.islice(self._turns, count))

    def count_ahead(self, turns: int) -> int:
        """Windows that go before one more request has had so many turns."""
        return sum(min(len(lane), turns) for lane in self._lanes.values())

    def join(self, request: R, lane: deque[int], turn: int) -> None:
        """Queue a request's windows of this length, one or more."""
        self._lanes[request] = lane
        self._turns[request] = turn
        self.windows += len(lane)

    def leave(self, request: R) -> int:
        """Drop what ``request`` has waiting; return how many windows that was."""
        lane = self._lanes.pop(request, deque())
        self._turns.pop(request, None)
        self.windows -= len(lane)
        return len(lane)

    def take(self, count: int, turns: Iterator[int]) -> list[Row[R]]:
        """Remove so many windows, one per turn; there must be as many.

        Args:
            count: of windows.
            turns: numbers for those who go back to the end of the line.
        """
        rows: list[Row[R]] = []
        for _ in range(count):
            request, _turn = self._turns.popitem(last=False)
            lane = self._lanes[request]
            rows.append((request, lane.popleft()))
            if lane:
                self._turns[request] = next(turns)
            else:
                del self._lanes[request]
        self.windows -= count
        return rows
