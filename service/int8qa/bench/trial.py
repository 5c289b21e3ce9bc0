"""One LoadGen test: started in a process of its own, awaited, judged, described.

In: a ``LoadSpec``. Out: one JSON-ready record of it. A test in which a single request
failed is invalid, whatever LoadGen says. Knows no other test.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from int8qa.bench.gateway_metrics import GatewayUse, measure_use
from int8qa.bench.length_groups import group_by_length
from int8qa.bench.load import OUTCOME_FILENAME, LoadSpec, Outcome
from int8qa.bench.loadgen_logs import LoadgenLog, read_logs
from int8qa.errors import GatewayRequestError, Int8qaError

CDF_POINTS = (*range(100), 99.5, 99.9, 100)
"""Percentiles that the record keeps of the distribution."""
_THROUGHPUT_KEYS = {
    "SingleStream": "result_qps_with_loadgen_overhead",
    "Server": "result_completed_samples_per_sec",
    "Offline": "result_samples_per_second",
}
_LATENCY_KEYS = {
    "mean": "result_mean_latency_ns",
    "p50": "result_50.00_percentile_latency_ns",
    "p90": "result_90.00_percentile_latency_ns",
    "p95": "result_95.00_percentile_latency_ns",
    "p99": "result_99.00_percentile_latency_ns",
    "p99_9": "result_99.90_percentile_latency_ns",
    "max": "result_max_latency_ns",
}


def run_trial(spec: LoadSpec) -> dict[str, Any]:
    """Run a test and describe it.

    Raises:
        GatewayRequestError: the gateway is not there, refuses, or went away.
        Int8qaError: the load generator's process failed.
    """
    outcome = run_load(spec)
    run = _describe_test(spec, outcome, read_logs(Path(spec.directory)))
    return run | {"remarks": _list_remarks(run)}


def run_load(spec: LoadSpec) -> Outcome:
    """Run a test in a process of its own.

    Raises:
        GatewayRequestError: the gateway is not there, refuses, or went away.
        Int8qaError: the process failed.
    """
    directory = Path(spec.directory)
    directory.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "int8qa.bench.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        # Left open: when it closes, whether we live or not, the test ends.
        process.stdin.write(json.dumps(asdict(spec)) + "\n")
        process.stdin.flush()
        complaints = process.stderr.read()
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        with contextlib.suppress(BrokenPipeError):  # it ended before it read
            process.stdin.close()
    path = directory / OUTCOME_FILENAME
    if not path.is_file():
        last = complaints.strip().splitlines()[-1:] or ["it gives no reason"]
        raise Int8qaError(
            f"the load generator ended with status {process.returncode}: {last[0]}"
        )
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    if outcome.fatal is not None:
        raise GatewayRequestError(outcome.fatal)
    return outcome


def _describe_test(spec: LoadSpec, outcome: Outcome, log: LoadgenLog) -> dict[str, Any]:
    values = log.values
    reasons = [f"{count} × {kind}" for kind, count in outcome.failures.items()]
    if outcome.cut_short:
        reasons.append(f"cut short: {outcome.cut_short}")
    use = measure_use(outcome.metrics_before, outcome.metrics_after, spec.precision)
    answered = outcome.answers + sum(outcome.failures.values())
    offline = spec.scenario == "Offline"
    throughput = values.get(_THROUGHPUT_KEYS[spec.scenario])
    request_ms = (
        1e3 * outcome.request_seconds / outcome.answers if outcome.answers else None
    )
    latency = None if offline else _describe_latency(log)
    return {
        "scenario": spec.scenario,
        "precision": spec.precision,
        "target_qps": round(spec.target_qps, 3) if spec.target_qps else None,
        "valid": log.valid and not outcome.failures and not outcome.cut_short,
        "reasons": [*reasons, *log.reasons],
        "too_short": offline
        and not outcome.failures
        and values.get("result_min_duration_met") is False,
        "failures": outcome.failures,
        "loadgen": log.version,
        "queries": answered,
        "warm_up_qps": round(outcome.warm_up_qps, 2),
        "throughput_qps": None if throughput is None else round(throughput, 3),
        "latency_ms": latency,
        "cdf_ms": None
        if offline or not log.latency_ms.size
        else [round(float(v), 3) for v in np.percentile(log.latency_ms, CDF_POINTS)],
        "by_length": group_by_length(outcome.timings),
        "time_ms": _break_down(use, request_ms, None if offline else log),
        "gateway": None if use is None else asdict(use) | {"edge_ms": use.edge_ms},
        "generator": {
            "cpu_ms": round(1e3 * outcome.cpu_s / answered, 4) if answered else None,
            "request_ms": None if request_ms is None else round(request_ms, 4),
            "lag_ms_p99": round(float(np.percentile(log.lag_ms, 99)), 4)
            if log.lag_ms.size and not offline
            else None,
        },
    }


def _describe_latency(log: LoadgenLog) -> dict[str, float] | None:
    """LoadGen's own figures, in milliseconds."""
    if not all(key in log.values for key in _LATENCY_KEYS.values()):
        return None
    return {
        name: round(log.values[key] / 1e6, 3) for name, key in _LATENCY_KEYS.items()
    }


def _break_down(
    use: GatewayUse | None, request_ms: float | None, log: LoadgenLog | None
) -> dict[str, float] | None:
    """Mean milliseconds of a request by where they went, from outside to inside."""
    if use is None or request_ms is None:
        return None
    parts = dict(use.stages_ms) | {
        "edge": use.edge_ms,
        "wire": max(0.0, request_ms - use.request_ms),
    }
    if log is not None and log.latency_ms.size:
        parts["generator"] = max(0.0, float(log.latency_ms.mean()) - request_ms)
    return {name: round(ms, 4) for name, ms in parts.items()}


def _list_remarks(run: dict[str, Any]) -> list[str]:
    """What disturbed a test without making it invalid."""
    use = run["gateway"]
    if use is None:
        return ["the gateway has no metrics; where the time went is not known"]
    remarks = []
    if use["requests"] > run["queries"]:
        remarks.append(
            f"others asked this gateway {use['requests'] - run['queries']} questions "
            f"meanwhile"
        )
    if use["replays"]:
        remarks.append(
            f"{use['replays']} questions were asked again for the live comparison; "
            f"INT8QA_COMPARISON__FRACTION=0 switches it off"
        )
    return remarks


def describe_in_words(run: dict[str, Any]) -> str:
    """One line of a finished test."""
    rate = f" at {run['target_qps']:.4g}/s" if run["scenario"] == "Server" else ""
    parts = [f"{run['scenario']} {run['precision']}{rate}:"]
    if run["throughput_qps"] is not None and run["scenario"] != "SingleStream":
        parts.append(f"{run['throughput_qps']:.4g} questions/s,")
    latency = run["latency_ms"]
    if latency:
        parts.append(f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms,")
    if run["by_length"]:
        ratios = [group["ratio"] for group in run["by_length"]]
        parts.append(
            f"p99 {min(ratios):.2f} to {max(ratios):.2f} × p50 among questions of like "
            f"length,"
        )
    parts.append("valid" if run["valid"] else "invalid: " + "; ".join(run["reasons"]))
    return " ".join(parts)
