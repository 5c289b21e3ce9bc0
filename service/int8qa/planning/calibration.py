"""What a question costs beside the engine, from measurements of a running gateway.

In: the SingleStream and Offline tests of ``int8qa bench gateway``, engine times, the
questions that were asked. Out: overheads, each said to be measured or assumed. Server
tests are never looked at: they are what a plan is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from int8qa.gateway.line import Policy
from int8qa.planning.simulation import (
    Overheads,
    Service,
    Shape,
    simulate_clients,
)
from int8qa.planning.traffic import Question

Json = Mapping[str, Any]

ASSUMED = Overheads(request_s=0.001, call_s=0.0015, interference_s=0.001)
"""Without a measurement. Source: what Triton adds to a call and the gateway to a
request with the embedded engine on two cores of an AMD EPYC; a core shared with the
engine loses what the gateway computes."""
SEED = 1
COUNT = 6000
"""Questions of a simulation that a measurement is held against."""
OFFLINE_CLIENTS = 32
"""Of a result that does not say."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of one precision."""

    overheads: Overheads
    measured: Mapping[str, bool]
    """By field of the overheads."""
    gateway_cpu_s: float | None
    """Of the gateway's process for each question; None if unknown."""
    remarks: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Of JSON types."""
        return {
            name: {
                "ms": round(1e3 * value, 4),
                "source": "measured" if self.measured[name] else "assumed",
            }
            for name, value in asdict(self.overheads).items()
        }


def calibrate(
    runs: Sequence[Json],
    precision: str,
    policy: Policy,
    batch_s: Mapping[Shape, float],
    questions: Sequence[Question],
    *,
    clients: int = OFFLINE_CLIENTS,
    shares_cores: bool = True,
    instances: int = 1,
) -> Calibration:
    """Find the overheads of one precision.

    SingleStream's mean latency less the engine's own is what a lone question costs
    beside it. Its stages say how much of that is the gateway's and the wire's; the rest
    is Triton's. Offline's throughput against a simulation of as many clients says
    how much engine time each question costs beyond its batch.

    Args:
        runs: of a result of ``int8qa bench gateway``; empty: all is assumed.
        precision: whose tests are looked at.
        policy: the gateway's.
        batch_s: seconds by shape.
        questions: the ones that were asked.
        clients: requests that Offline kept under way.
        shares_cores: whether the engine runs where the gateway does; if not, no
            interference is assumed.
        instances: of the engine.
    """
    overheads = ASSUMED if shares_cores else replace(ASSUMED, interference_s=0.0)
    measured = dict.fromkeys(asdict(overheads), False)
    remarks = []

    def simulate(clients: int) -> tuple[float, float]:
        seen = simulate_clients(
            Service(policy, batch_s, overheads, instances),
            questions,
            clients,
            count=COUNT,
            seed=SEED,
        )
        return float(seen.latency_s.mean()), seen.throughput_qps

    single = _find(runs, "SingleStream", precision)
    if single is not None and single["latency_ms"]:
        overheads = replace(overheads, request_s=0.0, call_s=0.0)
        engine_s, _ = simulate(1)
        beside_s = single["latency_ms"]["mean"] / 1e3 - engine_s
        if beside_s < 0:
            remarks.append(
                f"{precision}: a lone question took {-1e3 * beside_s:.2f} ms less than "
                f"the engine alone was measured to; the two were not measured alike"
            )
            beside_s = 0.0
        stages = dict(single["time_ms"] or {})
        own_s = sum(v for k, v in stages.items() if k not in ("queue", "inference"))
        request_s = min(own_s / 1e3, beside_s)
        overheads = replace(overheads, request_s=request_s, call_s=beside_s - request_s)
        measured |= {"request_s": True, "call_s": True}

    offline = _find(runs, "Offline", precision)
    cpu_ms = None
    if offline is not None and offline["throughput_qps"]:
        overheads = replace(overheads, interference_s=0.0)
        _, undisturbed_qps = simulate(clients)
        lost_s = 1 / offline["throughput_qps"] - 1 / undisturbed_qps
        if lost_s < 0:
            remarks.append(
                f"{precision}: Offline answered {offline['throughput_qps']:.1f} "
                f"questions/s, {undisturbed_qps:.1f} are predicted without any "
                f"interference; the engine's times are too long for that run"
            )
        overheads = replace(overheads, interference_s=max(0.0, lost_s))
        measured["interference_s"] = True
        cpu_ms = (offline["gateway"] or {}).get("cpu_ms")
    return Calibration(
        overheads, measured, None if cpu_ms is None else cpu_ms / 1e3, tuple(remarks)
    )


def _find(runs: Sequence[Json], scenario: str, precision: str) -> Json | None:
    """The valid test, if there is one."""
    for run in runs:
        if (run["scenario"], run["precision"]) == (scenario, precision):
            return run if run["valid"] else None
    return None
