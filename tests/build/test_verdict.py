"""The verdict: its ruling, its figures, its words, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.build.accuracy import Accuracy, check_gate
from int8qa.build.verdict import Verdict, write_unmeasured_verdict, write_verdict
from int8qa.contract import Precision
from int8qa.errors import AccuracyGateError, BuildError

FP32 = Accuracy(
    f1=75.43,
    exact_match=60.0,
    questions=200,
    f1_ratio=1.0,
    f1_ratio_margin=0.0,
    agreement=1.0,
    max_logit_deviation=0.0,
    rms_logit_error=0.0,
)
FP16 = replace(FP32, agreement=0.995)
INT8 = replace(
    FP32, f1=75.32, f1_ratio=75.32 / 75.43, f1_ratio_margin=0.004, agreement=0.955
)
FAST = {
    "1x128": {"int8": 6.6, "fp16": 19.0, "fp32": 20.0},
    "1x384": {"int8": 20.0, "fp16": 51.0, "fp32": 60.0},
    "8x128": {"int8": 50.0, "fp16": 140.0, "fp32": 200.0},
}


def judge(
    latency_ms: dict[str, dict[str, float]] | None = None,
    *,
    gate: float = 0.99,
    device: str = "Test CPU",
    **accuracies: Accuracy,
) -> Verdict:
    return write_verdict(
        FAST if latency_ms is None else latency_ms,
        {"int8": INT8, "fp16": FP16, "fp32": FP32, **accuracies},
        recipe="linear",
        calibrator="percentile-99.999",
        device=device,
        gate=gate,
    )


def one_shape(int8: float, fp16: float, fp32: float) -> dict[str, dict[str, float]]:
    return {"1x128": {"int8": int8, "fp16": fp16, "fp32": fp32}}


def test_int8_wins() -> None:
    """The whole paragraph where INT8 is faster everywhere and accurate."""
    verdict = judge()
    assert verdict.recommended == "int8"
    assert verdict.text == (
        "On Test CPU, INT8 (linear, percentile-99.999) is faster than FP16 at 1×128 "
        "(2.87×), 1×384 (2.55×) and 8×128 (2.80×), batch × tokens. It costs 0.11 "
        "points of F1 (75.32; FP32 75.43), keeping 99.85 ± 0.40 %; 9 of 200 answers "
        "differ from FP32's (FP16's: 1). Recommended default: INT8, 2.73× the best "
        "float on average; F1 passes the 99 % gate."
    )
    assert verdict.speedup_fp16 == pytest.approx(
        {"1x128": 19 / 6.6, "1x384": 2.55, "8x128": 2.8}
    )
    assert verdict.speedup_best_float == verdict.speedup_fp16


def test_weak_shapes_and_a_faster_fp32() -> None:
    """Where INT8 loses or hardly gains is named, against both floats."""
    verdict = judge(
        {
            "1x128": {"int8": 10.0, "fp16": 30.0, "fp32": 40.0},
            "1x384": {"int8": 20.0, "fp16": 19.0, "fp32": 18.0},
            "8x128": {"int8": 50.0, "fp16": 52.0, "fp32": 51.0},
        }
    )
    assert (
        "is faster than FP16 at 1×128 (3.00×), under 5 % faster at 8×128 (1.04×), "
        "slower at 1×384 (0.95×), batch × tokens."
    ) in verdict.text
    assert (
        "Where FP32 is the faster float, INT8 is under 5 % faster than it at 8×128 "
        "(1.02×), slower at 1×384 (0.90×)."
    ) in verdict.text
    assert verdict.speedup_best_float == pytest.approx(
        {"1x128": 3.0, "1x384": 0.9, "8x128": 1.02}
    )
    assert "Recommended default: INT8, 1.40× the best float" in verdict.text


@pytest.mark.parametrize(
    ("latency_ms", "recommended"),
    [
        (one_shape(10.0, 10.5, 12.0), "int8"),
        (one_shape(10.0, 10.49, 12.0), "fp16"),
        (one_shape(10.0, 10.0, 10.0), "fp16"),
        (one_shape(10.0, 30.0, 10.4), "fp32"),
        (one_shape(10.0, 8.0, 30.0), "fp16"),
    ],
)
def test_least_gain(latency_ms: dict[str, dict[str, float]], recommended: str) -> None:
    """1.05 over the best float is worth it; below it the faster float is served."""
    verdict = judge(latency_ms)
    assert verdict.recommended == recommended
    assert f"Recommended default: {recommended.upper()}" in verdict.text
    assert ("where 1.05× would pay" in verdict.text) == (recommended != "int8")


def test_shapes_count_alike() -> None:
    """Gains are averaged as ratios, and floats ranked so, not by total milliseconds."""
    latency_ms = {
        "1x32": {"int8": 1.0, "fp16": 0.5, "fp32": 0.9},
        "8x384": {"int8": 1000.0, "fp16": 1200.0, "fp32": 1100.0},
    }
    verdict = judge(latency_ms)
    assert sum(times["fp16"] for times in latency_ms.values()) > sum(
        times["fp32"] for times in latency_ms.values()
    )
    assert verdict.recommended == "fp16"
    assert "INT8 is 0.74× the best float on average" in verdict.text


@pytest.mark.parametrize(
    ("ratio", "margin", "gate", "ending"),
    [
        (0.995, 0.002, 0.99, "F1 passes the 99 % gate."),
        (0.985, 0.009, 0.99, "F1 is under the 99 % gate, but within chance."),
        (0.5, 0.0, 0.0, "no gate was set on F1."),
        (0.985, 0.002, 0.99, "INT8 misses the 99 % gate beyond chance."),
        (0.9985, 0.0, 0.999, "INT8 misses the 99.9 % gate beyond chance."),
    ],
)
def test_gate(ratio: float, margin: float, gate: float, ending: str) -> None:
    """INT8 is recommended exactly where the build's own gate lets it pass."""
    int8 = replace(INT8, f1=75.43 * ratio, f1_ratio=ratio, f1_ratio_margin=margin)
    verdict = judge(gate=gate, int8=int8)
    assert verdict.text.endswith(ending)
    passes = True
    try:
        check_gate(int8, gate=gate)
    except AccuracyGateError:
        passes = False
    assert (verdict.recommended == "int8") == passes


