"""What a contestant's runs amount to: speed, latency, and whether its answers hold.

In: contestants that have run. Out: JSON-ready records. A request that failed counts as
no answer: it lowers questions/s and F1. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from int8qa.bench.peer_race import Entry, measure_percentile
from int8qa.bench.peers import REFERENCE
from int8qa.reader.squad import SquadQuestion, score_predictions

Json = Mapping[str, Any]


def summarize(
    entry: Entry, questions: Sequence[SquadQuestion], pins: Mapping[str, str]
) -> dict[str, Any]:
    """A contestant's row.

    Args:
        entry: with all its runs.
        questions: that were asked.
        pins: versions of its own environment.
    """
    contestant, runs = entry.contestant, entry.runs
    status = "measured" if entry.reason is None else "failed" if runs else "not run"
    row: dict[str, Any] = {
        "name": contestant.name,
        "group": contestant.group,
        "title": contestant.title,
        "precision": contestant.precision,
        "status": status,
        "reason": entry.reason,
        "versions": dict(pins),
        "variant": entry.variant.name if entry.variant else None,
        "concurrency": entry.concurrency if entry.variant else None,
        "tuning": entry.tuning,
        "runs": runs,
        "qps": None,
        "p50_ms": None,
        "p99_ms": None,
        "f1": None,
        "exact_match": None,
    }
    if not runs:
        return row
    latency = np.concatenate([outcome.latency_ms for outcome in entry.outcomes])
    # The worst round: who answers well once and badly once is not to be trusted.
    scores = min(
        (score_predictions(questions, outcome.answers) for outcome in entry.outcomes),
        key=lambda found: found.f1,
    )
    return row | {
        "qps": round(median(run["qps"] for run in runs), 3),
        "p50_ms": measure_percentile(latency, 50),
        "p99_ms": measure_percentile(latency, 99),
        "f1": round(scores.f1, 3),
        "exact_match": round(scores.exact, 3),
    }


def compare_rounds(result: Json, name: str, rival: str) -> float | None:
    """How many times as many questions/s ``name`` answers as ``rival``.

    Round against round, and the median of these: what slowed a round slowed both.

    Returns:
        None unless both were measured in the same rounds.
    """
    rates = {
        row["name"]: {run["round"]: run["qps"] for run in row["runs"]}
        for row in result["contestants"]
    }
    ours, theirs = rates.get(name, {}), rates.get(rival, {})
    ratios = [ours[n] / theirs[n] for n in ours if theirs.get(n)]
    return median(ratios) if ratios else None


def compare_reference(result: Json, name: str) -> float | None:
    """How many times as many questions/s int8qa answers in INT8 as ``name``."""
    return compare_rounds(result, REFERENCE, name)
