"""The line before an engine, without an event loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.contract import Contract, Precision
from int8qa.gateway.choice import BatchCosts
from int8qa.gateway.line import Policy, WaitingLine, derive_policy
from int8qa.settings import BatcherSettings
from tests.records import make_model_record

CONTRACT = Contract(
    build_id="test",
    checkpoint="test",
    tokenizer_sha256="0" * 64,
    pad_token_id=0,
    inputs=("input_ids", "attention_mask"),
    max_window_tokens=128,
    sequence_buckets=(32, 64, 128),
    batch_sizes=(1, 2, 4),
    max_batch_tokens=128,
    models={Precision.INT8: make_model_record()},
    batch_ms={
        Precision.INT8: {32: (5.0, 5.5, 6.0), 64: (5.5, 6.0), 128: (7.0,)},
    },
)
WAIT_S = 0.004
SETTINGS = BatcherSettings(max_wait_s=WAIT_S, max_in_flight=2)


@dataclass(eq=False)
class Asked:
    """A request."""

    arrival_s: float = 0.0


def test_costs_are_the_contracts() -> None:
    """Those measured for the precision; its padded tokens where none were."""
    policy = derive_policy(CONTRACT, Precision.INT8, SETTINGS)
    assert policy.costs.by_length == {
        32: {1: 5.0, 2: 5.5, 4: 6.0},
        64: {1: 5.5, 2: 6.0},
        128: {1: 7.0},
    }
    assert (policy.max_wait_s, policy.max_in_flight) == (WAIT_S, 2)
    unmeasured = derive_policy(CONTRACT, Precision.FP16, SETTINGS).costs
    assert unmeasured.by_length == {
        32: {1: 32.0, 2: 64.0, 4: 128.0},
        64: {1: 64.0, 2: 128.0},
        128: {1: 128.0},
    }


@pytest.fixture
def line() -> WaitingLine[Asked]:
    """Before an engine whose time goes to calls."""
    return WaitingLine(derive_policy(CONTRACT, Precision.INT8, SETTINGS))


def test_lengths_share_a_batch_where_it_pays(line: WaitingLine[Asked]) -> None:
    """Each row names its request and its window there; the batch says what it costs."""
    first, second = Asked(), Asked()
    line.join(first, [64, 32])
    line.join(second, [32])
    batch = line.take(0.0, 0)
    assert batch is not None
    # Three windows are no legal batch.
    assert (batch.length, batch.work) == (64, 6.0)
    assert batch.rows == [(first, 0), (first, 1)]
    assert (line.windows, line.tokens) == (1, 32)


def test_a_merged_batch_is_full_when_none_larger_is_legal(
    line: WaitingLine[Asked],
) -> None:
    """A busy engine gets it at once, though no length fills a batch by itself."""
    line.join(Asked(1.0), [64])
    assert line.take(1.0, 1) is None
    line.join(Asked(1.001), [32])
    batch = line.take(1.001, 1)
    assert batch is not None
    assert (batch.length, len(batch.rows)) == (64, 2)


def test_nobody_waits_longer_than_agreed(line: WaitingLine[Asked]) -> None:
    """The alarm is the oldest window's; it goes when it rings."""
    line.join(Asked(1.0), [32])
    assert line.next_alarm_s(1) == 1.0 + WAIT_S
    assert line.next_alarm_s(2) == math.inf
    assert line.take(1.0 + WAIT_S / 2, 1) is None
    assert line.take(1.0 + WAIT_S, 2) is None
    assert line.take(1.0 + WAIT_S, 1) is not None
    assert line.next_alarm_s(1) == math.inf


def test_work_is_windows_at_their_best(line: WaitingLine[Asked]) -> None:
    """In the unit of the costs, so that an engine's pace turns it into time."""
    request = Asked()
    line.join(request, [32, 32, 128])
    assert line.work == pytest.approx(1.5 + 1.5 + 7.0)
    assert line.measure_work([64, 64]) == pytest.approx(6.0)
    assert line.measure_ahead(1) == (32 + 128, pytest.approx(8.5))
    assert line.leave(request) == 3
    assert line.work == 0
    assert line.leave(request) == 0


LENGTHS = st.lists(st.sampled_from([32, 64, 128]), min_size=1, max_size=9)
COSTS = st.lists(st.floats(0.1, 100), min_size=6, max_size=6)


@given(
    costs=COSTS,
    steps=st.lists(LENGTHS | st.integers(0, 2), max_size=30),
)
def test_every_window_leaves_once_in_a_legal_batch(
    costs: list[float], steps: list[list[int] | int]
) -> None:
    """For any costs, arrivals and returns; and whose turn it is, is in the batch."""
    times = iter(costs)
    table = {
        length: {size: next(times) for size in CONTRACT.list_batch_sizes(length)}
        for length in CONTRACT.sequence_buckets
    }
    line: WaitingLine[Asked] = WaitingLine(Policy(BatchCosts(table), WAIT_S, 2))
    lengths: dict[Asked, list[int]] = {}
    left: list[tuple[Asked, int]] = []

    def take(in_flight: int) -> bool:
        batch = line.take(0.0, in_flight)
        if batch is None:
            return False
        assert batch.work == table[batch.length][len(batch.rows)]
        assert batch.length == max(lengths[r][index] for r, index in batch.rows)
        waiting = [r for r in lengths if sum(r is x for x, _ in left) < len(lengths[r])]
        if in_flight == 0 and waiting and not any(r in waiting for r, _ in left):
            assert waiting[0] in {request for request, _ in batch.rows}
        left.extend(batch.rows)
        return True

    for step in steps:
        if isinstance(step, int):
            take(step)
        else:
            request = Asked()
            lengths[request] = step
            line.join(request, step)
    while take(0):
        pass
    expected = {(r, index) for r, own in lengths.items() for index in range(len(own))}
    assert set(left) == expected
    assert len(left) == len(expected)
    assert (line.windows, line.work) == (0, 0)
