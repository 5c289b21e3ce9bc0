"""The order of a run: complete, of like lengths, and the same for the same seed."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from int8qa.training.order import POOL_BATCHES, plan_steps

WINDOWS = st.lists(
    st.tuples(st.integers(5, 384), st.integers(0, 3)), min_size=1, max_size=200
)


@given(
    WINDOWS,
    st.integers(1, 17),
    st.integers(1, 3),
    st.integers(0, 9),
    st.booleans(),
)
def test_each_epoch_uses_each_window_once(
    windows: list[tuple[int, int]],
    batch: int,
    epochs: int,
    seed: int,
    keep_order: bool,
) -> None:
    """No window is left out and none comes twice, in batches no larger than asked."""
    lengths, groups = zip(*windows, strict=True)
    steps = plan_steps(
        lengths, groups, batch=batch, epochs=epochs, seed=seed, keep_order=keep_order
    )
    assert max(map(len, steps)) <= batch
    assert min(map(len, steps)) >= 1
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(index for step in part for index in step) == Counter(
            range(len(windows))
        )
        if keep_order:
            files = [{groups[index] for index in step} for step in part]
            assert all(len(one) == 1 for one in files)
            in_turn = [one.pop() for one in files]
            assert in_turn == sorted(in_turn)


@given(WINDOWS, st.floats(0.01, 3.0), st.integers(0, 2**32 - 1))
def test_same_seed_same_order(
    windows: list[tuple[int, int]], epochs: float, seed: int
) -> None:
    """It depends on nothing else; a part of an epoch is the beginning of it."""
    lengths, groups = zip(*windows, strict=True)
    steps = plan_steps(lengths, groups, batch=4, epochs=epochs, seed=seed)
    assert steps == plan_steps(lengths, groups, batch=4, epochs=epochs, seed=seed)
    whole = plan_steps(lengths, groups, batch=4, epochs=math.ceil(epochs), seed=seed)
    assert steps == whole[: len(steps)]
    assert len(steps) == max(1, round(len(whole) * epochs / math.ceil(epochs)))


def test_epochs_and_seeds_differ() -> None:
    """Neither the order nor the company of a window is the same again."""
    lengths, groups = [20 + n % 7 for n in range(64)], [0] * 64
    steps = plan_steps(lengths, groups, batch=4, epochs=2, seed=0)
    assert steps[:16] != steps[16:]
    assert steps != plan_steps(lengths, groups, batch=4, epochs=2, seed=1)


def test_batches_are_of_like_length() -> None:
    """Within a pool no batch overlaps another in length."""
    count = 4 * POOL_BATCHES
    lengths = [(n * 37) % 300 + 10 for n in range(count)]
    steps = plan_steps(lengths, [0] * count, batch=4, epochs=1, seed=3)
    spans = sorted(
        (min(s), max(s)) for s in ([lengths[i] for i in step] for step in steps)
    )
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))
    # … and yet the short ones do not come first.
    firsts = [lengths[step[0]] for step in steps]
    assert firsts != sorted(firsts)
