"""Mixed precision gives up as little speed as it takes, and says what it tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.build.accuracy import Accuracy
from int8qa.build.mixed import MixedPlan, MixedStep, find_mixed_plan, rank_units
from int8qa.build.quantization import Plan
from int8qa.build.range_search import LogitProbe
from int8qa.build.sites import Site, TensorClass
from int8qa.build.units import Unit, split_units
from int8qa.errors import AccuracyGateError
from int8qa.reader.windows import Window
from tests.build.tiny import calibrate_reader, make_gemm_layers

MOST_UNITS = 40


def make_accuracy(ratio: float) -> Accuracy:
    return Accuracy(
        f1=80.0 * ratio,
        exact_match=70.0,
        questions=200,
        f1_ratio=ratio,
        f1_ratio_margin=0.05,  # wide: chance would excuse much, and must not
        agreement=ratio / 2,
        max_logit_deviation=0.5,
        rms_logit_error=0.1,
    )


def make_plan(sites: Sequence[Site]) -> Plan:
    return Plan("own", tuple(sites), {site.name: site.is_weight for site in sites})


def make_layers(count: int) -> tuple[Plan, list[Unit]]:
    """One GEMM per layer, each a unit; the units in an order that is not theirs."""
    plan = make_gemm_layers(count)
    return plan, split_units(plan)[::-1]


class Meter:
    """Measures a plan by how many of its units are in float, and keeps count."""

    def __init__(self, ranked: Sequence[Unit], ratios: Sequence[float]) -> None:
        self.ranked = ranked
        self.ratios = ratios
        self.measured: list[int] = []

    def __call__(self, plan: Plan) -> Accuracy:
        in_float = [unit for unit in self.ranked if not unit.sites & plan.names]
        assert in_float == list(self.ranked[: len(in_float)])
        self.measured.append(len(in_float))
        return make_accuracy(self.ratios[len(in_float)])


def search(
    ratios: Sequence[float], gate: float, advice: Sequence[str] = ()
) -> tuple[MixedPlan, Meter, list[MixedStep], Plan]:
    """Search over as many units as there are ratios."""
    plan, ranked = make_layers(len(ratios))
    meter = Meter(ranked, ratios)
    steps: list[MixedStep] = []
    found = find_mixed_plan(
        plan,
        ranked,
        meter,
        gate=gate,
        start=make_accuracy(ratios[0]),
        advice=advice,
        on_step=steps.append,
    )
    return found, meter, steps, plan


shares = st.floats(0.0, 1.0)
rising = st.lists(shares, min_size=1, max_size=MOST_UNITS).map(sorted)


@given(ratios=rising, gate=shares)
def test_fewest_units_that_pass(ratios: list[float], gate: float) -> None:
    """Where more float never hurts, the answer is that of trying every number."""
    fewest = next((n for n, ratio in enumerate(ratios) if ratio >= gate), None)
    if fewest is None:
        with pytest.raises(AccuracyGateError):
            search(ratios, gate)
        return
    found, meter, steps, plan = search(ratios, gate)
    assert len(found.moved) == fewest
    assert found.moved == tuple(unit.name for unit in meter.ranked[:fewest])
    gone = frozenset().union(*(unit.sites for unit in meter.ranked[:fewest]))
    assert found.plan.names == plan.names - gone
    assert found.accuracy == make_accuracy(ratios[fewest])
    # Nothing twice, the start not at all, and far fewer than all.
    assert len(set(meter.measured)) == len(meter.measured)
    assert 0 not in meter.measured
    assert len(meter.measured) <= 2 * len(ratios).bit_length()
    assert list(found.steps) == steps
    assert [step.units_in_float for step in steps] == meter.measured


@given(ratios=st.lists(shares, min_size=1, max_size=MOST_UNITS), gate=shares)
def test_result_passes_and_one_less_does_not(ratios: list[float], gate: float) -> None:
    """However accuracy jumps about, the plan passes as measured, and is no idle step."""
    try:
        found, meter, _, _ = search(ratios, gate)
    except AccuracyGateError:
        assert ratios[-1] < gate
        return
    assert found.accuracy.f1_ratio >= gate
    if found.moved:
        assert ratios[len(found.moved) - 1] < gate
        assert len(found.moved) - 1 in {0, *meter.measured}


def test_steps() -> None:
    """Doubling until it passes, then halving; each step as it was measured."""
    ratios = [0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.99, 0.995, 1.0, 1.0]
    found, meter, steps, _ = search(ratios, 0.99)
    assert meter.measured == [1, 2, 4, 8, 6, 5]
    assert len(found.moved) == 6
    assert steps[3] == MixedStep(
        units_in_float=8, added="layer 2 ffn_in", f1_ratio=1.0, agreement=0.5
    )
    assert steps[-1].added == "layer 5 ffn_in"


def test_passing_start_moves_nothing() -> None:
    """At the gate is through it; nothing is measured, nothing is given up."""
    found, meter, steps, plan = search([0.99, 1.0, 1.0], 0.99)
    assert found.plan.names == plan.names
    assert found.moved == ()
    assert found.accuracy == make_accuracy(0.99)
    assert not meter.measured
    assert not steps


def test_unreachable_gate() -> None:
    """One unit stays in INT8; the message has what was reached at best."""
    with pytest.raises(
        AccuracyGateError,
        match=r"even with 4 of 5 units in float the model keeps 97\.50 % of FP32's F1 "
        r"at best; the gate asks for 99\.9 %",
    ):
        search([0.95, 0.975, 0.96, 0.96, 0.97], 0.999)


def test_unreachable_gate_says_what_to_try() -> None:
    """As the gate of a pure INT8 model: three things, and what would let it pass."""
    with pytest.raises(AccuracyGateError) as caught:
        search([0.95, 0.975], 0.99, ["--one", "--two", "--three", "--four"])
    message = str(caught.value)
    assert message.endswith(
        "Next: --one; --two; --three; --gate 0.974 if this loss is acceptable"
    )


def test_single_unit() -> None:
    """A model of one GEMM cannot be mixed."""
    with pytest.raises(AccuracyGateError, match=r"0 of 1 units .* 90\.00 %"):
        search([0.9], 0.99)


def site_pair(
    kinds: tuple[TensorClass, TensorClass], name: str, macs: int
) -> list[Site]:
    return [
        Site(f"{name}.input_quantizer", kinds[0], 0, 0),
        Site(f"{name}.weight_quantizer", kinds[1], 0, -1, macs),
    ]


QKV = site_pair((TensorClass.QKV_INPUT, TensorClass.QKV_WEIGHT), "qkv", 3072)
OUTPUT = site_pair(
    (TensorClass.CONTEXT, TensorClass.ATTENTION_OUTPUT_WEIGHT), "output", 1024
)
FFN_IN = site_pair((TensorClass.FFN_IN_INPUT, TensorClass.FFN_IN_WEIGHT), "in", 4096)
SCORES = [
    Site("q_bmm_quantizer", TensorClass.QUERY, 0, 1),
    Site("k_bmm_quantizer", TensorClass.KEY, 0, 2),
]
ADD = [
    Site("output.output_quantizer", TensorClass.ATTENTION_OUTPUT, 0, 3),
    Site("norm.output_quantizer", TensorClass.ATTENTION_RESIDUAL, 0, 4),
]


class FakeProbe:
    """A probe whose errors are given by the name of a unit's first module."""

    def __init__(self, errors: Mapping[frozenset[str], float]) -> None:
        self.errors = errors
        self.asked: list[dict[str, Any]] = []

    def measure(self, ranges: Mapping[str, Any]) -> float:
        self.asked.append(dict(ranges))
        return self.errors[frozenset(ranges)]


