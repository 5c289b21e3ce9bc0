"""The choice of a batch, for engines whose time goes to tokens, to calls, or neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.gateway.choice import WORTHWHILE_GAIN, BatchCosts, Choice, choose_batch

LENGTHS = (32, 64, 128, 384)
SIZES = (1, 2, 4, 8)


def make_costs(cost: Callable[[int, int], float], budget: int = 10_000) -> BatchCosts:
    return BatchCosts(
        {
            length: {
                b: cost(b, length) for b in SIZES if b == 1 or b * length <= budget
            }
            for length in LENGTHS
        }
    )


BY_TOKENS = make_costs(lambda b, s: b * s)
BY_CALLS = make_costs(lambda b, s: 10_000 + b * s)
STEEP = make_costs(lambda b, s: b * s * (1.5 if b == 8 else 1.0))
"""A large batch falls out of a cache."""

LINES = st.dictionaries(st.sampled_from(LENGTHS), st.integers(1, 300), min_size=1).map(
    lambda line: dict(sorted(line.items()))
)
ENGINES = st.sampled_from([BY_TOKENS, BY_CALLS, STEEP]) | st.lists(
    st.floats(0.01, 1e4), min_size=16, max_size=16
).map(
    lambda times: make_costs(lambda b, s: times[4 * SIZES.index(b) + LENGTHS.index(s)])
)


@given(line=LINES, costs=ENGINES, data=st.data())
def test_a_choice_is_legal_and_has_the_head_in_it(
    line: dict[int, int], costs: BatchCosts, data: st.DataObject
) -> None:
    """Whatever the costs: only windows that wait, none longer than the batch."""
    head = data.draw(st.sampled_from(list(line)))
    choice = choose_batch(line, head, costs)
    assert choice.takes[head] >= 1
    assert choice.size in costs.by_length[choice.length]
    assert max(choice.takes) == choice.length
    assert all(1 <= count <= line[length] for length, count in choice.takes.items())


@given(line=LINES, data=st.data())
def test_where_tokens_cost_batches_are_of_one_length(
    line: dict[int, int], data: st.DataObject
) -> None:
    """And the largest that the head's own length fills: padding gains nothing."""
    head = data.draw(st.sampled_from(list(line)))
    size = max(b for b in SIZES if b <= line[head])
    assert choose_batch(line, head, BY_TOKENS) == Choice(head, {head: size})


def test_where_calls_cost_a_short_line_goes_at_once() -> None:
    """All together, whoever is at the head."""
    line = {32: 1, 64: 1, 128: 2}
    for head in line:
        assert choose_batch(line, head, BY_CALLS) == Choice(128, line)


def test_the_head_is_padded_no_further_than_pays() -> None:
    """A call saved is worth so much padding and no more."""
    line = {32: 3, 384: 1}
    cheap = make_costs(lambda b, s: 10 + b * s)
    assert choose_batch(line, 32, cheap) == Choice(32, {32: 2})
    assert choose_batch(line, 32, BY_CALLS) == Choice(384, line)


def test_behind_a_long_line_the_head_is_not_padded() -> None:
    """Longer windows that came later would overtake; shorter ones may ride along."""
    line = {32: 4, 64: 3, 128: 2}
    assert choose_batch(line, 64, BY_CALLS) == Choice(64, {64: 3, 32: 1})
    assert choose_batch(line, 128, BY_CALLS) == Choice(128, {128: 2, 64: 3, 32: 3})


def test_a_smaller_batch_where_a_large_one_is_slow() -> None:
    """By the window; eight that wait go four by four."""
    assert choose_batch({64: 9}, 64, STEEP) == Choice(64, {64: 4})
    assert choose_batch({64: 3}, 64, STEEP) == Choice(64, {64: 2})


@pytest.mark.parametrize(("margin", "size"), [(0.99, 8), (1.01, 4)])
def test_what_a_timing_cannot_tell_changes_nothing(margin: float, size: int) -> None:
    """A gain below the least worthwhile one is noise."""
    slow = WORTHWHILE_GAIN * margin
    costs = make_costs(lambda b, s: b * s * (slow if b == 8 else 1.0))
    assert choose_batch({64: 8}, 64, costs).size == size


@given(line=LINES, data=st.data(), scale=st.floats(1e-6, 1e6))
def test_costs_have_no_unit(
    line: dict[int, int], data: st.DataObject, scale: float
) -> None:
    """Milliseconds, seconds or tokens: only ratios count."""
    head = data.draw(st.sampled_from(list(line)))
    engine = data.draw(st.sampled_from([BY_TOKENS, BY_CALLS, STEEP]))
    scaled = make_costs(lambda b, s: scale * engine.by_length[s][b])
    assert choose_batch(line, head, scaled) == choose_batch(line, head, engine)


def test_a_lone_window_is_not_padded_up() -> None:
    """Even where a longer one happened to be timed faster."""
    costs = make_costs(lambda b, s: 100.0 if s == 32 else 1.0)
    assert choose_batch({32: 1, 64: 1}, 32, costs) == Choice(64, {32: 1, 64: 1})
    assert choose_batch({32: 1}, 32, costs) == Choice(32, {32: 1})


def test_together_must_cost_less_than_apart() -> None:
    """However much better than the head alone the batch would use the engine.

    Short windows gain much by company of their own length, long ones nothing: the long
    one would lend its efficiency, and the padding would cost more than the call.
    """
    costs = BatchCosts(
        {
            128: {1: 330.0, 2: 604.0, 4: 1144.0, 8: 1638.0},
            192: {1: 463.0, 2: 852.0, 4: 1681.0},
        }
    )
    assert costs.measure_apart({128: 1, 192: 1}) == 793.0
    assert costs.measure_apart({128: 11, 192: 3}) == 1638 + 604 + 330 + 852 + 463
    assert choose_batch({128: 1, 192: 1}, 128, costs) == Choice(128, {128: 1})


def test_the_budget_of_tokens_holds() -> None:
    """A long window has no company where two are not legal."""
    costs = make_costs(lambda b, s: 10_000 + b * s, budget=512)
    assert choose_batch({32: 2, 384: 1}, 384, costs) == Choice(384, {384: 1})
    assert choose_batch({32: 2, 128: 1}, 32, costs).size == 2
