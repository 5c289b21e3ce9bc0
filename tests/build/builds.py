"""What a build is told, and what it leaves behind, made up for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from int8qa.build.options import BuildOptions
from int8qa.build.pipeline import BuildOutcome

VERDICT = "On CPU, INT8 is what it is."


def change_options(options: BuildOptions, **change: Any) -> BuildOptions:
    """``options`` with some replaced, those of its sources by their own names."""
    sources = {
        name: change.pop(name)
        for name in list(change)
        if hasattr(options.sources, name)
    }
    replaced = dataclasses.replace(options.sources, **sources)
    return dataclasses.replace(options, sources=replaced, **change)


def make_outcome(*, cached: bool) -> BuildOutcome:
    """The least that the closing tables need, with a name beyond ASCII."""
    accuracy = {
        "f1": 75.0,
        "exact_match": 60.0,
        "f1_ratio": 1.0,
        "f1_ratio_margin": 0.004,
        "agreement": 1.0,
        "max_logit_deviation": 0.0,
    }
    model = {"accuracy": accuracy, "execution": "i8", "size_bytes": 10**6}
    manifest = {
        "checkpoint": {"name": "acme/lesé"},
        "device": "CPU",
        "latency_ms": {"1x128": {"int8": 1.0}},
        "models": {"int8": model},
        "remarks": [],
        "mixed": None,
        "verdict": VERDICT,
    }
    contract: Any = None
    return BuildOutcome(contract, manifest, cached=cached)
