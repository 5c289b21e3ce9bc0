"""What each calibrator cuts off, drawn over the histogram of each activation.

In: the histograms of a comparison's result. Out: plotly.js figures, one per tensor and
one per tensor class, with the shares that are cut off and the steps that are left in
numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from int8qa.build.comparison.parts import (
    Choice,
    Json,
    calibrator_styles,
    escape_text,
    format_number,
    lay_out,
    make_axis,
    make_note,
)

GRID_STEPS = 127
"""Of a symmetric INT8 grid between 0 and amax."""
_BARS_TOP = 0.6
"""Height of the histogram as a share of the figure; above it stand the labels."""
_FLIP = 0.55
"""Share of the axis from which on labels stand left of their lines."""
_ROW_PX = 24


def share_beyond(histogram: Json, amax: float) -> float:
    """The share of values that are greater than ``amax``, 0-1, from the counts.

    Within a bin the share is taken to fall exponentially, as the tails of activations
    do; in the last filled bin, where it reaches nothing, linearly.

    Args:
        histogram: with ``counts`` in equal bins from 0 to ``upper``, and the ``peak``.
        amax: where a calibrator cuts off, in the tensor's unit.
    """
    counts, upper = histogram["counts"], histogram["upper"]
    total = sum(counts)
    if not total or not upper or amax >= min(upper, histogram["peak"]):
        return 0.0
    position = max(amax, 0.0) / upper * len(counts)
    inside = int(position)
    above = sum(counts[inside:]) / total
    below = sum(counts[inside + 1 :]) / total
    part = position - inside
    if below > 0:
        return float(above * (below / above) ** part)
    return float(above * (1 - part))


def find_telling(histograms: Sequence[Json]) -> int:
    """Index of the histogram that percentile 99.9 cuts shortest against max."""

    def ratio(i: int) -> float:
        amax = histograms[i]["amax"]
        low = amax.get("percentile-99.9")
        return (amax.get("max") or histograms[i]["peak"] or 0.0) / low if low else 0.0

    return max(range(len(histograms)), key=ratio, default=0)


def plot_histograms(result: Json) -> list[Choice]:
    """One figure per tensor, in the result's order."""
    histograms = result["histograms"]
    places = Counter(h["place"] for h in histograms)
    styles = calibrator_styles(name for h in histograms for name in h["amax"])
    choices = []
    for histogram in histograms:
        place = histogram["place"]
        label = place if places[place] == 1 else f"{place} ({histogram['name']})"
        choices.append(_plot_histogram(label, histogram, styles))
    return choices


def _plot_histogram(
    label: str, histogram: Json, styles: dict[str, tuple[str, str]]
) -> Choice:
    counts, upper = histogram["counts"], histogram["upper"] or 0.0
    width = upper / len(counts) if counts else 0.0
    marks = sorted(
        ((a, name) for name, a in histogram["amax"].items() if a is not None),
        reverse=True,
    )
    reach = max([upper, *(amax for amax, _ in marks)]) or 1.0
    # A label stands on the inner side of its line. Far lines grow from left to right,
    # the others from right to left, so that none crosses the label of another.
    far = [mark for mark in marks if mark[0] > _FLIP * reach]
    stacked = far[::-1] + marks[len(far) :]
    shapes, notes = [], []
    for row, (amax, name) in enumerate(stacked):
        top = _BARS_TOP + (row + 0.7) / max(len(marks), 1) * (1 - _BARS_TOP)
        colour = styles[name][0]
        shapes.append(
            {"type": "line", "xref": "x", "yref": "paper", "x0": amax, "x1": amax}
            | {"y0": 0, "y1": top, "line": {"color": colour, "width": 2}}
        )
        left = amax > _FLIP * reach
        notes.append(
            make_note(
                f"{escape_text(name)}  {format_number(amax)}",
                xref="x",
                x=amax,
                y=top,
                yref="paper",
                xanchor="right" if left else "left",
                yanchor="middle",
                bgcolor="var(--surface)",
                borderpad=1,
                xshift=-3 if left else 3,
                font={"size": 12, "color": "var(--ink)"},
            )
        )
    bars = {
        "type": "bar",
        "x": [(i + 0.5) * width for i in range(len(counts))],
        "y": [count or None for count in counts],
        "width": width or None,
        "marker": {"color": "var(--bars)", "line": {"width": 0}},
        "hovertemplate": "|x| about %{x:.3g}: %{y:,} values<extra></extra>",
    }
    peak = math.log10(max([10, *counts]))
    layout = lay_out(
        showlegend=False,
        bargap=0,
        margin={"l": 60, "r": 16, "t": 8, "b": 46},
        xaxis=make_axis("absolute value", range=[0, 1.02 * reach]),
        yaxis=make_axis(
            "values (log)",
            type="log",
            domain=[0, _BARS_TOP],
            range=[-0.3, peak + 0.2],
            dtick=2 if peak > 4 else 1,
            exponentformat="SI",
        ),
        shapes=shapes,
        annotations=notes,
    )
    layer = histogram["layer"]
    return Choice(
        label,
        {"data": [bars], "layout": layout},
        _describe_cuts(label, histogram, marks),
        group="Outside the layers" if layer is None else f"Layer {layer}",
        head=("calibrator", "amax", "cut off", "step (amax/127)", "finer than max"),
        rows=_list_cuts(histogram, marks),
        height=260 + _ROW_PX * len(marks),
    )


