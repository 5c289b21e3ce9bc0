"""The batcher's policy without its event loop: which windows leave together, and when.

In: requests as the padded lengths of their windows; the time; how many batches are
out. Out: the next batch, or when to ask again. It mirrors ``gateway/batcher.py``, whose
policy lives among tasks and futures; a test drives both with the same arrivals and
holds the batches of one to those of the other. Knows neither engines nor SimPy.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from int8qa.contract import Contract
from int8qa.planning.traffic import Question
from int8qa.settings import BatcherSettings


@dataclass(frozen=True, slots=True)
class Policy:
    """What the batcher decides by."""

    batch_sizes: Mapping[int, tuple[int, ...]]
    """Legal batch sizes by padded length, both ascending."""
    max_wait_s: float
    max_in_flight: int


def derive_policy(contract: Contract, settings: BatcherSettings) -> Policy:
    """The gateway's, with this contract and these settings."""
    budget = contract.max_batch_tokens
    return Policy(
        batch_sizes={
            length: tuple(
                size
                for size in contract.batch_sizes
                if size == 1 or size * length <= budget
            )
            for length in contract.sequence_buckets
        },
        max_wait_s=settings.max_wait_s,
        max_in_flight=settings.max_in_flight,
    )


@dataclass(eq=False, slots=True)
class Request:
    """A question on its way."""

    number: int
    """Its place among the arrivals."""
    question: Question
    arrival_s: float
    waiting: int = 0
    """Windows without an answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one padded length that leave together."""

    length: int
    requests: tuple[Request, ...]
    """One for each window; a request with several windows may come more than once."""


class _Bucket:
    """Waiting windows of one padded length; a request gives one per turn."""

    def __init__(self, length: int, sizes: tuple[int, ...]) -> None:
        self.length = length
        self.windows = 0
        self._sizes = sizes
        self._lanes: OrderedDict[Request, int] = OrderedDict()  # windows, by arrival
        self._turns: OrderedDict[Request, int] = OrderedDict()  # by turn

    @property
    def is_full(self) -> bool:
        return self.windows >= self._sizes[-1]

    @property
    def next_turn(self) -> int:
        return next(iter(self._turns.values()))

    @property
    def oldest_arrival_s(self) -> float:
        return next(iter(self._lanes)).arrival_s

    def join(self, request: Request, windows: int, turn: int) -> None:
        self._lanes[request] = windows
        self._turns[request] = turn
        self.windows += windows

    def take(self, turns: Iterator[int]) -> Batch:
        rows = []
        for _ in range(max(size for size in self._sizes if size <= self.windows)):
            request, _turn = self._turns.popitem(last=False)
            rows.append(request)
            self._lanes[request] -= 1
            if self._lanes[request]:
                self._turns[request] = next(turns)
            else:
                del self._lanes[request]
        self.windows -= len(rows)
        return Batch(self.length, tuple(rows))


class BatchQueue:
    """The queue of one precision in one gateway."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._buckets = {
            length: _Bucket(length, sizes)
            for length, sizes in policy.batch_sizes.items()
        }
        self._turns = itertools.count()

    def join(self, request: Request) -> None:
        """Queue all windows of a request."""
        request.waiting = len(request.question)
        for length, windows in Counter(request.question).items():
            self._buckets[length].join(request, windows, next(self._turns))

    def take(self, now_s: float, in_flight: int) -> Batch | None:
        """Remove what leaves now; None if nothing does.

        Args:
            now_s: on the clock of the requests' arrivals.
            in_flight: batches out.
        """
        if in_flight >= self._policy.max_in_flight:
            return None
        wait_s = self._policy.max_wait_s
        ready = [
            bucket
            for bucket in self._buckets.values()
            if bucket.windows
            and (
                not in_flight
                or bucket.is_full
                or bucket.oldest_arrival_s + wait_s <= now_s
            )
        ]
        if not ready:
            return None
        return min(ready, key=lambda bucket: bucket.next_turn).take(self._turns)

    def next_alarm_s(self, in_flight: int) -> float:
        """When a waiting window has waited long enough; infinite if none will."""
        if in_flight >= self._policy.max_in_flight:
            return math.inf
        oldest = [b.oldest_arrival_s for b in self._buckets.values() if b.windows]
        return min(oldest, default=math.inf) + self._policy.max_wait_s