def rank(
    errors: Sequence[tuple[list[Site], float]],
) -> tuple[list[tuple[str, float]], FakeProbe]:
    """Kernels in the order found, with their errors."""
    plan = make_plan([site for sites, _ in errors for site in sites])
    probe = FakeProbe(
        {frozenset(site.name for site in sites): error for sites, error in errors}
    )
    ranges = {site.name: float(index + 1) for index, site in enumerate(plan.sites)}
    ticks = itertools.count()
    found = rank_units(
        cast("LogitProbe", probe), plan, ranges, on_unit=lambda: (next(ticks), None)[1]
    )
    assert next(ticks) == len(errors)
    # Each unit with its own ranges, and with all of them.
    assert sorted((k, v) for one in probe.asked for k, v in one.items()) == sorted(
        ranges.items()
    )
    return [(str(unit.kernel), error) for unit, error in found], probe


def test_error_per_work() -> None:
    """Twice the error is worth four times the multiply-accumulates."""
    # 0.2² / 3072 < 0.15² / 1024 < 0.31² / 4096
    found, _ = rank([(QKV, 0.2), (OUTPUT, 0.15), (FFN_IN, 0.31)])
    assert found == [("ffn_in", 0.31), ("attention_output", 0.15), ("qkv", 0.2)]
    found, _ = rank([(QKV, 0.2), (OUTPUT, 0.15), (FFN_IN, 0.29)])
    assert found == [("attention_output", 0.15), ("ffn_in", 0.29), ("qkv", 0.2)]


