"""The figures of a gateway's measurement: latency, throughput, time, batches.

In: the result of ``int8qa bench gateway``. Out: plotly.js figures with their
description in words and their numbers. An invalid test is drawn hollow, never left
out. Measures nothing.
"""

from __future__ import annotations

from typing import Any

from int8qa.bench.trial import CDF_POINTS
from int8qa.build.comparison.parts import (
    Choice,
    Json,
    escape_text,
    format_number,
    format_percent,
    lay_out,
    make_axis,
)

COLOURS = {
    "int8": "var(--recipe-1)",
    "fp16": "var(--recipe-2)",
    "fp32": "var(--recipe-3)",
}
TIMES = {
    "generator": ("before it was sent", "var(--bars)"),
    "wire": ("network and client", "var(--other)"),
    "edge": ("HTTP in the gateway", "var(--search)"),
    "tokenize": ("tokenizing", "var(--mse)"),
    "queue": ("queue", "var(--slower)"),
    "inference": ("engine", "var(--faster)"),
    "decode": ("decoding", "var(--entropy)"),
}
"""Parts of a request's time: what they are called, and their colours."""
SCENARIOS = ("SingleStream", "Server", "Offline")
_LEGEND = {"orientation": "h", "y": -0.2}
_MARGIN = {"l": 70, "r": 16, "t": 16, "b": 50}


def pick_runs(result: Json, scenario: str) -> list[Json]:
    """The test that stands for each precision: of Server, its highest valid rate."""
    picked = []
    for row in result["headline"]:
        runs = [
            run
            for run in result["runs"]
            if run["scenario"] == scenario and run["precision"] == row["precision"]
        ]
        runs.sort(key=lambda run: (run["valid"], run["target_qps"] or 0.0))
        picked += runs[-1:]
    return picked


def plot_cdf(result: Json) -> list[Choice]:
    """The latency distribution of SingleStream and Server, all precisions."""
    choices = []
    for scenario in ("SingleStream", "Server"):
        runs = [run for run in pick_runs(result, scenario) if run["cdf_ms"]]
        if not runs:
            continue
        data = [
            {
                "type": "scatter",
                "mode": "lines",
                "name": _name(run),
                "x": run["cdf_ms"],
                "y": CDF_POINTS,
                "line": {
                    "color": COLOURS[run["precision"]],
                    "width": 2,
                    "dash": "solid" if run["valid"] else "dot",
                },
                "hovertemplate": "%{y:.1f} % within %{x:.1f} ms",
            }
            for run in runs
        ]
        if scenario == "Server":
            data.append(_bound_line(result))
        layout = lay_out(
            xaxis=make_axis("latency, ms (logarithmic)", type="log"),
            yaxis=make_axis("share of questions answered within", " %"),
            legend=_LEGEND,
            margin=_MARGIN,
        )
        rows = [
            (_name(run), *(_ms(run, p) for p in ("mean", "p50", "p90", "p99", "max")))
            for run in runs
        ]
        words = "; ".join(
            f"{name}: p50 {p50}, p99 {p99}" for name, _, p50, _, p99, _ in rows
        )
        choices.append(
            Choice(
                scenario,
                {"data": data, "layout": layout},
                f"{words} ms.",
                head=("ms", "mean", "p50", "p90", "p99", "max"),
                rows=rows,
            )
        )
    return choices


def plot_rates(result: Json) -> list[Choice]:
    """Throughput over latency: every rate that Server was tried at."""
    runs = [
        run
        for run in result["runs"]
        if run["scenario"] == "Server" and run["latency_ms"]
    ]
    if not runs:
        return []
    data: list[dict[str, Any]] = []
    for precision in dict.fromkeys(run["precision"] for run in runs):
        mine = sorted(
            (run for run in runs if run["precision"] == precision),
            key=lambda run: run["target_qps"],
        )
        for percentile, dash in (("p50", "dot"), ("p99", "solid")):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{precision.upper()} {percentile}",
                    "x": [run["latency_ms"][percentile] for run in mine],
                    "y": [run["throughput_qps"] for run in mine],
                    "line": {"color": COLOURS[precision], "dash": dash},
                    "marker": {
                        "size": 9,
                        "symbol": [
                            "circle" if run["valid"] else "circle-open" for run in mine
                        ],
                    },
                    "hovertemplate": "%{y:.1f}/s at %{x:.1f} ms",
                }
            )
    data.append(_bound_line(result, top=_most(runs)))
    layout = lay_out(
        xaxis=make_axis("latency, ms (logarithmic)", type="log"),
        yaxis=make_axis("questions answered per second", rangemode="tozero"),
        legend=_LEGEND,
        margin=_MARGIN,
    )
    best = {
        row["precision"].upper(): format_number(row["server_qps"])
        for row in result["headline"]
    }
    words = ", ".join(f"{name} {rate}" for name, rate in best.items())
    bound = f"{result['rules']['bound_ms']:g} ms"
    return [
        Choice(
            "Server",
            {"data": data, "layout": layout},
            f"Highest Poisson rate with p99 within {bound}, per second: {words}.",
        )
    ]


