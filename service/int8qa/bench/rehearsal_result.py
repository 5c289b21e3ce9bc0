"""What a rehearsal came to, as figures and in words.

In: requests that ended, phases, events, counters of Tritons and gateways. Out: one
JSON-ready result; its ``problems`` say what went wrong. Starts and asks nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from int8qa.bench.gateway_metrics import CounterChange
from int8qa.bench.rehearsal_clients import Asked

FORMAT_VERSION = 1
MAX_LOAD = 0.5
"""Of what the rush answered; above it a Triton that is gone may be missed."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run, in seconds since its beginning."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class SentAgain:
    """A batch that a gateway sent to a second Triton."""

    at_s: float
    gateway: int
    reason: str
    """``late`` or ``unavailable``."""


@dataclass(frozen=True, slots=True)
class TritonUse:
    """What one Triton did in one phase, by its own counters."""

    phase: str
    triton: str
    requests: int
    """Batches that gateways sent."""
    executions: int
    """Calls of an engine: fewer than requests where Triton merged some."""
    windows: int
    queue_ms: float | None
    """Mean wait of a batch in Triton's queue; None without a batch."""


@dataclass
class Record:
    """All that was seen."""

    capacity: float = 0.0
    """Questions a second, answered in the rush."""
    rate: float = 0.0
    """Questions a second afterwards."""
    phases: list[Phase] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    """What was done, and when."""
    asked: list[Asked] = field(default_factory=list)
    sent_again: list[SentAgain] = field(default_factory=list)
    uses: list[TritonUse] = field(default_factory=list)
    serving: list[tuple[float, list[int | None]]] = field(default_factory=list)
    """How many Tritons each gateway used, over time; None: the gateway is away."""
    under_way_at_drain: int | None = None
    early_windows: int | None = None
    """Computed by the newer Triton before a gateway of its build asked."""
    newer_since_s: float = 0.0
    newer_windows: dict[str, int] = field(default_factory=dict)
    """``sent`` by the gateway of the newer build, ``computed`` by that Triton."""
    problems: list[str] = field(default_factory=list)
    """Seen while it ran."""


def measure_triton(phase: str, triton: str, before: str, after: str) -> TritonUse:
    """What happened between two texts of a Triton's metrics, all models together."""
    change = CounterChange(before, after)
    # The parser gives every counter the ending that OpenMetrics wants.
    requests = round(change.sum("nv_inference_request_success_total"))
    queue_us = change.sum("nv_inference_queue_duration_us_total")
    return TritonUse(
        phase=phase,
        triton=triton,
        requests=requests,
        executions=round(change.sum("nv_inference_exec_count_total")),
        windows=round(change.sum("nv_inference_count_total")),
        queue_ms=round(queue_us / requests / 1e3, 3) if requests else None,
    )


def count_windows(triton: str) -> int:
    """All windows that a Triton has computed, by its metrics."""
    return measure_triton("", "", "", triton).windows


def read_sent_again(
    lines: Iterable[str], gateway: int, began: float
) -> list[SentAgain]:
    """The batches sent again, of a gateway's log in JSON.

    Args:
        lines: of the log; what is no JSON is passed over.
        gateway: whose log it is.
        began: Unix time, in seconds, at which the run's clock stood at 0.
    """
    found = []
    for line in lines:
        if "batch_sent_again" not in line:
            continue
        try:
            entry = json.loads(line)
            moment = datetime.fromisoformat(entry["timestamp"].replace("Z", "+00:00"))
        except (ValueError, KeyError):
            continue
        at_s = moment.timestamp() - began
        found.append(SentAgain(round(at_s, 3), gateway, str(entry.get("reason"))))
    return found


