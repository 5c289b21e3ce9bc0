"""The figures of a plan: replicas over the rate, latency over the load of one.

In: the result of ``int8qa plan``. Out: plotly.js figures with their description in
words and their numbers. What is extrapolated is drawn dotted. Computes nothing.
"""

from __future__ import annotations

import math
from typing import Any

from int8qa.bench.figures import COLOURS
from int8qa.build.comparison.parts import (
    Choice,
    Json,
    format_number,
    lay_out,
    make_axis,
)

_LEGEND = {"orientation": "h", "y": -0.2}
_MARGIN = {"l": 70, "r": 16, "t": 16, "b": 50}
_FLEETS = ("replicas", "cost_per_million")


def plot_fleet(result: Json) -> list[Choice]:
    """Replicas over the rate of all questions, and their cost if there is a price."""
    labels = {"replicas": "replicas", "cost_per_million": "cost of a million questions"}
    priced = result["asked"]["price_per_hour"] is not None
    choices = []
    for key in _FLEETS if priced else _FLEETS[:1]:
        data = []
        for name in result["precisions"]:
            points = [
                (point["rate_qps"], point["precisions"][name])
                for point in result["curve"]
                if point["precisions"][name]
            ]
            if not points:
                continue
            # The dotted line begins where the solid one ends.
            solid = [p for p in points if not p[1]["extrapolated"]]
            dotted = solid[-1:] + [p for p in points if p[1]["extrapolated"]]
            for part, dash in ((solid, "solid"), (dotted, "dot")):
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": f"{name.upper()}"
                        + (", extrapolated" if dash == "dot" else ""),
                        "x": [rate for rate, _ in part],
                        "y": [found[key] for _, found in part],
                        "line": {"color": COLOURS[name], "width": 2, "dash": dash},
                        "hovertemplate": "%{y:.4g} at %{x:.4g}/s",
                    }
                )
        if not data:
            continue
        layout = lay_out(
            xaxis=make_axis("questions per second (logarithmic)", type="log"),
            yaxis=make_axis(
                f"{labels[key]} (logarithmic)" if key == "replicas" else labels[key],
                type="log" if key == "replicas" else "linear",
                rangemode="tozero",
            ),
            legend=_LEGEND,
            margin=_MARGIN,
        )
        rows = _list_decades(result, key)
        words = "; ".join(
            f"{name.upper()}: {row[i + 1]}"
            for row in rows[-1:]
            for i, name in enumerate(result["precisions"])
        )
        choices.append(
            Choice(
                labels[key].capitalize(),
                {"data": data, "layout": layout},
                f"At {rows[-1][0]} questions per second, {labels[key]}: {words}.",
                head=("questions/s", *(n.upper() for n in result["precisions"])),
                rows=rows,
            )
        )
    return choices


def plot_load(result: Json) -> list[Choice]:
    """The 99th percentile of one replica's latency over its rate, as simulated."""
    bound_ms = result["asked"]["bound_ms"]
    data: list[dict[str, Any]] = []
    rows = []
    top = 0.0
    for name, row in result["precisions"].items():
        # Beyond the limit a queue may have grown without end: that says nothing.
        tried = [t for t in row["tried"] if t["p99"]["ms"] <= 4 * bound_ms]
        top = max(top, *(t["rate_qps"] for t in tried), 0.0)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name.upper(),
                "x": [t["rate_qps"] for t in tried],
                "y": [t["p99"]["ms"] for t in tried],
                "error_y": {
                    "type": "data",
                    "array": [t["p99"]["margin_ms"] for t in tried],
                },
                "line": {"color": COLOURS[name], "width": 2},
                "hovertemplate": "p99 %{y:.1f} ms at %{x:.1f}/s",
            }
        )
        rows += [
            (
                name.upper(),
                format_number(t["rate_qps"]),
                f"{100 * t['utilisation']:.0f} %",
                format_number(t["batch_windows"]),
                *(format_number(t[p]["ms"]) for p in ("p50", "p95", "p99")),
                format_number(t["p99"]["margin_ms"]),
            )
            for t in tried
        ]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"bound, {bound_ms:g} ms",
            "x": [0, top],
            "y": [bound_ms, bound_ms],
            "line": {"color": "var(--fails)", "dash": "dash", "width": 1},
            "hoverinfo": "skip",
        }
    )
    words = ", ".join(
        f"{name.upper()} {format_number(row['replica_limit_qps'])}"
        for name, row in result["precisions"].items()
    )
    layout = lay_out(
        xaxis=make_axis("questions per second of one replica", rangemode="tozero"),
        yaxis=make_axis("99th percentile of latency, ms", rangemode="tozero"),
        legend=_LEGEND,
        margin=_MARGIN,
    )
    return [
        Choice(
            "One replica",
            {"data": data, "layout": layout},
            f"Most questions per second of one replica, p99 within {bound_ms:g} ms: "
            f"{words}.",
            head=(
                "",
                "questions/s",
                "engine busy",
                "windows in a batch",
                "p50 ms",
                "p95 ms",
                "p99 ms",
                "± ms",
            ),
            rows=rows,
        )
    ]


def _list_decades(result: Json, key: str) -> list[tuple[str, ...]]:
    """The curve at powers of ten."""
    rows = []
    for point in result["curve"]:
        rate = point["rate_qps"]
        if rate != 10.0 ** round(math.log10(rate)):
            continue
        cells = []
        for found in point["precisions"].values():
            value = found and found[key]
            mark = "~" if found and found["extrapolated"] else ""
            shown = (
                f"{value:,}" if key == "replicas" and value else format_number(value)
            )
            cells.append(mark + shown)
        rows.append((f"{rate:,.0f}", *cells))
    return rows
