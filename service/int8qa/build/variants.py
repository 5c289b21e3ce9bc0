"""Quantizations side by side: what was measured of each, and which is best.

In: accuracies and latencies by recipe and calibrator. Out: records, the Pareto front,
the choice among them, and all of it as JSON. Measures nothing, knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8qa.build.accuracy import Accuracy
from int8qa.build.latency import Latency, mean_gain

NEARLY_AS_FAST = 0.95
"""A variant this near to the fastest counts as fast as it: less is noise."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One INT8 quantization of a reader, as it was measured."""

    recipe: str
    calibrator: str
    smooth: bool
    accuracy: Accuracy
    agreement_fp16: float
    """Share of answers equal to FP16's, 0-1."""
    latency: Mapping[str, Mapping[str, Latency]]
    """By shape: ``int8``, and ``fp16`` in turns with it."""
    size_bytes: int
    execution: str
    quantized_gemms: int
    passes_gate: bool

    @property
    def label(self) -> str:
        """How it was calibrated, for people."""
        return self.calibrator + (" + SmoothQuant" if self.smooth else "")

    @property
    def gain(self) -> float:
        """Speed against FP16: the geometric mean over the shapes."""
        return mean_gain(self.latency, "int8")

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        return {
            "recipe": self.recipe,
            "calibrator": self.calibrator,
            "smooth": self.smooth,
        }


def find_pareto(
    variants: Sequence[Variant], floats: Iterable[tuple[float, float]]
) -> list[bool]:
    """Of each variant: whether none, floats included, is both faster and better.

    Args:
        variants: measured on the same questions.
        floats: gain and share of FP32's F1 of FP32 and FP16.
    """
    own = [(one.gain, one.accuracy.f1_ratio) for one in variants]
    points = [*own, *floats]
    return [
        not any(
            (other_gain >= gain and other_ratio > ratio)
            or (other_gain > gain and other_ratio >= ratio)
            for other_gain, other_ratio in points
        )
        for gain, ratio in own
    ]


def choose_best(variants: Sequence[Variant]) -> Variant:
    """Of the variants nearly as fast as the fastest that passes: the truest.

    By the logits' error, not by F1: between good variants F1 differs by chance.
    """
    passing = [one for one in variants if one.passes_gate] or list(variants)
    fastest = max(one.gain for one in passing)
    fast = [one for one in passing if one.gain >= NEARLY_AS_FAST * fastest]
    return min(fast, key=lambda one: one.accuracy.rms_logit_error)


def describe_variant(variant: Variant, *, pareto: bool) -> dict[str, Any]:
    """A variant as the result of a comparison has it."""
    accuracy = variant.accuracy
    return {
        **variant.key,
        "label": variant.label,
        "f1": accuracy.f1,
        "exact_match": accuracy.exact_match,
        "f1_ratio": accuracy.f1_ratio,
        "f1_ratio_margin": accuracy.f1_ratio_margin,
        "rms_logit_error": accuracy.rms_logit_error,
        "max_logit_deviation": accuracy.max_logit_deviation,
        "agreement_fp32": accuracy.agreement,
        "agreement_fp16": variant.agreement_fp16,
        "latency_ms": {
            shape: {
                "p50": by_name["int8"].p50_ms,
                "p99": by_name["int8"].p99_ms,
                "p50_fp16": by_name["fp16"].p50_ms,
                "runs": by_name["int8"].runs,
            }
            for shape, by_name in variant.latency.items()
        },
        "size_bytes": variant.size_bytes,
        "execution": variant.execution,
        "quantized_gemms": variant.quantized_gemms,
        "passes_gate": variant.passes_gate,
        "pareto": pareto,
    }
