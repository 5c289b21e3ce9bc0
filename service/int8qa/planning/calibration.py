"""What a question costs beside the engine, from measurements of a running gateway.

In: the SingleStream, Offline and light tests of ``int8qa bench gateway``, engine times,
the questions that were asked. Out: overheads, each said to be measured or assumed. No
other Server test than the light one is ever looked at: a plan is held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from int8qa.gateway.line import Policy
from int8qa.planning.simulation import (
    Observation,
    Overheads,
    Service,
    Shape,
    simulate_clients,
    simulate_poisson,
)
from int8qa.planning.traffic import Question

Json = Mapping[str, Any]

ASSUMED = Overheads(request_s=0.001, call_s=0.0015, interference_s=0.001, cold_s=0.003)
"""Without a measurement. Source: what Triton adds to a call and the gateway to a
request with the embedded engine on two cores of an AMD EPYC; a core shared with the
engine loses what the gateway computes; docs/planning.md for pauses."""
MOST_SPREAD = 1.0
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
    """By field of the overheads, and ``spread``."""
    spread: float
    """Of a batch's time, as ``Service`` has it."""
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
    is Triton's. How much farther its 99th percentile is from its mean than lengths
    explain is how much a batch's time varies. Offline's throughput against a simulation
    of as many clients says how much engine time each question costs beyond its batch;
    the light test's mean latency, how much an engine that stood idle.

    Args:
        runs: of a result of ``int8qa bench gateway``; empty: all is assumed.
        precision: whose tests are looked at.
        policy: the gateway's.
        batch_s: seconds by shape.
        questions: the ones that were asked.
        clients: requests that Offline kept under way.
        shares_cores: whether the engine runs where the gateway does; if not, neither
            interference nor an engine gone cold is assumed.
        instances: of the engine.
    """
    overheads = (
        ASSUMED if shares_cores else replace(ASSUMED, interference_s=0.0, cold_s=0.0)
    )
    service = Service(policy, batch_s, overheads, instances)
    measured = dict.fromkeys([*asdict(overheads), "spread"], False)
    remarks = []

    def simulate(service: Service, clients: int) -> Observation:
        return simulate_clients(service, questions, clients, count=COUNT, seed=SEED)

    single = _find(runs, "SingleStream", precision)
    if single is not None and single["latency_ms"]:
        latency, bare = single["latency_ms"], replace(service, overheads=Overheads())
        mean_s = latency["mean"] / 1e3
        if "p99" in latency:
            beyond_s = latency["p99"] / 1e3 - mean_s
            bare = replace(
                bare, spread=_fit_spread(lambda one: simulate(one, 1), bare, beyond_s)
            )
            measured["spread"] = True
        beside_s = mean_s - float(simulate(bare, 1).latency_s.mean())
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
        service = replace(service, spread=bare.spread, overheads=overheads)
        measured |= {"request_s": True, "call_s": True}

    offline = _find(runs, "Offline", precision)
    cpu_ms = None
    if offline is not None and offline["throughput_qps"]:
        undisturbed = replace(service, overheads=replace(overheads, interference_s=0.0))
        undisturbed_qps = simulate(undisturbed, clients).throughput_qps
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

    light = _find_light(runs, precision)
    if light is not None:
        rate_qps, mean_s = light["target_qps"], light["latency_ms"]["mean"] / 1e3

        def measure_mean_s(cold_s: float) -> float:
            service_then = replace(service, overheads=replace(overheads, cold_s=cold_s))
            seen = simulate_poisson(
                service_then, questions, rate_qps, count=COUNT, warm_up=100, seed=SEED
            )
            return float(seen.latency_s.mean())

        # All but proportional: batches that meet are few.
        warm_s = measure_mean_s(0.0)
        missing_s = max(0.0, mean_s - warm_s)
        gained_s = measure_mean_s(missing_s) - warm_s if missing_s else 0.0
        cold_s = missing_s**2 / gained_s if gained_s else 0.0
        overheads = replace(overheads, cold_s=cold_s)
        measured["cold_s"] = True
    return Calibration(
        overheads,
        measured,
        service.spread,
        None if cpu_ms is None else cpu_ms / 1e3,
        tuple(remarks),
    )


def _fit_spread(
    simulate: Callable[[Service], Observation], service: Service, beyond_s: float
) -> float:
    """The spread with which latency's 99th percentile is so far beyond its mean.

    0 if lengths alone bring it there. By bisection: equal seeds, so it grows steadily.
    """

    def measure(spread: float) -> float:
        latency_s = simulate(replace(service, spread=spread)).latency_s
        return float(np.percentile(latency_s, 99) - latency_s.mean())

    low, high = 0.0, MOST_SPREAD
    if measure(low) >= beyond_s:
        return low
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < beyond_s else (low, middle)
    return (low + high) / 2


def _find(runs: Sequence[Json], scenario: str, precision: str) -> Json | None:
    """The valid test, if there is one."""
    for run in runs:
        if (run["scenario"], run["precision"]) == (scenario, precision):
            return run if run["valid"] else None
    return None


def _find_light(runs: Sequence[Json], precision: str) -> Json | None:
    """The Server test at which questions hardly meet, if none of them failed."""
    for run in runs:
        if run["precision"] == precision and run.get("light"):
            return run if run["latency_ms"] and not run["failures"] else None
    return None
