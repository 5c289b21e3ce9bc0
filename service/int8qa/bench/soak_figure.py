"""The curves of a soak: memory, descriptors and responses over time.

In: the result of ``int8qa bench soak``. Out: plotly.js figures with their description
in words. Measures nothing.
"""

from __future__ import annotations

from typing import Any

from int8qa.bench.soak import WARM_UP_SHARE
from int8qa.build.comparison.parts import (
    Choice,
    Json,
    escape_text,
    lay_out,
    make_axis,
)

_COLOURS = tuple(
    f"var(--{name})"
    for name in ("recipe-1", "recipe-2", "recipe-3", "entropy", "search", "bars")
)


def plot_soak(result: Json) -> list[Choice]:
    """One figure each, over the same seconds."""
    processes = result["processes"]
    memory = {p["name"]: p["samples"]["rss_mib"] for p in processes}
    descriptors = {p["name"]: p["samples"]["descriptors"] for p in processes}
    return [
        _plot(result, "Memory", "resident memory, MiB", memory),
        _plot(result, "Descriptors", "open descriptors", descriptors),
        _plot(result, "Responses", "responses so far", {"all": result["answered"]}),
    ]


def _plot(
    result: Json, label: str, title: str, curves: dict[str, list[float]]
) -> Choice:
    time_s = result["time_s"]
    warm_s = WARM_UP_SHARE * time_s[-1]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": escape_text(name),
            "x": time_s[: len(values)],
            "y": values,
            "line": {"color": _COLOURS[i % len(_COLOURS)], "width": 2},
        }
        for i, (name, values) in enumerate(curves.items())
    ]
    figure = {
        "data": data,
        "layout": lay_out(
            xaxis=make_axis("seconds"),
            yaxis=make_axis(title, rangemode="tozero"),
            legend={"orientation": "h", "y": -0.2},
            margin={"l": 70, "r": 16, "t": 16, "b": 50},
            shapes=[
                {
                    "type": "line",
                    "x0": warm_s,
                    "x1": warm_s,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"dash": "dash", "width": 1, "color": "var(--muted)"},
                }
            ],
        ),
    }
    ranges = "; ".join(
        f"{name}: {min(values):,g} to {max(values):,g}, {values[-1]:,g} at the end"
        for name, values in curves.items()
        if values
    )
    return Choice(label=label, figure=figure, description=f"{label}: {ranges}.")
