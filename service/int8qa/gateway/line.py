"""The line before one precision's engine: which windows leave together, and when.

In: requests with their windows' padded lengths; the time; how many batches are out.
Out: the next batch, or when to ask again. Knows no engine and no event loop: the
gateway's batcher and the simulation of ``int8qa plan`` stand in the same line.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from int8qa.contract import Contract, Precision
from int8qa.gateway.buckets import Bucket, R, Row
from int8qa.gateway.choice import BatchCosts, choose_batch
from int8qa.settings import BatcherSettings


@dataclass(frozen=True, slots=True)
class Policy:
    """What a line decides by."""

    costs: BatchCosts
    max_wait_s: float
    max_in_flight: int


def derive_policy(
    contract: Contract, precision: Precision, settings: BatcherSettings
) -> Policy:
    """The gateway's, with this contract and these settings.

    Where the build measured no costs, a batch costs its padded tokens.
    """
    batch_ms = contract.batch_ms.get(precision)
    costs = {}
    for length in contract.sequence_buckets:
        sizes = contract.list_batch_sizes(length)
        row = [float(size * length) for size in sizes]
        costs[length] = dict(
            zip(sizes, row if batch_ms is None else batch_ms[length], strict=True)
        )
    return Policy(BatchCosts(costs), settings.max_wait_s, settings.max_in_flight)


@dataclass(frozen=True, slots=True)
class Batch(Generic[R]):
    """B windows that leave together, padded to S."""

    length: int  # S
    rows: Sequence[Row[R]]  # B
    work: float
    """What it costs, in the unit of the costs."""


class WaitingLine(Generic[R]):
    """The waiting windows of one precision.

    When does a batch go out?

    - Nothing in flight: at once, whatever is there. Waiting would idle the engine.
    - Something in flight, and room for more: when it is as large as a batch may be,
      or holds the window of a length whose oldest came ``max_wait_s`` ago. The engine
      is busy, so waiting for company costs little, and a small batch now would delay
      the fuller one behind it.
    - ``max_in_flight`` batches out: when one comes back.
    - Closing: nobody else will come, so as soon as there is room.

    If several may go, the head that stood in line longest goes first, with the company
    that ``choose_batch`` finds for it; no row is ever a dummy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._costs = policy.costs
        self._buckets: dict[int, Bucket[R]] = {
            length: Bucket(length) for length in self._costs.by_length
        }
        self._largest = max(self._costs.largest.values())
        self._turns = itertools.count()

    @property
    def windows(self) -> int:
        """How many wait."""
        return sum(bucket.windows for bucket in self._buckets.values())

    @property
    def tokens(self) -> int:
        """Padded tokens that wait."""
        return sum(b.windows * b.length for b in self._buckets.values())

    @property
    def work(self) -> float:
        """What waits, in the unit of the costs."""
        return self._weigh((s, b.windows) for s, b in self._buckets.items())

    def measure_work(self, lengths: Iterable[int]) -> float:
        """Of windows with these padded lengths, in the unit of the costs."""
        return self._weigh((length, 1) for length in lengths)

    def measure_ahead(self, turns: int) -> tuple[int, float]:
        """Padded tokens and work of what goes before one more request's last turn.

        Args:
            turns: of that request.
        """
        ahead = [(s, b.count_ahead(turns)) for s, b in self._buckets.items()]
        return sum(length * count for length, count in ahead), self._weigh(ahead)

    def join(self, request: R, lengths: Iterable[int]) -> None:
        """Queue a request's windows, given by their padded lengths, in their order."""
        lanes: dict[int, deque[int]] = {}
        for index, length in enumerate(lengths):
            lanes.setdefault(length, deque()).append(index)
        for length, lane in lanes.items():
            self._buckets[length].join(request, lane, next(self._turns))

    def leave(self, request: R) -> int:
        """Drop what ``request`` has waiting; return how many windows that was."""
        return sum(bucket.leave(request) for bucket in self._buckets.values())

    def iter_upcoming(self) -> Iterator[R]:
        """Every request that the next batch could take from."""
        for bucket in self._buckets.values():
            yield from bucket.list_upcoming(self._largest)

    def take(
        self, now_s: float, in_flight: int, *, closing: bool = False
    ) -> Batch[R] | None:
        """Remove the batch that leaves now; None if none does.

        Args:
            now_s: on the clock of the requests' arrivals.
            in_flight: batches out.
            closing: whether nobody else will come.
        """
        filled = [bucket for bucket in self._buckets.values() if bucket.windows]
        if not filled or in_flight >= self._policy.max_in_flight:
            return None
        wait_s = self._policy.max_wait_s
        ready = [
            bucket
            for bucket in filled
            if closing
            or not in_flight
            or bucket.windows >= self._costs.largest[bucket.length]
            or bucket.oldest_arrival_s + wait_s <= now_s
        ]
        head = min(ready or filled, key=lambda bucket: bucket.next_turn)
        choice = choose_batch(
            {bucket.length: bucket.windows for bucket in filled},
            head.length,
            self._costs,
        )
        if not ready and choice.size < self._costs.largest[choice.length]:
            return None
        rows: list[Row[R]] = []
        for length, count in choice.takes.items():
            rows += self._buckets[length].take(count, self._turns)
        return Batch(
            choice.length, rows, self._costs.by_length[choice.length][len(rows)]
        )

    def next_alarm_s(self, in_flight: int) -> float:
        """When a waiting window has waited long enough; infinite if none will."""
        if in_flight >= self._policy.max_in_flight:
            return math.inf
        oldest = [b.oldest_arrival_s for b in self._buckets.values() if b.windows]
        return min(oldest, default=math.inf) + self._policy.max_wait_s

    def _weigh(self, counts: Iterable[tuple[int, int]]) -> float:
        return sum(n * self._costs.window[length] for length, n in counts)