def plot_time(result: Json) -> list[Choice]:
    """Where the mean time of a request went, by scenario."""
    choices = []
    for scenario in SCENARIOS:
        runs = [run for run in pick_runs(result, scenario) if run["time_ms"]]
        if not runs:
            continue
        names = [_name(run) for run in runs]
        data = [
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": names,
                "x": [run["time_ms"].get(part, 0.0) for run in runs],
                "marker": {"color": colour},
                "hovertemplate": f"{escape_text(label)}: %{{x:.2f}} ms<extra></extra>",
            }
            for part, (label, colour) in TIMES.items()
            if any(part in run["time_ms"] for run in runs)
        ]
        layout = lay_out(
            barmode="stack",
            xaxis=make_axis("mean time of a request, ms"),
            yaxis={"automargin": True, "autorange": "reversed"},
            legend=_LEGEND,
            margin=_MARGIN,
        )
        rows = [
            (name, *(format_number(run["time_ms"].get(part)) for part in TIMES))
            for name, run in zip(names, runs, strict=True)
        ]
        words = "; ".join(
            f"{name}: {format_number(sum(run['time_ms'].values()))} ms, engine "
            f"{format_number(run['time_ms']['inference'])}"
            for name, run in zip(names, runs, strict=True)
        )
        choices.append(
            Choice(
                scenario,
                {"data": data, "layout": layout},
                f"{words}.",
                head=("ms", *(label for label, _ in TIMES.values())),
                rows=rows,
                height=160 + 70 * len(runs),
            )
        )
    return choices


def plot_fill(result: Json) -> list[Choice]:
    """Batches by their size, and what padding cost, by scenario."""
    choices = []
    for scenario in SCENARIOS:
        runs = [run for run in pick_runs(result, scenario) if run["gateway"]]
        if not runs:
            continue
        bounds = sorted({b for run in runs for b in run["gateway"]["fill"]}, key=float)
        data = [
            {
                "type": "bar",
                "name": _name(run),
                "x": [_bound_name(bound) for bound in bounds],
                "y": [
                    100
                    * run["gateway"]["fill"].get(bound, 0)
                    / run["gateway"]["batches"]
                    for bound in bounds
                ],
                "marker": {"color": COLOURS[run["precision"]]},
                "hovertemplate": "%{y:.1f} % of batches",
            }
            for run in runs
        ]
        layout = lay_out(
            xaxis={**make_axis("windows in a batch"), "type": "category"},
            yaxis=make_axis("share of batches", " %", rangemode="tozero"),
            legend=_LEGEND,
            margin=_MARGIN,
        )
        rows = [
            (
                _name(run),
                f"{run['gateway']['batches']:,}",
                format_number(run["gateway"]["batch_windows"]),
                format_percent(run["gateway"]["padding_share"]),
                format_number(run["gateway"]["cpu_ms"]),
                format_number(run["generator"]["cpu_ms"]),
            )
            for run in runs
        ]
        words = "; ".join(
            f"{row[0]}: {row[2]} windows in a batch, {row[3]} of tokens padding"
            for row in rows
        )
        choices.append(
            Choice(
                scenario,
                {"data": data, "layout": layout},
                f"{words}.",
                head=(
                    "",
                    "batches",
                    "mean windows",
                    "padding",
                    "gateway CPU, ms/question",
                    "generator CPU, ms/question",
                ),
                rows=rows,
                height=360,
            )
        )
    return choices


def _name(run: Json) -> str:
    rate = f" at {run['target_qps']:.3g}/s" if run["scenario"] == "Server" else ""
    doubt = "" if run["valid"] else " (invalid)"
    return f"{run['precision'].upper()}{rate}{doubt}"


def _ms(run: Json, percentile: str) -> str:
    return format_number((run["latency_ms"] or {}).get(percentile))


def _bound_name(bound: str) -> str:
    return "more" if bound == "inf" else f"≤ {bound}"


def _most(runs: list[Json]) -> float:
    return max(run["throughput_qps"] or 0.0 for run in runs)


def _bound_line(result: Json, *, top: float = 100.0) -> dict[str, Any]:
    bound_ms = result["rules"]["bound_ms"]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"bound, {bound_ms:g} ms",
        "x": [bound_ms, bound_ms],
        "y": [0, top],
        "line": {"color": "var(--fails)", "dash": "dash", "width": 1},
        "hoverinfo": "skip",
    }
