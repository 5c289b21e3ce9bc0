"""Batches that are timed stand for all: between them straight lines, never downwards."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.build.costs import choose_timed_shapes, tabulate_costs
from int8qa.build.latency import Shape, name_shape
from int8qa.contract import Contract, Precision
from tests.records import make_model_record

RECORD = make_model_record(engine="openvino")
CONTRACT = Contract(
    build_id="test",
    checkpoint="test",
    tokenizer_sha256="0" * 64,
    pad_token_id=0,
    inputs=("input_ids", "attention_mask"),
    max_window_tokens=192,
    sequence_buckets=(32, 64, 96, 128, 160, 192),
    batch_sizes=(1, 2, 4, 8),
    max_batch_tokens=512,
    models={Precision.INT8: RECORD, Precision.FP16: RECORD},
)


def test_few_shapes_are_timed() -> None:
    """Of each batch size the shortest, one between and the longest that is legal."""
    assert choose_timed_shapes(CONTRACT) == [
        *((1, 32), (1, 128), (1, 192)),
        *((2, 32), (2, 128), (2, 192)),
        *((4, 32), (4, 96), (4, 128)),
        *((8, 32), (8, 64)),
    ]


def test_a_batch_size_that_no_length_allows_is_passed_over() -> None:
    """Not even the shortest windows make such a batch."""
    contract = CONTRACT.model_copy(update={"max_batch_tokens": 64})
    assert {size for size, _ in choose_timed_shapes(contract)} == {1, 2}


def build_medians(times_ms: dict[Shape, float]) -> dict[str, dict[str, float]]:
    return {
        name_shape(shape): {"int8": ms, "fp16": 2 * ms}
        for shape, ms in times_ms.items()
    }


def test_straight_lines_between_timed_lengths() -> None:
    """Of one batch size; every precision has its own."""
    timed = {(b, s): 1.0 + 0.01 * b * s for b, s in choose_timed_shapes(CONTRACT)}
    table = tabulate_costs(CONTRACT, build_medians(timed))
    assert table.keys() == {Precision.INT8, Precision.FP16}
    assert table[Precision.INT8] == {
        s: pytest.approx([1 + 0.01 * b * s for b in CONTRACT.list_batch_sizes(s)])
        for s in CONTRACT.sequence_buckets
    }
    assert table[Precision.FP16][160] == pytest.approx((5.2, 8.4))


TIMES = st.lists(
    st.floats(0.01, 1e4),
    min_size=len(choose_timed_shapes(CONTRACT)),
    max_size=len(choose_timed_shapes(CONTRACT)),
)


@given(TIMES)
def test_the_contract_takes_any_table(values: list[float]) -> None:
    """However the times scatter: each legal batch, none cheaper than a smaller one."""
    timed = dict(zip(choose_timed_shapes(CONTRACT), values, strict=True))
    batch_ms = tabulate_costs(CONTRACT, build_medians(timed))
    Contract.model_validate(CONTRACT.model_dump() | {"batch_ms": batch_ms})
    table = batch_ms[Precision.INT8]
    for row in table.values():
        assert list(row) == sorted(row)
    for shorter, longer in itertools.pairwise(table.values()):
        assert all(a <= b for a, b in zip(shorter, longer, strict=False))
    for (size, length), ms in timed.items():
        sizes = CONTRACT.list_batch_sizes(length)
        assert table[length][sizes.index(size)] >= round(ms, 3)
