"""What the figures of a calibrator comparison are made of.

In: texts and numbers. Out: pieces of plotly.js figures. Colours are names of CSS
properties, ``var(--ink)``, so that the page alone knows light from dark. Knows nothing
of the result.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]

_PERCENTILE_SYMBOLS = ("circle", "square", "diamond", "pentagon")
_STYLES = {
    "max": ("var(--max)", "triangle-up"),
    "mse": ("var(--mse)", "cross"),
    "entropy": ("var(--entropy)", "x"),
    "search": ("var(--search)", "star"),
}


@dataclass(frozen=True)
class Choice:
    """One figure among those a reader may switch between."""

    label: str
    figure: dict[str, Any]
    description: str
    """What the figure shows, in words and numbers; plain text."""
    group: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default=())
    """A table beneath the figure; plain text."""
    height: int = 440
    """CSS pixels."""


def calibrator_styles(calibrators: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each calibrator, the same in every figure.

    Names keep their order; percentiles take their shades by how much they keep.
    """
    names = list(dict.fromkeys(calibrators))
    percentiles = sorted(name for name in names if name.startswith("percentile"))
    styles: dict[str, tuple[str, str]] = {}
    for name in names:
        if name in percentiles:
            rank = percentiles.index(name) % len(_PERCENTILE_SYMBOLS)
            styles[name] = (f"var(--percentile-{rank + 1})", _PERCENTILE_SYMBOLS[rank])
        else:
            styles[name] = _STYLES.get(name, ("var(--other)", "hexagon"))
    return styles


def make_note(text: str, **place: Any) -> dict[str, Any]:
    """A text in a figure, without an arrow; ``text`` must be escaped already."""
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "xanchor": "left",
        "font": {"size": 12, "color": "var(--muted)"},
    } | place


def lay_out(**parts: Any) -> dict[str, Any]:
    """A layout on the page's own ground."""
    base = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 13},
        "hoverlabel": {
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
            "align": "left",
        },
    }
    return base | parts


def make_axis(title: str, suffix: str = "", **parts: Any) -> dict[str, Any]:
    """An axis with quiet lines."""
    return {
        "title": {"text": title, "font": {"size": 13}},
        "ticksuffix": suffix,
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
    } | parts


def escape_text(text: str) -> str:
    """For plotly, which reads every text as a small HTML."""
    return html.escape(str(text), quote=False)


def format_percent(share: float | None) -> str:
    """A share of 0-1 in percent; a dash if it was not measured."""
    return "–" if share is None else f"{100 * share:.1f} %"


def format_number(value: float | None) -> str:
    """Three significant digits; a dash if it was not measured."""
    return "–" if value is None else f"{value:#.3g}".removesuffix(".")
