"""What a build writes down of itself, for people and for the next build.

In: recipes, records and figures of one build. Out: parts of ``manifest.json``, of JSON
types only. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from int8qa.build.accuracy import Accuracy, Answers, share_equal
from int8qa.build.latency import Latency
from int8qa.build.mixed import MixedPlan
from int8qa.build.quantization import Recipe
from int8qa.build.stored_ranges import StoredRanges
from int8qa.contract import Precision

MANIFEST_VERSION = 2


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every choice of a recipe, its rules in order."""
    return {
        "name": recipe.name,
        "weights": "per-channel" if recipe.per_channel else "per-tensor",
        "share_qkv": recipe.share_qkv,
        "unsigned_softmax": recipe.unsigned_softmax,
        "rules": [
            {
                "subject": rule.subject,
                "enable": rule.enable,
                "per_channel": rule.per_channel,
            }
            for rule in recipe.rules
        ],
    }


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """One engine of a repository, whichever kind it is."""

    execution: str
    """Types of its GEMMs in order of frequency."""
    gemms: Mapping[str, int]
    """By the types they run in."""
    size_bytes: int
    attentions: Mapping[str, int] = field(default_factory=dict)
    """Fused ones by type, of an engine that tells."""


def describe_models(
    engines: Mapping[Precision, ServedEngine],
    accuracies: Mapping[Precision, Accuracy],
    answers: Mapping[Precision, Answers],
) -> dict[str, Any]:
    """By served precision: accuracy, what it runs in, bytes."""
    return {
        str(precision): {
            "accuracy": asdict(accuracies[precision])
            | {
                "agreement_fp16": share_equal(
                    answers[precision], answers[Precision.FP16]
                )
            },
            "execution": engine.execution,
            "gemms": dict(engine.gemms),
            "attentions": dict(engine.attentions),
            "size_bytes": engine.size_bytes,
        }
        for precision, engine in engines.items()
    }


def describe_latencies(
    latencies: Mapping[str, Mapping[str, Latency]],
) -> dict[str, Any]:
    """Milliseconds and runs by shape and engine."""
    return {
        shape: {name: asdict(latency) for name, latency in by_name.items()}
        for shape, by_name in latencies.items()
    }


def describe_trained(trained: StoredRanges | None) -> dict[str, Any] | None:
    """Where the ranges came from; None if they were calibrated by this build."""
    if trained is None:
        return None
    return {
        "recipe": trained.recipe,
        "calibrator": trained.calibrator,
        "tensors": len(trained.ranges),
        "smoothed": len(trained.scales),
    }


def describe_mixed(
    mixed: MixedPlan | None, latency_ms: Mapping[str, Mapping[str, float]]
) -> dict[str, Any] | None:
    """What runs in float and what that costs in speed; None if nothing was mixed."""
    if mixed is None:
        return None
    speed = {
        shape: round(by_name["pure int8"] / by_name["int8"], 3)
        for shape, by_name in latency_ms.items()
        if "pure int8" in by_name
    }
    return {
        "moved": list(mixed.moved),
        "speed_of_pure_int8": speed,
        "steps": [asdict(step) for step in mixed.steps],
    }
