"""How many replicas keep to a bound on latency.

In: a service, questions, a bound. Out: the highest rate of one replica, and predictions
at any rate and number of replicas, each with its confidence. Knows no precision, no
price and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from int8qa.bench.scenarios import search_rate
from int8qa.planning.simulation import Service, simulate_poisson
from int8qa.planning.traffic import Question

PERCENTILES = (50, 95, 99)
REPLICATIONS = 5
"""Simulations of one setting, independent of each other."""
STUDENT_T = 2.776
"""Quantile 0.975 of Student's t with 4 degrees of freedom: ``REPLICATIONS`` - 1."""
COUNT = 8000
"""Questions observed in each: 80 beyond the 99th percentile."""
WARM_UP = 1000
"""Questions before these, for each replica: at the rates that keep a bound a queue
empties within tens of questions and so has forgotten its start."""
JOINT_REPLICAS = 8
"""Up to so many replicas are simulated together; of more, one stands for all."""
TOLERANCE = 0.01
"""Of the highest rate, as a share."""
MAX_RATES = 12
LONE_SHARE = 0.01
"""Of the ceiling: a rate at which questions hardly meet."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile of latency: its mean over replications, and how sure that is."""

    ms: float
    margin_ms: float
    """Half of the 95 % confidence interval's width."""
    low_ms: float
    """Of the replications, the lowest."""
    high_ms: float
    """Likewise the highest."""

    @property
    def upper_ms(self) -> float:
        """End of the confidence interval."""
        return self.ms + self.margin_ms


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a number of replicas does at a rate."""

    rate_qps: float
    replicas: int
    p50: Interval
    p95: Interval
    p99: Interval
    utilisation: float
    """Of the engines, 0-1."""
    batch_windows: float
    overrun: float
    """As ``Observation`` has it."""
    extrapolated: bool
    """One replica was simulated and stands for all."""

    def describe(self) -> dict[str, Any]:
        """Of JSON types."""
        values = asdict(self)
        for name in ("p50", "p95", "p99"):
            values[name] = {key: round(ms, 3) for key, ms in values[name].items()}
        return values | {
            "rate_qps": round(self.rate_qps, 3),
            "utilisation": round(self.utilisation, 4),
            "batch_windows": round(self.batch_windows, 3),
            "overrun": round(self.overrun, 4),
        }


@dataclass(frozen=True, slots=True)
class Search:
    """What was found for one service."""

    limit_qps: float | None
    """Highest rate of one replica that keeps to the bound; None if none does."""
    lone: Prediction
    """Of one replica that is hardly asked: no number of them is faster."""
    tried: tuple[Prediction, ...]
    """Of one replica, by rate."""

    def count_replicas(self, rate_qps: float) -> int | None:
        """Fewest replicas that keep to the bound; None if no number does."""
        if self.limit_qps is None:
            return None
        return max(1, math.ceil(rate_qps / self.limit_qps * (1 - 1e-12)))


def predict(
    service: Service,
    questions: Sequence[Question],
    rate_qps: float,
    replicas: int = 1,
    *,
    seed: int = 0,
    count: int | None = None,
) -> Prediction:
    """Simulate a number of replicas at a rate of all together.

    Args:
        service: each replica.
        questions: their traffic.
        rate_qps: of all together.
        replicas: that share it.
        seed: of all replications.
        count: questions observed in each replication; None: ``COUNT``.
    """
    joint = replicas if replicas <= JOINT_REPLICAS else 1
    seen = [
        simulate_poisson(
            service,
            questions,
            rate_qps * joint / replicas,
            count=count or COUNT,
            warm_up=WARM_UP * joint,
            seed=(seed, replication),
            replicas=joint,
        )
        for replication in range(REPLICATIONS)
    ]
    table = np.array([np.percentile(one.latency_s, PERCENTILES) for one in seen]) * 1e3
    p50, p95, p99 = (_estimate(column) for column in table.T)
    return Prediction(
        rate_qps=rate_qps,
        replicas=replicas,
        p50=p50,
        p95=p95,
        p99=p99,
        utilisation=float(np.mean([one.utilisation for one in seen])),
        batch_windows=float(np.mean([one.batch_windows for one in seen])),
        overrun=float(np.mean([one.overrun for one in seen])),
        extrapolated=joint != replicas,
    )


def search_limit(
    service: Service,
    questions: Sequence[Question],
    bound_ms: float,
    ceiling_qps: float,
    *,
    seed: int = 0,
) -> Search:
    """Find the highest rate of one replica whose 99th percentile keeps to a bound.

    Replicas that share arrivals at random do not know of each other, so this rate alone
    decides how many any rate of all together takes.

    Args:
        service: the replica.
        questions: its traffic.
        bound_ms: on the upper end of the percentile's confidence interval.
        ceiling_qps: what no replica reaches.
        seed: of all simulations; equal for services that are compared.
    """
    lone = predict(service, questions, LONE_SHARE * ceiling_qps, seed=seed)
    if lone.p99.upper_ms > bound_ms:
        return Search(None, lone, (lone,))
    tried = [lone]

    def passes(rate_qps: float) -> bool:
        tried.append(predict(service, questions, rate_qps, seed=seed))
        return tried[-1].p99.upper_ms <= bound_ms

    found = search_rate(passes, ceiling_qps, tolerance=TOLERANCE, max_rates=MAX_RATES)
    tried.sort(key=lambda prediction: prediction.rate_qps)
    return Search(found or lone.rate_qps, lone, tuple(tried))


def predict_fewest(
    service: Service,
    questions: Sequence[Question],
    rate_qps: float,
    search: Search,
    bound_ms: float,
    *,
    seed: int = 0,
) -> Prediction | None:
    """The fewest replicas for a rate, simulated; None if no number keeps the bound.

    The search ends within ``TOLERANCE``; where the simulation of the number itself says
    otherwise, it is one more.
    """
    replicas = search.count_replicas(rate_qps)
    if replicas is None:
        return None
    while True:
        found = predict(service, questions, rate_qps, replicas, seed=seed)
        if found.p99.upper_ms <= bound_ms:
            return found
        replicas += math.ceil(TOLERANCE * replicas)


def _estimate(values: np.ndarray[Any, np.dtype[np.float64]]) -> Interval:
    margin = STUDENT_T * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(
        ms=float(values.mean()),
        margin_ms=margin,
        low_ms=float(values.min()),
        high_ms=float(values.max()),
    )
