"""Which tensors cost the accuracy: the bars of a calibrator comparison.

In: the sensitivity of the result. Out: plotly.js figures of kernels, of tensor
classes and of layers, with their description in words.
"""

from __future__ import annotations

from collections.abc import Sequence

from int8qa.build.comparison.parts import (
    Choice,
    Json,
    escape_text,
    format_number,
    format_percent,
    lay_out,
    make_axis,
    make_note,
)

MAX_BARS = 30
"""Units that one sensitivity figure shows; the data holds the rest."""


def plot_sensitivity(result: Json) -> list[Choice]:
    """Logit error of single units, of classes and of layers; empty if not measured."""
    sensitivity = result["sensitivity"]
    if not sensitivity:
        return []
    kinds: dict[str, list[Json]] = {label: [] for label in _GROUPS.values()}
    for unit in sensitivity["units"]:
        kinds[_GROUPS[unit["group"]]].append(unit)
    choices = []
    for label, units in kinds.items():
        if units:
            choices.append(_plot_units(label, units))
    return choices


_GROUPS = {
    "kernel": "Kernels",
    "tensor class": "Tensor classes",
    "kernel of all layers": "Kernels, all layers",
    "layer": "Layers",
}


def _plot_units(label: str, units: Sequence[Json]) -> Choice:
    ordered = sorted(units, key=lambda u: u["only"]["rms_logit_error"] or 0)
    shown = ordered[-MAX_BARS:]
    names = [escape_text(unit["name"]) for unit in shown]
    data = []
    titles = ("only this", "all but this")
    for axis, key, title in (("x", "only", titles[0]), ("x2", "all_but", titles[1])):
        values = [unit[key] or {} for unit in shown]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": title,
                "y": names,
                "x": [value.get("rms_logit_error") for value in values],
                "xaxis": axis,
                "marker": {
                    "color": "var(--recipe-1)" if key == "only" else "var(--bars)"
                },
                "customdata": [
                    [
                        format_percent(v.get("f1_ratio")),
                        format_percent(v.get("agreement_fp32")),
                    ]
                    for v in values
                ],
                "hovertemplate": f"%{{y}}, {title} quantized"
                "<br>RMS logit error %{x:.3f}<br>F1 %{customdata[0]} of FP32"
                "<br>same answers as FP32: %{customdata[1]}<extra></extra>",
            }
        )
    height = 120 + 20 * len(shown)
    layout = lay_out(
        xaxis=make_axis("", domain=[0, 0.48], rangemode="tozero", nticks=4),
        xaxis2=make_axis("", domain=[0.54, 1], rangemode="tozero", nticks=4),
        yaxis={"automargin": True, "ticksuffix": " ", "type": "category"},
        showlegend=False,
        bargap=0.3,
        margin={"l": 10, "r": 16, "t": 34, "b": 34},
        annotations=[
            make_note(title, x=x, y=1, yref="paper", yanchor="bottom")
            for title, x in zip(titles, (0, 0.54), strict=True)
        ],
    )
    worst = ordered[-1]
    left = len(ordered) - len(shown)
    description = (
        f"{label}: quantized alone, {worst['name']} moves the logits most "
        f"(RMS {format_number(worst['only']['rms_logit_error'])}, F1 "
        f"{format_percent(worst['only']['f1_ratio'])} of FP32)."
        + (f" The {left} least sensitive are only in the raw data." if left else "")
    )
    return Choice(
        label, {"data": data, "layout": layout}, description, height=max(height, 220)
    )