def test_slow_and_wrong() -> None:
    """Both reasons against INT8 are given."""
    int8 = replace(INT8, f1=70.0, f1_ratio=0.928, f1_ratio_margin=0.002)
    assert judge(one_shape(10.0, 9.0, 9.5), int8=int8).text.endswith(
        "Recommended default: FP16, the faster float: INT8 is 0.90× the best float on "
        "average, where 1.05× would pay, and misses the 99 % gate beyond chance."
    )


@pytest.mark.parametrize(
    ("margin", "gate", "warned"),
    [
        (0.011, 0.99, "Caution: on 200 questions that margin exceeds the 1 % the gate"),
        (0.009, 0.99, None),
        (0.002, 0.999, "Caution: on 200 questions that margin exceeds the 0.1 %"),
        (0.5, 0.0, None),
    ],
)
def test_caution(margin: float, gate: float, warned: str | None) -> None:
    """A margin wider than the loss allowed decides little, and that is said once."""
    text = judge(gate=gate, int8=replace(INT8, f1_ratio_margin=margin)).text
    assert text.count("Caution") == (warned is not None)
    assert warned is None or warned in text


@pytest.mark.parametrize(
    ("f1", "words"),
    [
        (75.43, "It costs no F1 (75.43), keeping 100.00 ± 0.40 %;"),
        (75.53, "It gains 0.10 points of F1 (75.53; FP32 75.43), keeping 100.13 ± "),
        (74.43, "It costs 1.00 points of F1 (74.43; FP32 75.43), keeping 98.67 ± "),
    ],
)
def test_cost(f1: float, words: str) -> None:
    """The difference in points has its sign in words."""
    assert words in judge(int8=replace(INT8, f1=f1, f1_ratio=f1 / 75.43)).text


@pytest.mark.parametrize(("gate", "recommended"), [(0.99, "fp16"), (0.0, "int8")])
def test_nothing_right(gate: float, recommended: str) -> None:
    """Where FP32 answers nothing right no share is claimed and no gate is passed."""
    none = replace(FP32, f1=0.0)
    verdict = judge(gate=gate, int8=none, fp16=none, fp32=none)
    assert "FP32 answers none of the 200 questions right" in verdict.text
    assert "keeping" not in verdict.text
    assert "passes" not in verdict.text
    assert verdict.recommended == recommended


def test_no_gain_is_overstated() -> None:
    """Ratios are cut, not rounded: 1.0499 is not shown as the 1.05 that it is not."""
    text = judge(one_shape(100.0, 104.99, 200.0)).text
    assert "under 5 % faster than FP16 at 1×128 (1.04×)" in text
    assert "INT8 is 1.04× the best float" in text


def test_many_shapes() -> None:
    """A whole grid is told in ranges."""
    grid = {
        f"{batch}x{length}": {"int8": 10.0, "fp16": 20.0 + batch, "fp32": 40.0}
        for batch in (1, 2, 4, 8)
        for length in (64, 128)
    }
    assert "is faster than FP16 at 8 shapes (2.10× to 2.80×), batch" in judge(grid).text


def test_precisions_as_keys() -> None:
    """The members of ``Precision`` are as good as their names."""
    accuracies: Any = {
        Precision.INT8: INT8,
        Precision.FP16: FP16,
        Precision.FP32: FP32,
    }
    latency_ms: Any = {
        shape: {Precision(name): value for name, value in times.items()}
        for shape, times in FAST.items()
    }
    verdict = write_verdict(
        latency_ms, accuracies, recipe="full", calibrator="mse", device="", gate=0.99
    )
    assert verdict.text.startswith("On this machine, INT8 (full, mse) is faster")


