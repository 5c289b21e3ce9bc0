"""The frame of a page that opens without a network: style, figures, raw data.

In: a template that fills the frame, and its values. Out: a document that holds its
scripts, its figures and the result itself. Knows not what was measured. Everything
taken from a result is escaped: by Jinja2 in HTML and in JSON, by whoever makes the
figures in what plotly reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8qa.build.comparison.parts import Choice, Json
from int8qa.build.comparison.table import format_ms

_FULL_TONE = 0.8
"""Natural logarithm of the speed that gets the strongest colour: 2.2 times."""
_STRONGEST = 55
"""Percent of colour in that cell; beyond it the text would lose its contrast."""


def render_frame(template: Path, **values: Any) -> str:
    """The whole document.

    Args:
        template: extends ``frame.html``.
        values: what it needs, and the frame's own: ``result``, ``figures``,
            ``verdict``, ``tiles``, ``facts``, ``provenance``, ``contents``,
            ``filename`` of the JSON that the page offers.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Jinja2 would sort the keys, and with them the columns.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template.name).render(
        plotly_js=Markup(get_plotlyjs()),  # noqa: S704 - the library's own script
        **values,
    )


def drop_nonfinite(value: Any) -> Any:
    """A copy with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): drop_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [drop_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def bundle(choices: list[Choice], chosen: int = 0) -> dict[str, Any]:
    """Figures that a reader may switch between, as the frame reads them."""
    groups: dict[str, list[int]] = {}
    for i, choice in enumerate(choices):
        groups.setdefault(choice.group, []).append(i)
    return {
        "choices": [asdict(choice) for choice in choices],
        "chosen": chosen,
        "groups": groups,
    }


def list_grids(grid: Json | None) -> list[dict[str, Any]]:
    """A heat map per float: INT8's speed against it, by batch and length."""
    if not grid or not grid["ms"].get("int8"):
        return []
    int8 = grid["ms"]["int8"]
    return [
        {
            "rival": rival.upper(),
            "rows": [
                {
                    "batch": batch,
                    "cells": [
                        _make_heat(ours, theirs)
                        for ours, theirs in zip(int8[i], rivals[i], strict=True)
                    ],
                }
                for i, batch in enumerate(grid["batches"])
            ],
        }
        for rival in ("fp16", "fp32")
        if (rivals := grid["ms"].get(rival))
    ]


def _make_heat(ours: float | None, theirs: float | None) -> dict[str, Any] | None:
    if not ours or not theirs:
        return None
    speed = theirs / ours
    strength = min(abs(math.log(speed)) / _FULL_TONE, 1.0) * _STRONGEST
    return {
        "speed": f"{speed:.2f}×",
        "ours": format_ms(ours),
        "theirs": format_ms(theirs),
        "tone": "faster" if speed >= 1 else "slower",
        "strength": f"{strength:.0f}%",
    }
