"""Of what was measured: the gain, the front, the best, and the JSON of it."""

from __future__ import annotations

from typing import Any

import pytest

from int8qa.build.accuracy import Accuracy
from int8qa.build.latency import Latency
from int8qa.build.variants import Variant, choose_best, describe_variant, find_pareto


def make_variant(
    name: str,
    gain: float,
    error: float = 0.1,
    *,
    ratio: float = 1.0,
    passes: bool = True,
    **change: Any,
) -> Variant:
    """A variant called by its recipe."""
    times = {
        "int8": Latency(p50_ms=10.0 / gain, p99_ms=11.0 / gain, runs=7),
        "fp16": Latency(p50_ms=10.0, p99_ms=11.0, runs=7),
    }
    parts: dict[str, Any] = {
        "recipe": name,
        "calibrator": "max",
        "smooth": False,
        "accuracy": Accuracy(
            f1=80.0 * ratio,
            exact_match=70.0,
            questions=200,
            f1_ratio=ratio,
            f1_ratio_margin=0.01,
            agreement=0.9,
            max_logit_deviation=2.0,
            rms_logit_error=error,
        ),
        "agreement_fp16": 0.91,
        "latency": {"1x32": times, "2x32": times},
        "size_bytes": 1000,
        "execution": "i8",
        "quantized_gemms": 12,
        "passes_gate": passes,
    }
    return Variant(**parts | change)


@pytest.mark.parametrize(
    ("variants", "best"),
    [
        # As fast within the noise: the one with the least error.
        ([("a", 3.0, 0.3), ("b", 2.9, 0.1), ("c", 2.0, 0.0)], "b"),
        # Faster by more than that counts more than a smaller error.
        ([("a", 3.0, 0.3), ("b", 2.8, 0.1)], "a"),
    ],
)
def test_best(variants: list[tuple[str, float, float]], best: str) -> None:
    """Of the variants nearly as fast as the fastest, the truest."""
    assert choose_best([make_variant(*one) for one in variants]).recipe == best


def test_best_passes_the_gate_if_any_does() -> None:
    """A fast variant that fails is not the best, unless all fail."""
    failing = make_variant("fast", 4.0, 0.5, passes=False)
    assert choose_best([failing, make_variant("slow", 2.0, 0.4)]).recipe == "slow"
    assert choose_best([failing]).recipe == "fast"


def test_gain() -> None:
    """The geometric mean over the shapes of the speed against FP16."""
    latency = {
        "1x32": {"int8": Latency(5.0, 9.0, 7), "fp16": Latency(10.0, 90.0, 7)},
        "2x32": {"int8": Latency(2.0, 9.0, 7), "fp16": Latency(16.0, 90.0, 7)},
    }
    assert make_variant("a", 1.0, latency=latency).gain == pytest.approx(4.0)


def test_pareto() -> None:
    """Beaten is who is slower and no better, or worse and no faster; equals are not."""
    variants = [
        make_variant("fast", 4.0, ratio=0.98),
        make_variant("equal", 4.0, ratio=0.98),
        make_variant("slower", 3.0, ratio=0.98),
        make_variant("worse", 4.0, ratio=0.97),
        make_variant("true", 2.0, ratio=1.0),
        make_variant("like a float", 1.0, ratio=1.0),
    ]
    assert find_pareto(variants, []) == [True, True, False, False, True, False]
    # A float that is as fast and better takes the front from what it beats.
    assert find_pareto(variants, [(4.0, 0.99)]) == [False] * 4 + [True, False]
    assert find_pareto([make_variant("a", 1.0)], [(1.0, 1.0)]) == [True]


def test_description() -> None:
    """Every figure under its own name; which is on the front is the caller's to say."""
    variant = make_variant("full", 2.0, 0.2, ratio=0.99, smooth=True)
    times = {"p50": 5.0, "p99": 5.5, "p50_fp16": 10.0, "runs": 7}
    assert describe_variant(variant, pareto=True) == {
        "recipe": "full",
        "calibrator": "max",
        "smooth": True,
        "label": "max + SmoothQuant",
        "f1": 80.0 * 0.99,
        "exact_match": 70.0,
        "f1_ratio": 0.99,
        "f1_ratio_margin": 0.01,
        "rms_logit_error": 0.2,
        "max_logit_deviation": 2.0,
        "agreement_fp32": 0.9,
        "agreement_fp16": 0.91,
        "latency_ms": {"1x32": times, "2x32": times},
        "size_bytes": 1000,
        "execution": "i8",
        "quantized_gemms": 12,
        "passes_gate": True,
        "pareto": True,
    }
    assert variant.key == {"recipe": "full", "calibrator": "max", "smooth": True}
    assert make_variant("full", 2.0).label == "max"
