"""Is INT8 worth it on this machine: one paragraph for people, one word for the gateway.

In: median latencies by shape and precision, accuracies by precision, the gate. Out: a
verdict. Measures nothing itself, and knows neither torch nor an engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from int8qa.build.accuracy import describe_share
from int8qa.build.latency import geometric_mean
from int8qa.errors import BuildError

WORTHWHILE_GAIN = 1.05
"""Least gain that is called one. Below it a repeated timing may say otherwise."""

_INT8 = "int8"
_FLOATS = ("fp16", "fp32")
_SHAPES_LISTED = 4
"""Up to so many shapes are named together; beyond it the paragraph is a table."""
_EVEN = 100
"""As fast, in hundredths."""


class MeasuredAccuracy(Protocol):
    """What is read of a precision's accuracy; ``accuracy.Accuracy`` is one."""

    @property
    def f1(self) -> float:
        """0 to 100."""

    @property
    def questions(self) -> int:
        """How many it was measured on."""

    @property
    def f1_ratio(self) -> float:
        """Share of FP32's F1."""

    @property
    def f1_ratio_margin(self) -> float:
        """What chance may add to or take from that share."""

    @property
    def agreement(self) -> float:
        """Share of answers equal to FP32's, 0-1."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a build recommends, and why."""

    recommended: str | None
    """The precision to serve by default: int8, fp16 or fp32; None: not known."""
    text: str
    """One paragraph for people."""
    speedup_fp16: dict[str, float]
    """FP16's milliseconds over INT8's, by shape."""
    speedup_best_float: dict[str, float]
    """The faster float's milliseconds over INT8's, by shape."""


