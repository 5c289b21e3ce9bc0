"""Mixed precision: the most sensitive kernels back to float, as few as it takes.

In: a plan whose INT8 model loses more than the gate allows, and a way to measure what
a smaller plan keeps. Out: the plan that passes with the least speed given up, and every
step on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from int8qa.build.accuracy import Accuracy, list_steps
from int8qa.build.calibration import Ranges
from int8qa.build.quantization import Plan
from int8qa.build.range_search import LogitProbe
from int8qa.build.units import Unit, split_units
from int8qa.errors import AccuracyGateError

REFERENCE_TOKENS = 128
"""Window length at which attention's GEMMs are weighed against the others."""


@dataclass(frozen=True, slots=True)
class MixedStep:
    """One plan that was measured."""

    units_in_float: int
    added: str
    """The last unit moved."""
    f1_ratio: float
    agreement: float


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """The outcome of the search."""

    plan: Plan
    moved: tuple[str, ...]
    """Units that run in float, the most sensitive first; empty if none had to."""
    accuracy: Accuracy
    steps: tuple[MixedStep, ...]


def rank_units(
    probe: LogitProbe,
    plan: Plan,
    ranges: Ranges,
    *,
    on_unit: Callable[[], None] = lambda: None,
) -> list[tuple[Unit, float]]:
    """Units with the logit error each causes alone, the best to move first.

    First comes what takes away most squared error per multiply-accumulate that then
    runs in float: errors of different layers add up in squares as far as they are
    independent, and time goes with the multiply-accumulates.

    Args:
        probe: see range_search.
        plan: what is quantized.
        ranges: ``amax`` of each of its sites.
        on_unit: called after each unit.
    """
    units = split_units(plan)
    square = [u.macs_per_token for u in units if u.kernel == "attention_output"]
    # A recipe may leave that GEMM's weight out; the others are a few times larger.
    work = max(square, default=0) or max((u.macs_per_token for u in units), default=0)
    hidden = max(work, 1) ** 0.5
    found = []
    for unit in units:
        error = probe.measure({name: ranges[name] for name in unit.sites})
        found.append((unit, error))
        on_unit()

    def gain(entry: tuple[Unit, float]) -> float:
        unit, error = entry
        cost = unit.macs_per_token
        if unit.kernel in {"scores", "context"}:
            cost = int(hidden * REFERENCE_TOKENS)
        return float(error * error / max(cost, hidden))

    return sorted(found, key=gain, reverse=True)


def find_mixed_plan(
    plan: Plan,
    ranked: Sequence[Unit],
    measure: Callable[[Plan], Accuracy],
    *,
    gate: float,
    start: Accuracy,
    advice: Sequence[str] = (),
    on_step: Callable[[MixedStep], None] = lambda _step: None,
) -> MixedPlan:
    """Move units to float, in order, until the measured share reaches the gate.

    The number of units doubles until a plan passes, then the smallest passing number
    below it is found by halving: measuring is what takes time. Chance is given no
    benefit here: the share itself has to reach the gate, not its upper bound.

    Args:
        plan: fully quantized.
        ranked: its units, the best to move first.
        measure: accuracy of a plan.
        gate: least share of float32's F1.
        start: accuracy of ``plan`` itself.
        advice: what could be tried next, the most promising first.
        on_step: called with each plan measured.

    Raises:
        AccuracyGateError: even with all but one unit in float the gate is not reached.
    """
    steps: list[MixedStep] = []
    known: dict[int, Accuracy] = {0: start}

    def passes(count: int) -> bool:
        if count not in known:
            known[count] = measure(_leave(plan, ranked, count))
            step = MixedStep(
                units_in_float=count,
                added=ranked[count - 1].name,
                f1_ratio=known[count].f1_ratio,
                agreement=known[count].agreement,
            )
            steps.append(step)
            on_step(step)
        return known[count].f1_ratio >= gate

    low, high = 0, 0
    if not passes(0):
        most = len(ranked) - 1
        high = min(1, most)
        while high and not passes(high) and high < most:
            low, high = high, min(2 * high, most)
        if not high or not passes(high):
            best = max(known.values(), key=lambda accuracy: accuracy.f1_ratio)
            raise AccuracyGateError(
                f"even with {high} of {len(ranked)} units in float the model keeps "
                f"{100 * best.f1_ratio:.2f} % of FP32's F1 at best; the gate asks for "
                f"{100 * gate:g} %. {list_steps(advice, best.f1_ratio)}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            if passes(middle):
                high = middle
            else:
                low = middle
    return MixedPlan(
        plan=_leave(plan, ranked, high),
        moved=tuple(unit.name for unit in ranked[:high]),
        accuracy=known[high],
        steps=tuple(steps),
    )


def _leave(plan: Plan, ranked: Sequence[Unit], count: int) -> Plan:
    gone: frozenset[str] = frozenset().union(*(unit.sites for unit in ranked[:count]))
    return plan.without(gone)