def build_result(record: Record) -> dict[str, Any]:
    """Figures, and what failed, in words; nothing failed where that is empty."""
    remarks = []
    rushed, later = _split(record)
    if failed := _count_failures(rushed):
        remarks.append(
            f"{failed} in the rush, which asks for all that this machine can do"
        )
    if record.rate > MAX_LOAD * record.capacity:
        remarks.append(
            f"{record.rate:g} questions/s are more than {100 * MAX_LOAD:.0f} % of the "
            f"{record.capacity:.1f} answered in the rush: too many to lose a Triton at"
        )
    return {
        "kind": "rehearsal",
        "format_version": FORMAT_VERSION,
        "rate": round(record.rate, 2),
        "capacity": round(record.capacity, 2),
        "phases": [_describe_phase(phase, record) for phase in record.phases],
        "events": [
            {"at_s": round(at_s, 2), "what": what} for at_s, what in record.events
        ],
        "tritons": [
            asdict(use)
            | {
                "windows_per_execution": _divide(use.windows, use.executions),
                "requests_per_execution": _divide(use.requests, use.executions),
            }
            for use in record.uses
        ],
        "under_way_at_drain": record.under_way_at_drain,
        "early_windows": record.early_windows,
        "newer_windows": record.newer_windows,
        "serving": {
            "time_s": [round(at_s, 1) for at_s, _ in record.serving],
            "gateways": [
                list(counts)
                for counts in zip(*(each for _, each in record.serving), strict=True)
            ],
        },
        "seconds": _list_seconds(record),
        "problems": record.problems + _list_problems(record, later),
        "remarks": remarks,
    }


def _describe_phase(phase: Phase, record: Record) -> dict[str, Any]:
    asked = [one for one in record.asked if phase.begin_s <= one.sent_s < phase.end_s]
    took_ms = sorted(1e3 * one.seconds for one in asked if one.failure is None)
    failed = Counter(one.failure for one in asked if one.failure is not None)
    again = Counter(
        one.reason
        for one in record.sent_again
        if phase.begin_s <= one.at_s < phase.end_s
    )
    return {
        "name": phase.name,
        "begin_s": round(phase.begin_s, 2),
        "end_s": round(phase.end_s, 2),
        "asked": len(asked),
        "answered": len(took_ms),
        "failed": dict(failed),
        "p50_ms": _pick(took_ms, 0.5),
        "p99_ms": _pick(took_ms, 0.99),
        "slowest_ms": _pick(took_ms, 1.0),
        "sent_again": dict(again),
    }


def _list_seconds(record: Record) -> dict[str, list[Any]]:
    """What each second's requests came to, by when they were sent."""
    seconds: dict[int, list[Asked]] = {}
    for one in record.asked:
        seconds.setdefault(int(one.sent_s), []).append(one)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("time_s", "answered", "failed", "p50_ms", "slowest_ms")
    }
    for second in range(max(seconds, default=-1) + 1):
        asked = seconds.get(second, [])
        took_ms = sorted(1e3 * one.seconds for one in asked if one.failure is None)
        columns["time_s"].append(second)
        columns["answered"].append(len(took_ms))
        columns["failed"].append(len(asked) - len(took_ms))
        columns["p50_ms"].append(_pick(took_ms, 0.5))
        columns["slowest_ms"].append(_pick(took_ms, 1.0))
    return columns


def _split(record: Record) -> tuple[list[Asked], list[Asked]]:
    """Requests of the first phase, the rush, and those afterwards."""
    end_s = record.phases[0].end_s
    return (
        [one for one in record.asked if one.sent_s < end_s],
        [one for one in record.asked if one.sent_s >= end_s],
    )


def _count_failures(asked: Sequence[Asked]) -> str:
    """How many failed, and how; empty if none did."""
    failed = Counter(one.failure for one in asked if one.failure is not None)
    if not failed:
        return ""
    kinds = ", ".join(f"{count} × {kind}" for kind, count in failed.items())
    return f"{sum(failed.values())} of {len(asked):,} requests failed ({kinds})"


def _list_problems(record: Record, asked: Sequence[Asked]) -> list[str]:
    problems = []
    if failed := _count_failures(asked):
        problems.append(failed)
    if record.early_windows:
        problems.append(
            f"the newer Triton computed {record.early_windows} windows while all "
            f"gateways were of the older build"
        )
    if record.newer_windows:
        sent, computed = (record.newer_windows[n] for n in ("sent", "computed"))
        again = any(one.at_s >= record.newer_since_s for one in record.sent_again)
        # A batch that was sent again may have been computed twice.
        if computed < sent or (computed > sent and not again):
            problems.append(
                f"builds were mixed: the newer build's gateway sent {sent} windows, "
                f"its Triton computed {computed}"
            )
    return problems


def _pick(ascending: Sequence[float], share: float) -> float | None:
    """The value that so large a share does not exceed."""
    if not ascending:
        return None
    return round(ascending[min(len(ascending) - 1, int(share * len(ascending)))], 1)


def _divide(value: int, by: int) -> float | None:
    return round(value / by, 3) if by else None
