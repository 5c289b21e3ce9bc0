"""The order of a whole run, fixed before it begins.

In: the lengths of all windows, the file of each, a seed. Out: the windows of every
step of every epoch. As the list depends on nothing else, a resumed run goes on at
exactly the next step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

POOL_BATCHES = 50
"""Batches that are sorted by length together: enough that neighbours are of like
length, and few enough that a batch is not the same one in every epoch."""


def plan_steps(
    lengths: Sequence[int],
    groups: Sequence[int],
    *,
    batch: int,
    epochs: float,
    seed: int,
    keep_order: bool = False,
) -> list[list[int]]:
    """Indices of windows, step by step; each epoch uses every window once.

    Args:
        lengths: in tokens, by window.
        groups: number of the file, by window.
        batch: windows a step; the last step of a pool may have fewer.
        epochs: 1.5 ends in the middle of the second.
        seed: the same seed gives the same order.
        keep_order: every epoch goes from the first file to the last.
    """
    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        draw = random.Random(f"{seed}/{epoch}")  # noqa: S311
        for number in sorted(set(groups)) if keep_order else [None]:
            indices = [
                index
                for index, group in enumerate(groups)
                if number is None or group == number
            ]
            steps += _bucket(indices, lengths, batch, draw)
    whole = math.ceil(epochs)
    return steps[: max(1, round(len(steps) * epochs / whole))]


def _bucket(
    indices: list[int], lengths: Sequence[int], batch: int, draw: random.Random
) -> list[list[int]]:
    draw.shuffle(indices)
    steps = []
    for low in range(0, len(indices), batch * POOL_BATCHES):
        pool = indices[low : low + batch * POOL_BATCHES]
        pool.sort(key=lambda index: lengths[index])
        steps += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    draw.shuffle(steps)
    return steps
