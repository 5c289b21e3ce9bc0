"""What every batch costs an engine, from a few that are timed.

In: a contract with its legal batches, engines to time some of them with. Out: a time
for each legal batch, for the gateway to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from int8qa.build.accuracy import Infer
from int8qa.build.latency import Shape, name_shape, time_in_rounds
from int8qa.contract import Contract, Precision

TIMED_ROUNDS = 5
"""Rounds over all shapes: half a minute for a model of 22 million weights on two cores
of an AMD EPYC, and times whose ratios repeat to some 5 %."""

BatchMs = dict[Precision, dict[int, tuple[float, ...]]]
"""As ``Contract.batch_ms``."""


def time_batches(
    contract: Contract,
    engines: Mapping[str, Infer],
    *,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds by shape and engine, of ``choose_timed_shapes``.

    Args:
        contract: whose batches.
        engines: by precision.
        on_round: called after each of ``TIMED_ROUNDS``.
    """
    return time_in_rounds(
        engines,
        choose_timed_shapes(contract),
        contract.inputs,
        rounds=TIMED_ROUNDS,
        on_round=on_round,
    )


def choose_timed_shapes(contract: Contract) -> list[Shape]:
    """The batches to time: of each size the shortest, the longest, one between."""
    return [
        (size, length)
        for size in contract.batch_sizes
        for length in _choose_lengths(contract, size)
    ]


def tabulate_costs(
    contract: Contract, medians: Mapping[str, Mapping[str, float]]
) -> BatchMs:
    """A time for each legal batch.

    Between timed lengths a batch size's time follows a straight line: attention's
    share, which grows with the square, is too small for its bend to show (a chord from
    192 to 384 tokens is 2 % off where it is a third of the time at 384). No batch is
    cheaper than a smaller or shorter one: padding it would be as good.

    Args:
        contract: whose batches and models.
        medians: milliseconds by ``name_shape`` and precision, of all
            ``choose_timed_shapes``.
    """
    return {
        precision: _tabulate(
            contract,
            {shape: row[str(precision)] for shape, row in medians.items()},
        )
        for precision in contract.models
    }


def _tabulate(
    contract: Contract, median_ms: Mapping[str, float]
) -> dict[int, tuple[float, ...]]:
    times: dict[Shape, float] = {}
    for size in contract.batch_sizes:
        legal = _list_lengths(contract, size)
        timed = _choose_lengths(contract, size)
        known = [median_ms[name_shape((size, length))] for length in timed]
        for length, ms in zip(legal, np.interp(legal, timed, known), strict=True):
            times[size, length] = float(ms)
    table: dict[int, tuple[float, ...]] = {}
    floors: dict[int, float] = {}
    for length in contract.sequence_buckets:
        row: list[float] = []
        for size in contract.list_batch_sizes(length):
            ms = max(times[size, length], floors.get(size, 0.0), *row[-1:])
            floors[size] = ms
            row.append(round(ms, 3))
        table[length] = tuple(row)
    return table


def _list_lengths(contract: Contract, size: int) -> list[int]:
    return [
        length
        for length in contract.sequence_buckets
        if size in contract.list_batch_sizes(length)
    ]


def _choose_lengths(contract: Contract, size: int) -> list[int]:
    legal = _list_lengths(contract, size)
    chosen = (legal[0], legal[len(legal) // 2], legal[-1]) if legal else ()
    return list(dict.fromkeys(chosen))
