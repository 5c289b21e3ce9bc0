"""Which windows leave together: the batch that makes most of the engine's time.

In: how many windows wait by padded length, which length is at the head of the line,
what each legal batch costs. Out: one batch. Knows no requests, no time, no event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

WORTHWHILE_GAIN = 1.05
"""Least gain for which a batch is smaller or more mixed than another. Below it a
repeated timing may say otherwise: the build's verdict draws its line there as well."""


class BatchCosts:
    """What each legal batch takes of an engine's time, in any one unit.

    Args:
        costs: above 0, by padded length and legal batch size, both ascending.
    """

    def __init__(self, costs: Mapping[int, Mapping[int, float]]) -> None:
        self.by_length = costs
        self.largest = {length: max(sizes) for length, sizes in costs.items()}
        """Legal batch, by padded length."""
        self.window = {
            length: min(cost / size for size, cost in sizes.items())
            for length, sizes in costs.items()
        }
        """The share of one window in the best batch of its own length."""

    def measure_apart(self, takes: Mapping[int, int]) -> float:
        """What windows cost in batches of one length, the largest that they fill.

        Args:
            takes: windows by padded length.
        """
        total = 0.0
        for length, left in takes.items():
            count = left
            for size, cost in reversed(list(self.by_length[length].items())):
                total += count // size * cost
                count %= size
        return total


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch of B windows, padded to S."""

    length: int
    """S: that of the longest window."""
    takes: Mapping[int, int]
    """Windows by their own padded length, B together."""

    @property
    def size(self) -> int:
        """B."""
        return sum(self.takes.values())


def choose_batch(waiting: Mapping[int, int], head: int, costs: BatchCosts) -> Choice:
    """Choose the next batch; a window of the head's length is in it.

    A batch is as good as the windows in it would cost at their best, over what it
    costs itself. The largest batch of the head's length is taken, unless another is
    better by ``WORTHWHILE_GAIN``, and a further one better by as much again:

    - a smaller one, where large batches cost more by the window;
    - one with shorter windows in it, padded up, where a call costs more than padding;
    - one of longer windows with the head padded up, likewise, and only if the whole
      line would fit into it: behind a longer line it would overtake too many.

    Several lengths must also cost less together than apart, by as much. Where the cost
    is that of the padded tokens, none of these ever is.

    Args:
        waiting: windows by padded length, ascending, each 1 or more.
        head: the length whose turn it is.
        costs: of every legal batch.
    """
    size = max(b for b in costs.by_length[head] if b <= waiting[head])
    best = Choice(head, {head: size})
    best_gain = size * costs.window[head] / costs.by_length[head][size]
    line = sum(waiting.values())
    for longest in waiting:
        most = costs.largest[longest]
        if longest < head or (longest > head and line > most):
            continue
        rows = _line_up(waiting, head, longest, most)
        worths = list(accumulate(costs.window[length] for length in rows))
        for size, cost in reversed(list(costs.by_length[longest].items())):
            if size > len(rows) or longest not in rows[:size]:
                continue
            gain = worths[size - 1] / cost
            if gain <= WORTHWHILE_GAIN * best_gain:
                continue
            takes = Counter(rows[:size])
            apart = costs.measure_apart(takes)
            if len(takes) == 1 or apart > WORTHWHILE_GAIN * cost:
                best, best_gain = Choice(longest, takes), gain
    return best


def _line_up(
    waiting: Mapping[int, int], head: int, longest: int, most: int
) -> list[int]:
    """The lengths of the head and of those who may ride along, the longest first."""
    rows = [head]
    for length in reversed(waiting):
        if length <= longest and len(rows) < most:
            count = waiting[length] - (length == head)
            rows += [length] * min(count, most - len(rows))
    return rows
