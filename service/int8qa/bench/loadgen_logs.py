"""LoadGen's own logs of a test, read.

In: the directory of a finished test. Out: its verdict, its figures and each query's
latency as LoadGen counts it: from the moment a query was due, not from when it was
sent, so that a load generator that lags cannot flatter the service. Judges nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DETAIL_FILENAME = "mlperf_log_detail.txt"
TRACE_FILENAME = "mlperf_log_trace.json"
SUMMARY_FILENAME = "mlperf_log_summary.txt"
_CONDITIONS = {
    "result_perf_constraints_met": "over the bound on latency",
    "result_min_duration_met": "shorter than asked for",
    "result_min_queries_met": "fewer queries than asked for",
    "early_stopping_met": "too few queries to be sure of the percentile",
}
_MARK = ":::MLLOG "
_SAMPLE = re.compile(
    r'"name":"Sample".*?"issue_start_ns":(\d+),"complete_ns":(\d+)', re.ASCII
)


@dataclass(frozen=True, slots=True)
class LoadgenLog:
    """One test as LoadGen saw it."""

    version: str
    valid: bool
    reasons: tuple[str, ...]
    """Why not."""
    values: dict[str, Any]
    """By LoadGen's own keys: ``result_99.00_percentile_latency_ns`` and the like."""
    latency_ms: npt.NDArray[np.float64]
    """Of each query, from when it was due; of Offline, from the start of the test."""
    lag_ms: npt.NDArray[np.float64]
    """Of each query, from when it was due until it was issued."""


def read_logs(directory: Path) -> LoadgenLog:
    """Read what a test left; one that was cut short is invalid and has no figures."""
    values = _read_detail(directory / DETAIL_FILENAME)
    latencies, lags = _read_trace(directory / TRACE_FILENAME)
    return LoadgenLog(
        version=str(values.get("loadgen_version", "unknown")).partition(" ")[0],
        valid=values.get("result_validity") == "VALID",
        reasons=tuple(
            reason for key, reason in _CONDITIONS.items() if values.get(key) is False
        ),
        values=values,
        latency_ms=latencies,
        lag_ms=lags,
    )


def _read_detail(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not path.is_file():
        return values
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith(_MARK):
            continue
        try:
            entry = json.loads(line[len(_MARK) :])
        except ValueError:  # cut off where the process ended
            continue
        values[entry["key"]] = entry["value"]
    return values


def _read_trace(
    path: Path,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    # By line, not as JSON: LoadGen quotes some of its own entries twice.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = np.array(_SAMPLE.findall(text), dtype=np.float64).reshape(-1, 2) / 1e6
    return found[:, 1], found[:, 0]