def test_length() -> None:
    """Some ninety words where there is something to say; never much more."""
    device = "Intel(R) Xeon(R) Processor @ 2.80GHz"
    int8 = replace(INT8, f1_ratio_margin=0.011)
    assert len(judge(device=device, int8=int8).text.split()) <= 90
    worst = {
        "1x128": {"int8": 6.6, "fp16": 19.0, "fp32": 18.0},
        "1x384": {"int8": 20.0, "fp16": 19.0, "fp32": 18.5},
        "8x128": {"int8": 50.0, "fp16": 52.0, "fp32": 51.0},
    }
    int8 = replace(INT8, f1=74.1, f1_ratio=0.982, f1_ratio_margin=0.015)
    assert len(judge(worst, device=device, int8=int8).text.split()) <= 115


@given(
    st.lists(st.tuples(*[st.floats(0.01, 1e4)] * 3), min_size=1, max_size=12),
    st.floats(0, 1.2),
    st.floats(0, 0.2),
    st.floats(0, 1),
)
def test_ruling_and_words_agree(
    times: list[tuple[float, float, float]], ratio: float, margin: float, gate: float
) -> None:
    """Whatever was measured, the text recommends what the field does."""
    latency_ms = {
        f"{row + 1}x128": {"int8": int8, "fp16": fp16, "fp32": fp32}
        for row, (int8, fp16, fp32) in enumerate(times)
    }
    int8 = replace(INT8, f1=75.43 * ratio, f1_ratio=ratio, f1_ratio_margin=margin)
    verdict = judge(latency_ms, gate=gate, int8=int8)
    gain = math.prod(
        value ** (1 / len(times)) for value in verdict.speedup_best_float.values()
    )
    assert f"Recommended default: {verdict.recommended.upper()}" in verdict.text
    if gain < 1.05 * (1 - 1e-9) or ratio + margin < gate:
        assert verdict.recommended in {"fp16", "fp32"}
    elif gain > 1.05 * (1 + 1e-9):
        assert verdict.recommended == "int8"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_bad_latency(precision: str, bad: float) -> None:
    """A time that is none is refused, with precision and shape."""
    latency_ms = {**FAST, "4x64": {**FAST["1x128"], precision: bad}}
    with pytest.raises(BuildError, match=f"{precision} took .* ms at 4x64"):
        judge(latency_ms)


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_missing_figures(precision: str) -> None:
    """Every precision is timed at every shape, and evaluated."""
    times = {name: ms for name, ms in FAST["1x128"].items() if name != precision}
    with pytest.raises(BuildError, match=f"{precision} was not timed at 4x64"):
        judge({**FAST, "4x64": times})
    accuracies = {"int8": INT8, "fp16": FP16, "fp32": FP32}
    del accuracies[precision]
    with pytest.raises(BuildError, match=f"{precision} was not evaluated"):
        write_verdict(FAST, accuracies, recipe="", calibrator="", device="", gate=0.99)
    with pytest.raises(BuildError, match="no shape was timed"):
        judge({})


@pytest.mark.parametrize("field", ["f1", "f1_ratio", "f1_ratio_margin", "agreement"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_bad_accuracy(field: str, bad: float) -> None:
    """An accuracy that is none is refused by its name."""
    changes: dict[str, Any] = {field: bad}
    with pytest.raises(BuildError, match=f"{field} of int8 is"):
        judge(int8=replace(INT8, **changes))


@pytest.mark.parametrize("gate", [math.nan, -0.1, 1.1])
def test_bad_gate(gate: float) -> None:
    """A gate is a share."""
    with pytest.raises(BuildError, match="the gate is"):
        judge(gate=gate)


def judge_unmeasured(**accuracies: Accuracy) -> Verdict:
    return write_unmeasured_verdict(
        {"int8": INT8, "fp16": FP16, "fp32": FP32, **accuracies},
        recipe="full",
        calibrator="max",
        target="tensorrt-rtx 1.7.1 on sm80, sm89",
        device="Test\n CPU",
        gate=0.99,
    )


def test_engines_that_were_not_run() -> None:
    """Nothing is recommended; what was measured where is told apart."""
    verdict = judge_unmeasured()
    assert verdict == Verdict(None, verdict.text, {}, {})
    assert verdict.text == (
        "INT8 (full, max) and FP16 are built for tensorrt-rtx 1.7.1 on sm80, sm89 and "
        "were not run: no speed was measured here, so none is recommended. Accuracy is "
        "that of the same graphs on Test CPU, evidence for the graphs and not for the "
        "kernels. INT8 costs 0.11 points of F1 (75.32; FP32 75.43), keeping "
        "99.85 ± 0.40 %; 9 of 200 answers differ from FP32's (FP16's: 1). Measure "
        "where it will run: `int8qa evaluate`, or precision `both`."
    )
    few = judge_unmeasured(int8=replace(INT8, f1_ratio_margin=0.02))
    assert "Caution: on 200 questions" in few.text
    with pytest.raises(BuildError, match="f1 of int8 is nan"):
        judge_unmeasured(int8=replace(INT8, f1=math.nan))