def _list_cuts(
    histogram: Json, marks: Sequence[tuple[float, str]]
) -> list[tuple[str, ...]]:
    widest = histogram["peak"]
    return [
        (
            name,
            format_number(amax),
            format_rarity(share_beyond(histogram, amax)),
            format_number(amax / GRID_STEPS),
            f"{format_number(widest / amax)}×" if amax else "–",
        )
        for amax, name in marks
    ]


def _describe_cuts(
    label: str, histogram: Json, marks: Sequence[tuple[float, str]]
) -> str:
    total = sum(histogram["counts"])
    if not marks or not total:
        return f"{label}: nothing was counted."
    parts = []
    for amax, name in dict.fromkeys((marks[-1], marks[0])):
        share = share_beyond(histogram, amax)
        cut = f"{format_rarity(share)} of them" if share else "nothing"
        parts.append(
            f"{name} cuts off {cut} and leaves steps of "
            f"{format_number(amax / GRID_STEPS)}"
        )
    coarse = marks[0][0] / marks[-1][0] if marks[-1][0] else 1.0
    tail = f", {coarse:.1f} times as coarse" if len(parts) > 1 else ""
    return (
        f"{label}: {total:,} values, the largest {format_number(histogram['peak'])}. "
        f"{'; '.join(parts)}{tail}."
    )


def format_rarity(share: float) -> str:
    """A small share for people: ``0.15 %``, ``1 in 88,000``."""
    if share <= 0:
        return "none"
    if share < 1e-4:
        return f"1 in {float(f'{1 / share:.2g}'):,.0f}"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def plot_amax(result: Json) -> list[Choice]:
    """Per tensor class: amax as a share of the peak, layer by layer."""
    classes: dict[str, list[Json]] = {}
    for histogram in result["histograms"]:
        if histogram["peak"]:
            classes.setdefault(histogram["tensor_class"], []).append(histogram)
    styles = calibrator_styles(
        name for histogram in result["histograms"] for name in histogram["amax"]
    )
    return [_plot_class(name, items, styles) for name, items in classes.items()]


def _plot_class(
    tensor_class: str, histograms: Sequence[Json], styles: dict[str, tuple[str, str]]
) -> Choice:
    rows = [_row_label(histogram) for histogram in histograms]
    data: list[dict[str, Any]] = []
    lowest: tuple[float, str, str] | None = None
    for name, (colour, symbol) in styles.items():
        found = [
            (row, histogram["amax"][name], histogram["amax"][name] / histogram["peak"])
            for row, histogram in zip(rows, histograms, strict=True)
            if histogram["amax"].get(name) is not None
        ]
        if not found:
            continue
        for row, _, share in found:
            if lowest is None or share < lowest[0]:
                lowest = (share, name, row)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape_text(name),
                "x": [100 * share for _, _, share in found],
                "y": [escape_text(row) for row, _, _ in found],
                "customdata": [format_number(amax) for _, amax, _ in found],
                "marker": {"size": 11, "symbol": symbol, "color": colour},
                "hovertemplate": "%{y}: amax %{customdata}, %{x:.1f} % of the peak",
            }
        )
    layout = lay_out(
        xaxis=make_axis("amax, % of the largest value seen", "%", range=[0, 104]),
        yaxis=make_axis(
            "",
            type="category",
            autorange="reversed",
            automargin=True,
            categoryorder="array",
            categoryarray=[escape_text(row) for row in dict.fromkeys(rows)],
        ),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 10, "r": 16, "t": 10, "b": 46},
    )
    description = f"{tensor_class}: no calibrator gave an amax."
    if lowest:
        description = (
            f"{tensor_class}: the tightest cut is {lowest[1]} at {lowest[2]}, "
            f"{100 * lowest[0]:.1f} % of the largest value seen."
        )
    return Choice(
        tensor_class,
        {"data": data, "layout": layout},
        description,
        height=190 + _ROW_PX * max(len(rows), 3),
    )


def _row_label(histogram: Json) -> str:
    layer = histogram["layer"]
    return str(histogram["place"]) if layer is None else f"layer {layer}"