def test_what_has_no_weights_costs_too() -> None:
    """Of equal errors an add goes first; attention's GEMMs cost as the long ones."""
    # Of hidden size 32: at 128 tokens 32 · 128 for the scores, as many as FFN_IN.
    for error, last in ((0.101, ["ffn_in", "scores"]), (0.099, ["scores", "ffn_in"])):
        found, _ = rank(
            [(QKV, 0.1), (OUTPUT, 0.1), (SCORES, 0.1), (FFN_IN, error), (ADD, 0.1)]
        )
        assert [kernel for kernel, _ in found] == [
            "attention_add",
            "attention_output",
            "qkv",
            *last,
        ]


@pytest.mark.parametrize("output", [[], OUTPUT[:1]], ids=["none", "no weight"])
def test_recipe_without_attention_output(output: list[Site]) -> None:
    """Work is then weighed by another GEMM; attention's GEMMs do not become cheap."""
    others = [(output, 0.0)] if output else []
    found, _ = rank([(SCORES, 0.1), *others, (FFN_IN, 0.1), (QKV, 0.1), (ADD, 0.1)])
    assert [kernel for kernel, error in found if error] == [
        "attention_add",
        "qkv",
        "ffn_in",
        "scores",
    ]


def test_unit_without_error_goes_last() -> None:
    """There is nothing to win by moving it."""
    found, _ = rank([(ADD, 0.0), (QKV, 0.01), (FFN_IN, 0.0)])
    assert found[0] == ("qkv", 0.01)


def test_ranking_of_a_reader(windows: list[Window]) -> None:
    """A real reader's units are all there, each with an error of its own."""
    source = calibrate_reader("bert", windows, "full")
    reader = source.reader.wrapped
    probe = LogitProbe(reader, windows, source.plan, source.reader.inputs)
    ticks: list[None] = []
    tick: Callable[[], None] = lambda: ticks.append(None)  # noqa: E731
    found = rank_units(probe, source.plan, source.ranges, on_unit=tick)
    expected = {unit.name: unit for unit in split_units(source.plan)}
    assert {unit.name: unit for unit, _ in found} == expected
    assert len(ticks) == len(found) == 16
    assert all(error > 0 for _, error in found)
    again = dict((unit.name, error) for unit, error in found)  # noqa: C402
    name = found[0][0].name
    assert again[name] == probe.measure(
        {site: source.ranges[site] for site in expected[name].sites}
    )
