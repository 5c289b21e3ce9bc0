"""Predictions held against what LoadGen measured.

In: the Server tests of ``int8qa bench gateway``, and the services that stand for their
precisions. Out: a row for each test: measured, predicted, the error. Calibrates
nothing: no test that is held against has any part in a prediction. The light one has,
and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from int8qa.planning.search import COUNT, predict
from int8qa.planning.simulation import Service
from int8qa.planning.traffic import Question

Json = Mapping[str, Any]

SATURATED = 0.03
"""Share of time after the last arrival from which on questions came faster than they
were answered: latency then says how long the test ran, not how fast the service is."""
PERCENTILES = ("p50", "p99")


def validate(
    runs: Sequence[Json],
    services: Mapping[str, Service],
    questions: Sequence[Question],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Predict every Server test at its own rate and length.

    Args:
        runs: of a result of ``int8qa bench gateway``.
        services: by precision; tests of others are left out.
        questions: the ones that were asked.
        seed: of the simulations.

    Returns:
        Rows by precision and rate. ``skipped`` says why a test has no prediction.
        ``spread`` are the lowest and the highest percentile among simulations as long
        as the test: how far chance alone carries a measurement.
    """
    rows = []
    tests = (
        run
        for run in runs
        if run["scenario"] == "Server"
        and run["precision"] in services
        and not run.get("light")
    )
    for run in sorted(tests, key=lambda run: (run["precision"], run["target_qps"])):
        row: dict[str, Any] = {
            "precision": run["precision"],
            "rate_qps": run["target_qps"],
            "queries": run["queries"],
            "skipped": None,
        }
        rows.append(row)
        if run["failures"] or not run["latency_ms"]:
            row["skipped"] = "requests failed, or LoadGen gave no latency"
            continue
        found = predict(
            services[run["precision"]],
            questions,
            run["target_qps"],
            seed=seed,
            count=max(run["queries"], COUNT // 10),
        )
        row["utilisation"] = round(found.utilisation, 4)
        if found.overrun > SATURATED:
            row["skipped"] = "saturated: the queue grows as long as the test runs"
            continue
        for name in PERCENTILES:
            measured_ms = run["latency_ms"][name]
            interval = getattr(found, name)
            row[name] = {
                "measured_ms": measured_ms,
                "predicted_ms": round(interval.ms, 3),
                "margin_ms": round(interval.margin_ms, 3),
                "spread_ms": [round(interval.low_ms, 3), round(interval.high_ms, 3)],
                "error": round(interval.ms / measured_ms - 1, 4),
            }
    return rows


def write_verdict(rows: Sequence[Json]) -> str:
    """The largest errors in a sentence."""
    compared = [row for row in rows if row["skipped"] is None]
    if not compared:
        return "Not validated: no Server test to hold the predictions against."
    worst = {
        name: max((row[name]["error"] for row in compared), key=abs)
        for name in PERCENTILES
    }
    return (
        f"Held against {len(compared)} Server tests, the predicted median is off by "
        f"{100 * worst['p50']:+.1f} % at most and the 99th percentile by "
        f"{100 * worst['p99']:+.1f} %."
    )
