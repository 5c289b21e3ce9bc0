"""The plan: replicas, latency and cost by precision, over all rates.

In: the inputs. Out: one JSON-ready result that says of each figure whether it was
measured, simulated or extrapolated, and what was assumed. Draws and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from int8qa.bench.provenance import describe_run
from int8qa.planning.inputs import PlanInputs, PlanOptions, Subject, read_inputs
from int8qa.planning.search import (
    JOINT_REPLICAS,
    Prediction,
    Search,
    predict_fewest,
    search_limit,
)
from int8qa.planning.validation import validate

Json = Mapping[str, Any]
Say = Callable[[str], None]

FORMAT_VERSION = 1
PACKAGES = ("simpy", "numpy")
CURVE_DECADES = (1, 5)
"""Powers of ten of the rates, in questions/s, that replicas are drawn over."""
CURVE_POINTS = 12
"""In each decade."""
BUSY_GATEWAY = 0.7
"""Share of a core from which on a gateway's one event loop is a queue of its own, which
is not simulated."""
ASSUMPTIONS = (
    "Arrivals are Poisson, and each draws one of the traffic's questions by chance.",
    (
        "A replica is one gateway process with one engine of one precision, on a "
        "machine of its own like the one measured. What a batch takes varies "
        "about its shape's median as it did for a lone client, independent of the "
        "batch before."
    ),
    (
        "Arrivals are split between replicas at random, so that each sees Poisson "
        "arrivals, independent of the others (Kingman, Poisson Processes, 1993, 5.1), "
        "and one can stand for all. Balancers that take turns or look at queues do "
        "better."
    ),
    (
        "The balancer and the network know no limit, and no replica fails: have some "
        "more for those that do, and for updates."
    ),
)


def make_plan(options: PlanOptions, say: Say = lambda _: None) -> dict[str, Any]:
    """Plan for each precision.

    Returns:
        The result, of JSON types only.

    Raises:
        ContractError: there is no model repository.
        DataFileError: a file cannot be read, or holds too few measurements.
        RepositoryError: no engine result is given, and the build left no times.
    """
    inputs = read_inputs(options)
    precisions = inputs.choose_precisions()
    subjects = {str(p): inputs.build_subject(p) for p in precisions}
    rows, searches = {}, {}
    for name, subject in subjects.items():
        say(f"{name}: simulating")
        search = _search(inputs, subject)
        fewest = predict_fewest(
            subject.service,
            inputs.traffic.questions,
            options.rate_qps,
            search,
            options.bound_ms,
            seed=options.seed,
        )
        searches[name] = search
        rows[name] = _describe_row(inputs, subject, search, fewest)
        inputs.remarks += _remark_gateways(name, subject, fewest)
    if inputs.validation:
        say("validating")
    validation = [
        row
        for result in inputs.validation
        for row in validate(
            result["runs"],
            {name: subject.service for name, subject in subjects.items()},
            inputs.find_traffic(result).questions,
            seed=options.seed,
        )
    ]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "plan",
        "provenance": describe_run(PACKAGES),
        "checkpoint": inputs.contract.checkpoint,
        "build_id": inputs.contract.build_id,
        "asked": {
            "rate_qps": options.rate_qps,
            "bound_ms": options.bound_ms,
            "price_per_hour": options.price_per_hour,
            "seed": options.seed,
        },
        "traffic": inputs.traffic.describe(),
        "policy": {
            "max_wait_s": options.batcher.max_wait_s,
            "max_in_flight": options.batcher.max_in_flight,
            "batch_sizes": {
                str(length): list(inputs.contract.list_batch_sizes(length))
                for length in inputs.contract.sequence_buckets
            },
        },
        "assumptions": list(ASSUMPTIONS),
        "precisions": rows,
        "curve": draw_curve(searches, options.price_per_hour),
        "validation": validation,
        "remarks": list(dict.fromkeys(inputs.remarks)),
    }


def price_million(replicas: int, rate_qps: float, price_per_hour: float) -> float:
    """Cost of a million questions, in the price's currency."""
    return replicas * price_per_hour / (3600 * rate_qps) * 1e6


def draw_curve(
    searches: Mapping[str, Search], price_per_hour: float | None
) -> list[dict[str, Any]]:
    """Replicas by precision at rates of equal ratio, ``CURVE_DECADES``."""
    first, last = (CURVE_POINTS * decade for decade in CURVE_DECADES)
    curve = []
    for step in range(first, last + 1):
        rate = 10 ** (step / CURVE_POINTS)
        point: dict[str, Any] = {"rate_qps": round(rate, 3), "precisions": {}}
        for name, search in searches.items():
            replicas = search.count_replicas(rate)
            point["precisions"][name] = replicas and {
                "replicas": replicas,
                "extrapolated": replicas > JOINT_REPLICAS,
                "cost_per_million": price_per_hour
                and round(price_million(replicas, rate, price_per_hour), 6),
            }
        curve.append(point)
    return curve


def _search(inputs: PlanInputs, subject: Subject) -> Search:
    questions, options = inputs.traffic.questions, inputs.options
    lost_s = subject.service.overheads.interference_s
    return search_limit(
        subject.service,
        questions,
        options.bound_ms,
        1 / (1 / subject.costs.ceiling_qps(questions) + lost_s),
        seed=options.seed,
    )


def _describe_row(
    inputs: PlanInputs, subject: Subject, search: Search, fewest: Prediction | None
) -> dict[str, Any]:
    options, costs = inputs.options, subject.costs
    cpu_s = subject.calibration.gateway_cpu_s
    price = options.price_per_hour
    return {
        "costs": {
            "source": inputs.times.source,
            "machine": inputs.times.machine,
            "shapes": len(costs.batch_s),
            "measured": costs.measured,
            "fit_error": costs.fit_error and round(costs.fit_error, 4),
        },
        "overheads": subject.calibration.describe(),
        "spread": {
            "log": round(subject.service.spread, 4),
            "source": "measured"
            if subject.calibration.measured["spread"]
            else "assumed",
        },
        "replica_limit_qps": search.limit_qps and round(search.limit_qps, 3),
        "lone": search.lone.describe(),
        "plan": fewest and fewest.describe(),
        "gateway_cores": cpu_s and round(cpu_s * options.rate_qps, 2),
        "cost_per_million": None
        if price is None or fewest is None
        else round(price_million(fewest.replicas, options.rate_qps, price), 6),
        "tried": [prediction.describe() for prediction in search.tried],
    }


def _remark_gateways(
    name: str, subject: Subject, fewest: Prediction | None
) -> list[str]:
    """Whether the gateway's process, not the engine, would be what limits."""
    cpu_s = subject.calibration.gateway_cpu_s
    if not cpu_s or fewest is None:
        return []
    share = cpu_s * fewest.rate_qps / fewest.replicas
    if share < BUSY_GATEWAY:
        return []
    remark = (
        f"{name}: each gateway would use {share:.2f} cores for {1e3 * cpu_s:.2f} ms a "
        f"question, and its event loop has one; it needs more gateways than engines"
    )
    return [remark]
