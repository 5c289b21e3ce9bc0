"""MLPerf's scenarios against a running gateway, one LoadGen test after the other.

In: a gateway's address, questions, precisions, rules. Out: one JSON-ready result, and
LoadGen's own files beside it. Chooses the tests and searches the highest rate that
passes; how a test is run and judged is ``trial.py``'s.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from int8qa.bench.load import LoadSpec, Scenario
from int8qa.bench.provenance import describe_run, remark_load
from int8qa.bench.trial import describe_in_words, run_trial
from int8qa.bench.wire import Address
from int8qa.build.subject import data_name, questions_file
from int8qa.client import GatewayClient
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError, MissingDependencyError
from int8qa.reader.squad import load_questions

FORMAT_VERSION = 1
PACKAGES = ("mlcommons-loadgen", "numpy", "httptools", "uvloop")
LOADGEN_DIRECTORY = "loadgen"
FIRST_SHARE = 0.7
"""Of Offline's throughput: the first rate that Server is tried at."""
LIGHT_SHARE = 0.1
"""Of Offline's throughput: a rate at which questions hardly meet, yet find the machine
idle. Server is tried at it before the search."""
MAX_RATES = 8
_WARM_UP_SHARE = 0.15
_MOST_WARM_UP_S = 10.0
_MOST_TRIES = 3
"""Of an Offline test that is over before its time."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rules:
    """When a test counts."""

    min_seconds: float = 60.0
    min_queries: int = 664
    """For each test. Of fewer than 662, LoadGen's early stopping has no estimate of
    the 99th percentile."""
    bound_ms: float = 130.0
    """On Server's latency. Source: MLPerf Inference's rule for BERT."""
    percentile: float = 0.99
    """Of latencies that must keep to it, 0-1."""
    tolerance: float = 0.05
    """The search for Server's rate ends when the lowest that failed is so near."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to run against which gateway."""

    url: str
    output: Path
    """Directory of the report; LoadGen's files go into ``loadgen`` in it."""
    data: Path = field(default_factory=lambda: questions_file("evaluation"))
    limit: int | None = None
    precisions: Sequence[Precision] = ()
    """Empty: all that the gateway serves."""
    scenarios: Sequence[Scenario] = tuple(Scenario)
    concurrency: int = 32
    """Requests under way at once in Offline."""
    rules: Rules = field(default_factory=Rules)


def check_loadgen() -> None:
    """Refuse to begin without LoadGen.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingDependencyError(
            "loading a gateway takes MLPerf LoadGen: pip install -e '.[bench]' in the "
            "checkout, or pip install mlcommons-loadgen (elsewhere than on Linux "
            "x86_64 that compiles it and takes a C++ compiler)"
        )


def bench_gateway(options: LoadOptions, say: Say = lambda _: None) -> dict[str, Any]:
    """Run the scenarios in each precision.

    Returns:
        The result, of JSON types only; ``problems`` says what is invalid in it.

    Raises:
        GatewayRequestError: no gateway there, it does not serve what is asked for, or
            it went away.
        MissingDependencyError: LoadGen is not installed.
        DataFileError: the questions cannot be read.
    """
    check_loadgen()
    Address.parse(options.url)
    questions = load_questions(options.data)[: options.limit]
    models = asyncio.run(_list_models(options.url))
    precisions = _choose_precisions(options, models)
    provenance = describe_run(PACKAGES)
    directory = options.output / LOADGEN_DIRECTORY
    shutil.rmtree(directory, ignore_errors=True)
    bench = _Bench(options, directory, say)
    scenarios = set(options.scenarios)
    if Scenario.SERVER in scenarios:
        scenarios.add(Scenario.OFFLINE)  # its throughput is where the search begins
    for scenario in Scenario:
        for precision in precisions if scenario in scenarios else ():
            bench.run_scenario(scenario, precision)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "gateway",
        "provenance": provenance
        | {
            "data": data_name(options.data, "evaluation"),
            "questions": len(questions),
            "loadgen": bench.loadgen_version,
        },
        "gateway": {"url": options.url, **models},
        "rules": asdict(options.rules) | {"concurrency": options.concurrency},
        "headline": [_summarize(str(p), bench.runs) for p in precisions],
        "runs": bench.runs,
        "remarks": remark_load(provenance) + bench.remarks,
        "problems": bench.problems,
    }


def _keeps_bound(run: dict[str, Any], bound_ms: float) -> bool:
    """Whether a test's 99th percentile is within the bound, sure or not."""
    latency = run["latency_ms"]
    return bool(latency) and not run["failures"] and latency["p99"] <= bound_ms


def search_rate(
    passes: Callable[[float], bool],
    ceiling: float,
    *,
    tolerance: float,
    max_rates: int = MAX_RATES,
) -> float | None:
    """The highest rate that passes, by bisection below ``ceiling``.

    Args:
        passes: runs one test at a rate.
        ceiling: no rate from here on can pass, so none is tried.
        tolerance: how near, as a share, the lowest rate that failed must be.
        max_rates: tests at most.

    Returns:
        The highest rate that passed; None if none did.
    """
    low, high = 0.0, ceiling
    rate = FIRST_SHARE * ceiling
    for _ in range(max_rates):
        if passes(rate):
            low = rate
        else:
            high = rate
        if high - low <= tolerance * high:
            break
        rate = (low + high) / 2
    return low or None


