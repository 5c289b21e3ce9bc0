"""Accuracy against speed: the Pareto plot of a calibrator comparison.

In: the variants and floats of the result. Out: plotly.js figures, with their
description in words. Knows which calibrator is which colour, not why it is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from int8qa.build.comparison.parts import (
    Choice,
    Json,
    calibrator_styles,
    escape_text,
    format_percent,
    lay_out,
    make_axis,
    make_note,
)
from int8qa.build.latency import geometric_mean

_CLOSE = 0.9
"""Shares of F1 from here on set the range that the Pareto plot opens with."""
_RECIPE_COLOURS = tuple(f"var(--recipe-{i})" for i in range(1, 5))


def mean_speed(latency_ms: Json, rival: Json) -> float | None:
    """Geometric mean over the shapes of rival's p50 over ours; None if not measured.

    Args:
        latency_ms: by shape ``{"p50", "p50_fp16"}``; ``p50_fp16``, FP16 timed in turns
            with this one, goes before the rival's own time.
        rival: by shape ``{"p50"}``.
    """
    ratios = [
        ratio
        for shape in latency_ms
        if (ratio := shape_speed(latency_ms, rival, shape)) is not None
    ]
    return geometric_mean(ratios) if ratios else None


def shape_speed(latency_ms: Json, rival: Json, shape: str) -> float | None:
    """How many times as fast as the rival at one shape; None if not measured."""
    ours = latency_ms.get(shape) or {}
    theirs = ours.get("p50_fp16") or (rival.get(shape) or {}).get("p50")
    return theirs / ours["p50"] if theirs and ours.get("p50") else None


def name_variant(variant: Json) -> str:
    """``linear, percentile-99.99 + SmoothQuant``."""
    return f"{variant['recipe']}, {variant['label']}"


def plot_pareto(result: Json) -> list[Choice]:
    """Speed against accuracy, once close up and once with all that fell out of it."""
    fp16 = result["floats"]["fp16"]["latency_ms"]
    fp32_f1 = result["floats"]["fp32"]["f1"]
    floats = [
        (name.upper(), mean_speed(model["latency_ms"], fp16), model["f1"] / fp32_f1)
        for name, model in result["floats"].items()
        if fp32_f1
    ]
    points = [
        (variant, speed, variant["f1_ratio"])
        for variant in result["variants"]
        if (speed := mean_speed(variant["latency_ms"], fp16)) is not None
        and variant["f1_ratio"] is not None
    ]
    gate = result["provenance"]["gate"]
    data = [_front(points, floats), *_variant_marks(points), _float_marks(floats)]
    data += _pareto_legend([variant for variant, _, _ in points])
    shares = [100 * share for _, _, share in points] + [100 * s for _, _, s in floats]
    close = [share for share in shares if share >= 100 * _CLOSE] + [100 * gate]
    far = sum(share < min(close) for share in shares)
    views = [("All", min([*shares, *close]), 0)]
    if far:
        views.insert(0, ("Close up", min(close), far))
    top = max([*shares, *close])
    description = _describe_pareto(points, gate)
    choices = []
    for label, low, below in views:
        pad = max(0.06 * (top - low), 0.3)
        layout = lay_out(
            xaxis=make_axis("speed against FP16, mean of the shapes", "×"),
            yaxis=make_axis("F1, % of FP32", range=[low - pad, top + pad]),
            legend={"orientation": "h", "y": -0.2, "itemclick": False},
            margin={"l": 60, "r": 16, "t": 16, "b": 50},
            shapes=[_gate_line(100 * gate)],
            annotations=[
                _gate_label(100 * gate),
                *_below_label(below),
                *_best_label(points, result.get("best") or {}),
            ],
        )
        choices.append(
            Choice(label, {"data": data, "layout": layout}, description, height=520)
        )
    return choices


def _variant_marks(points: Sequence[tuple[Json, float, float]]) -> list[dict[str, Any]]:
    styles = calibrator_styles(variant["calibrator"] for variant, _, _ in points)
    colours = _recipe_colours(variant for variant, _, _ in points)
    marks = []
    for variant, speed, share in points:
        symbol = styles[variant["calibrator"]][1]
        colour = colours[variant["recipe"]]
        marks.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [speed],
                "y": [100 * share],
                "showlegend": False,
                "marker": {
                    "size": 12,
                    "symbol": f"{symbol}-open" if variant["smooth"] else symbol,
                    "color": colour,
                    "line": {"width": 2 if variant["smooth"] else 1, "color": colour},
                },
                "hovertemplate": "%{customdata}<extra></extra>",
                "customdata": [_hover_variant(variant, speed)],
            }
        )
    return marks


def _hover_variant(variant: Json, speed: float) -> str:
    ratio = format_percent(variant["f1_ratio"])
    margin = format_percent(variant["f1_ratio_margin"])
    lines = (
        name_variant(variant),
        f"F1 {ratio} of FP32 ± {margin}",
        f"same answers as FP16: {format_percent(variant['agreement_fp16'])}",
        f"speed {speed:.2f} × FP16",
        "passes the gate" if variant["passes_gate"] else "fails the gate",
    )
    return "<br>".join(escape_text(line) for line in lines)


def _float_marks(
    floats: Sequence[tuple[str, float | None, float]],
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [speed for _, speed, _ in floats],
        "y": [100 * share for _, _, share in floats],
        "text": [escape_text(name) for name, _, _ in floats],
        "textposition": "top center",
        "showlegend": False,
        "cliponaxis": False,
        "marker": {"size": 13, "symbol": "circle", "color": "var(--ink)"},
        "hovertemplate": "%{text}<br>F1 %{y:.1f} % of FP32<br>speed %{x:.2f} × FP16"
        "<extra></extra>",
    }


def _front(
    points: Sequence[tuple[Json, float, float]],
    floats: Sequence[tuple[str, float | None, float]],
) -> dict[str, Any]:
    """The line behind which every variant is both slower and less accurate."""
    front = [(speed, share) for variant, speed, share in points if variant["pareto"]]
    everything = [(speed, share) for _, speed, share in points]
    measured = [(speed, share) for _, speed, share in floats if speed is not None]
    front += [
        mark
        for mark in measured
        if not any(s > mark[0] and f > mark[1] for s, f in everything + measured)
    ]
    front.sort(key=lambda mark: (mark[0], -mark[1]))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [speed for speed, _ in front],
        "y": [100 * share for _, share in front],
        "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot", "shape": "vh"},
        "hoverinfo": "skip",
    }


def _pareto_legend(variants: Sequence[Json]) -> list[dict[str, Any]]:
    """Entries without points: what colour and symbol mean, not each combination."""
    entries = [
        (recipe, colour, "circle")
        for recipe, colour in _recipe_colours(variants).items()
    ]
    styles = calibrator_styles(variant["calibrator"] for variant in variants)
    entries += [(name, "var(--muted)", symbol) for name, (_, symbol) in styles.items()]
    if any(variant["smooth"] for variant in variants):
        entries.append(("hollow: SmoothQuant", "var(--muted)", "circle-open"))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [None],
            "y": [None],
            "name": escape_text(name),
            "marker": {"size": 11, "color": colour, "symbol": symbol},
        }
        for name, colour, symbol in entries
    ]


def _recipe_colours(variants: Iterable[Json]) -> dict[str, str]:
    recipes = list(dict.fromkeys(variant["recipe"] for variant in variants))
    return {
        recipe: _RECIPE_COLOURS[i % len(_RECIPE_COLOURS)]
        for i, recipe in enumerate(recipes)
    }


def _gate_line(share: float) -> dict[str, Any]:
    line = {"color": "var(--fails)", "width": 1.5, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1} | {
        "y0": share,
        "y1": share,
        "line": line,
    }


def _gate_label(share: float) -> dict[str, Any]:
    return make_note(f"gate {share:g} %", x=0, y=share, yref="y", yanchor="top") | {
        "font": {"size": 12, "color": "var(--fails)"}
    }


def _below_label(below: int) -> list[dict[str, Any]]:
    text = f"↓ {below} further below: press All"
    return [make_note(text, x=0, y=0, yref="paper", yanchor="bottom")] if below else []


def _best_label(
    points: Sequence[tuple[Json, float, float]], best: Json
) -> list[dict[str, Any]]:
    keys = ("recipe", "calibrator", "smooth")
    return [
        make_note(
            f"best: {escape_text(name_variant(variant))}",
            xref="x",
            yref="y",
            x=speed,
            y=100 * share,
            xanchor="right",
            showarrow=True,
            arrowhead=2,
            arrowwidth=1,
            arrowcolor="var(--muted)",
            ax=-46,
            ay=34,
            font={"size": 12, "color": "var(--ink)"},
        )
        for variant, speed, share in points
        if all(variant[key] == best.get(key) for key in keys)
    ]


def _describe_pareto(points: Sequence[tuple[Json, float, float]], gate: float) -> str:
    if not points:
        return "No INT8 variant was measured; only FP32 and FP16 are shown."
    passing = sum(bool(variant["passes_gate"]) for variant, _, _ in points)
    front = [p for p in points if p[0]["pareto"] and p[0]["passes_gate"]]
    listed = "; ".join(
        f"{name_variant(variant)}: {100 * share:.1f} % of FP32's F1, {speed:.2f} × FP16"
        for variant, speed, share in sorted(front, key=lambda point: point[1])
    )
    return (
        f"{passing} of {len(points)} variants pass the gate of {100 * gate:g} %. "
        f"Of these, on the Pareto front: {listed or 'none'}."
    )