def write_verdict(
    latency_ms: Mapping[str, Mapping[str, float]],
    accuracies: Mapping[str, MeasuredAccuracy],
    *,
    recipe: str,
    calibrator: str,
    device: str,
    gate: float,
) -> Verdict:
    """Recommend a default precision and say in one paragraph why.

    INT8 is recommended if it is worth it and not shown to be worse than allowed: the
    geometric mean over the shapes of its gain over the best float, which at each shape
    is the faster of FP16 and FP32, is at least 1.05; and its share of FP32's F1 plus
    the margin is not under the gate, as in ``accuracy.check_gate``. Otherwise it is
    the float with the least geometric mean of its latencies; FP16 if they tie. An F1
    of 0 in FP32 has no shares, so no gate is passed then.

    Ratios of speed are cut to hundredths before they are judged and shown, so that
    no gain is overstated and the text agrees with the ruling.

    Args:
        latency_ms: median milliseconds, above 0, by shape (``8x128``: batch by
            tokens) and by precision: int8, fp16 and fp32 at every shape.
        accuracies: by precision, those three, on the same questions.
        recipe: what was quantized, as the text shall name it.
        calibrator: how it was calibrated, likewise.
        device: the machine, likewise.
        gate: least share of FP32's F1, 0-1; 0 where there is no gate.

    Raises:
        BuildError: a figure is missing, not finite or out of its range.
    """
    speeds = _read_latencies(latency_ms)
    _check_accuracies(accuracies)
    if not (math.isfinite(gate) and 0 <= gate <= 1):
        raise BuildError(f"no verdict: the gate is {gate}; it is a share from 0 to 1")
    against_fp16 = {
        shape: times["fp16"] / times[_INT8] for shape, times in speeds.items()
    }
    against_best = {
        shape: min(times[name] for name in _FLOATS) / times[_INT8]
        for shape, times in speeds.items()
    }
    best_float = min(
        _FLOATS, key=lambda name: geometric_mean([t[name] for t in speeds.values()])
    )
    gain = _hundredths(geometric_mean(list(against_best.values())))
    int8 = accuracies[_INT8]
    fast = gain >= _hundredths(WORTHWHILE_GAIN)
    comparable = not gate or accuracies["fp32"].f1 > 0
    exact = comparable and not int8.f1_ratio + int8.f1_ratio_margin < gate
    recommended = _INT8 if fast and exact else best_float
    sentences = [
        _describe_fp16(
            against_fp16, int8=f"INT8 ({recipe}, {calibrator})", device=device
        ),
        _describe_fp32(speeds),
        _describe_cost(accuracies),
        _describe_choice(recommended, gain, accuracies, gate, fast=fast, exact=exact),
        _describe_caution(int8, gate),
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    return Verdict(recommended, text, against_fp16, against_best)


def write_unmeasured_verdict(
    accuracies: Mapping[str, MeasuredAccuracy],
    *,
    recipe: str,
    calibrator: str,
    target: str,
    device: str,
    gate: float,
) -> Verdict:
    """What can be said of engines that were built and not run: nothing of speed.

    Args:
        accuracies: by precision, int8, fp16 and fp32, of the same graphs elsewhere.
        recipe: what was quantized, as the text shall name it.
        calibrator: how it was calibrated, likewise.
        target: engine and machine that the engines are for, likewise.
        device: where the accuracies were measured.
        gate: least share of FP32's F1, 0-1; 0 where there is no gate.

    Raises:
        BuildError: a figure is missing or not finite.
    """
    _check_accuracies(accuracies)
    int8 = accuracies[_INT8]
    opening = (
        f"INT8 ({recipe}, {calibrator}) and FP16 are built for {target} and were not "
        f"run: no speed was measured here, so none is recommended. Accuracy is that of "
        f"the same graphs on {' '.join(device.split())}, evidence for the graphs and "
        f"not for the kernels."
    )
    sentences = [
        opening,
        _describe_cost(accuracies).replace("It ", "INT8 ", 1),
        _describe_caution(int8, gate),
        "Measure where it will run: `int8qa evaluate`, or precision `both`.",
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    return Verdict(None, text, {}, {})


# Figures.


def _read_latencies(
    latency_ms: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    if not latency_ms:
        raise BuildError("no verdict: no shape was timed; time one at least")
    speeds: dict[str, dict[str, float]] = {}
    for shape, by_precision in latency_ms.items():
        times = {str(name): float(value) for name, value in by_precision.items()}
        for name in (_INT8, *_FLOATS):
            if name not in times:
                raise BuildError(
                    f"no verdict: {name} was not timed at {shape}; time all three "
                    f"precisions at every shape"
                )
            if not (math.isfinite(times[name]) and times[name] > 0):
                raise BuildError(
                    f"no verdict: {name} took {times[name]} ms at {shape}; a latency "
                    f"is finite and above 0. Time it again"
                )
        speeds[shape] = times
    return speeds


def _check_accuracies(accuracies: Mapping[str, MeasuredAccuracy]) -> None:
    for name in (_INT8, *_FLOATS):
        if name not in accuracies:
            raise BuildError(
                f"no verdict: {name} was not evaluated; evaluate all three precisions"
            )
        measured = accuracies[name]
        for field in ("f1", "questions", "f1_ratio", "f1_ratio_margin", "agreement"):
            value = getattr(measured, field)
            if not (math.isfinite(value) and value >= 0):
                raise BuildError(
                    f"no verdict: {field} of {name} is {value}; it is finite and not "
                    f"below 0. Evaluate again"
                )


def _hundredths(ratio: float) -> int:
    """``ratio`` in hundredths, cut; a hair is added for what binary cannot hold."""
    return math.floor(ratio * 100 + 1e-9)


# Words.


def _describe_fp16(ratios: Mapping[str, float], *, int8: str, device: str) -> str:
    machine = " ".join(device.split()) or "this machine"
    gains = _describe_gains(ratios, rival="FP16")
    return f"On {machine}, {int8} is {gains}, batch × tokens."


def _describe_fp32(speeds: Mapping[str, Mapping[str, float]]) -> str:
    """Held against FP32 where that is the faster float; empty where it nowhere is."""
    ratios = {
        shape: times["fp32"] / times[_INT8]
        for shape, times in speeds.items()
        if times["fp32"] < times["fp16"]
    }
    if not ratios:
        return ""
    gains = _describe_gains(ratios, rival="it")
    return f"Where FP32 is the faster float, INT8 is {gains}."


def _describe_gains(ratios: Mapping[str, float], *, rival: str) -> str:
    """Where INT8 gains, where hardly, where it loses."""
    groups: dict[str, dict[str, float]] = {
        "faster": {},
        "under 5 % faster": {},
        "slower": {},
    }
    for shape, ratio in ratios.items():
        gain = _hundredths(ratio)
        if gain >= _hundredths(WORTHWHILE_GAIN):
            groups["faster"][shape] = ratio
        elif gain >= _EVEN:
            groups["under 5 % faster"][shape] = ratio
        else:
            groups["slower"][shape] = ratio
    found = [(words, group) for words, group in groups.items() if group]
    return ", ".join(
        f"{words}{'' if later else f' than {rival}'} at {_describe_group(group)}"
        for later, (words, group) in enumerate(found)
    )


def _describe_group(ratios: Mapping[str, float]) -> str:
    named = [
        f"{shape.replace('x', '×')} ({_show_ratio(ratio)})"
        for shape, ratio in ratios.items()
    ]
    if len(named) > _SHAPES_LISTED:
        lowest, highest = min(ratios.values()), max(ratios.values())
        return f"{len(named)} shapes ({_show_ratio(lowest)} to {_show_ratio(highest)})"
    return " and ".join(part for part in (", ".join(named[:-1]), named[-1]) if part)


def _show_ratio(ratio: float) -> str:
    return f"{_hundredths(ratio) / 100:.2f}×"


def _describe_cost(accuracies: Mapping[str, MeasuredAccuracy]) -> str:
    int8, fp16, fp32 = (accuracies[name] for name in (_INT8, *_FLOATS))
    if not fp32.f1:
        return (
            f"FP32 answers none of the {fp32.questions} questions right, so what INT8 "
            f"costs is unknown."
        )
    points = round(fp32.f1, 2) - round(int8.f1, 2)
    if abs(points) < 0.005:
        opening = f"It costs no F1 ({int8.f1:.2f})"
    else:
        opening = (
            f"It {'costs' if points > 0 else 'gains'} {abs(points):.2f} points of F1 "
            f"({int8.f1:.2f}; FP32 {fp32.f1:.2f})"
        )
    share = describe_share(int8.f1_ratio, int8.f1_ratio_margin)
    different = _count_different(int8)
    return (
        f"{opening}, keeping {share}; {different} of {int8.questions} answers differ "
        f"from FP32's (FP16's: {_count_different(fp16)})."
    )


def _count_different(measured: MeasuredAccuracy) -> int:
    return round((1 - measured.agreement) * measured.questions)


def _describe_choice(
    recommended: str,
    gain: int,
    accuracies: Mapping[str, MeasuredAccuracy],
    gate: float,
    *,
    fast: bool,
    exact: bool,
) -> str:
    opening = f"Recommended default: {recommended.upper()}"
    average = f"{gain / 100:.2f}× the best float on average"
    limit = f"the {100 * gate:g} % gate"
    if fast and exact:
        if not gate:
            ruling = "no gate was set on F1"
        elif accuracies[_INT8].f1_ratio < gate:
            ruling = f"F1 is under {limit}, but within chance"
        else:
            ruling = f"F1 passes {limit}"
        return f"{opening}, {average}; {ruling}."
    reasons = []
    if not fast:
        reasons.append(f"is {average}, where {WORTHWHILE_GAIN}× would pay")
    if not exact and not accuracies["fp32"].f1:
        reasons.append(f"cannot be held to {limit}")
    elif not exact:
        reasons.append(f"misses {limit} beyond chance")
    return f"{opening}, the faster float: INT8 {', and '.join(reasons)}."


def _describe_caution(int8: MeasuredAccuracy, gate: float) -> str:
    if not int8.f1_ratio_margin > 1 - gate:
        return ""
    return (
        f"Caution: on {int8.questions} questions that margin exceeds the "
        f"{100 * (1 - gate):.3g} % the gate allows to lose."
    )