class _Bench:
    """The tests so far."""

    def __init__(self, options: LoadOptions, directory: Path, say: Say) -> None:
        self.options = options
        self.directory = directory
        self.say = say
        self.runs: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.loadgen_version = "unknown"

    def run_scenario(self, scenario: Scenario, precision: Precision) -> None:
        """All tests of one scenario in one precision."""
        if scenario is Scenario.SERVER:
            self._run_server(precision)
            return
        name = f"{scenario}-{precision}"
        run = self._run_test(scenario, precision, name=name)
        for again in range(2, _MOST_TRIES + 1):
            if not run["too_short"]:
                break
            # The warm-up promised less than the service gives, and LoadGen fixes the
            # number of questions beforehand. Once more, with some to spare.
            rate = 1.5 * run["throughput_qps"]
            run = self._run_test(scenario, precision, name=f"{name}-{again}", rate=rate)
        run.pop("too_short")
        self.runs.append(run)
        if not run["valid"]:
            reasons = "; ".join(run["reasons"]) or "LoadGen gives no reason"
            self.problems.append(f"{scenario} {precision} is invalid: {reasons}")

    def _run_server(self, precision: Precision) -> None:
        offline = next(
            run
            for run in self.runs
            if (run["scenario"], run["precision"]) == ("Offline", str(precision))
        )

        tried: list[dict[str, Any]] = []

        def try_rate(rate: float, *, light: bool = False) -> dict[str, Any]:
            run = self._run_test(
                Scenario.SERVER,
                precision,
                name=f"Server-{precision}-{rate:.4g}qps",
                rate=rate,
            )
            run.pop("too_short")
            self.runs.append(run | {"light": light})
            tried.append(run)
            return run

        rules = self.options.rules
        ceiling = offline["throughput_qps"] or offline["warm_up_qps"]
        light_qps = LIGHT_SHARE * ceiling
        light = try_rate(light_qps, light=True)
        found = bool(light["valid"])
        # What questions that hardly meet do not keep to, no rate does. But a test with
        # too few of them to be sure is no reason to stop.
        if found or _keeps_bound(light, rules.bound_ms):
            rate = search_rate(
                lambda rate: bool(try_rate(rate)["valid"]),
                ceiling,
                tolerance=rules.tolerance,
            )
            found = found or rate is not None
        if not found:
            lowest = min(tried, key=lambda run: float(run["target_qps"]))
            reasons = "; ".join(lowest["reasons"])
            self.problems.append(
                f"Server {precision} is invalid: no rate of arrivals passed, the "
                f"lowest tried was {lowest['target_qps']:.3g}/s ({reasons})"
            )

    def _run_test(
        self,
        scenario: Scenario,
        precision: Precision,
        *,
        name: str,
        rate: float = 0.0,
    ) -> dict[str, Any]:
        options, rules = self.options, self.options.rules
        single = scenario is Scenario.SINGLE_STREAM
        server = scenario is Scenario.SERVER
        directory = self.directory / name
        # By Little's law a test that keeps to the bound has `rate * bound` queries
        # under way at most, but for chance. Ten times that will not come back.
        outstanding = 50 + round(10 * rate * rules.bound_ms / 1e3)
        spec = LoadSpec(
            url=options.url,
            scenario=str(scenario),
            precision=str(precision),
            data=str(options.data.absolute()),
            directory=str(directory.absolute()),
            min_seconds=rules.min_seconds,
            min_queries=rules.min_queries,
            # MLPerf reports SingleStream's 90th percentile.
            percentile=0.9 if single else rules.percentile,
            connections={
                Scenario.SINGLE_STREAM: 1,
                Scenario.OFFLINE: options.concurrency,
                Scenario.SERVER: min(outstanding, 512),
            }[scenario],
            warm_up_s=min(_WARM_UP_SHARE * rules.min_seconds, _MOST_WARM_UP_S),
            limit=options.limit,
            target_qps=rate,
            bound_ms=rules.bound_ms if server else 0.0,
            max_outstanding=outstanding if server else 0,
        )
        run = run_trial(spec)
        self.loadgen_version = run.pop("loadgen")
        run["files"] = f"{LOADGEN_DIRECTORY}/{name}"
        self.remarks += [f"{name}: {remark}" for remark in run.pop("remarks")]
        self.say(describe_in_words(run))
        return run


async def _list_models(url: str) -> dict[str, Any]:
    async with GatewayClient(url) as client:
        models = await client.list_models()
    return {
        "checkpoint": models.get("checkpoint"),
        "build_id": models.get("build_id"),
        "precisions": list(models.get("precisions") or ()),
        "models": models.get("models") or [],
    }


def _choose_precisions(options: LoadOptions, models: dict[str, Any]) -> list[Precision]:
    # Among them `both`, which is no engine.
    served = [p for p in Precision if p.value in models["precisions"]]
    if not options.precisions:
        return served
    absent = [str(p) for p in options.precisions if p not in served]
    if absent:
        raise GatewayRequestError(
            f"the gateway at {options.url} does not serve {', '.join(absent)}: it has "
            f"{', '.join(map(str, served))}"
        )
    return list(dict.fromkeys(options.precisions))


def _summarize(precision: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that are quoted; None where there is no valid test."""

    def find(scenario: str) -> list[dict[str, Any]]:
        return [
            run
            for run in runs
            if run["scenario"] == scenario
            and run["precision"] == precision
            and run["valid"]
        ]

    single, offline = find("SingleStream"), find("Offline")
    server = max(find("Server"), key=lambda run: run["target_qps"], default=None)
    return {
        "precision": precision,
        "single_stream_ms": single[0]["latency_ms"] if single else None,
        "offline_qps": offline[0]["throughput_qps"] if offline else None,
        "server_qps": server["target_qps"] if server else None,
        "server_ms": server["latency_ms"] if server else None,
    }
