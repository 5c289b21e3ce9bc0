"""Where panels go: rows from top to bottom, panels from left to right.

In: rows of panels with their widths. Out: a dashboard whose panels have places on
Grafana's grid and ids, without overlap. Knows nothing of what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.models import dashboard as model

from boards.panels import DATA_SOURCE, Placed

GRID_COLUMNS = 24


@dataclass(frozen=True)
class Row:
    """A titled row; its panels share one height, and break where 24 is full."""

    title: str
    height: int
    panels: Sequence[Placed]


def place_panels(board: boards.Dashboard, rows: Sequence[Row]) -> boards.Dashboard:
    """Add rows from top to bottom and panels from left to right.

    Raises:
        ValueError: a panel is wider than the grid.
    """
    number, y = 1, 0
    for row in rows:
        board = board.with_row(
            boards.Row(row.title)
            .id(number)
            .collapsed(False)
            .grid_pos(model.GridPos(h=1, w=GRID_COLUMNS, x=0, y=y))
        )
        number, y, x = number + 1, y + 1, 0
        for placed in row.panels:
            if placed.columns > GRID_COLUMNS:
                raise ValueError(
                    f"{row.title}: a panel has {placed.columns} columns; the grid "
                    f"has {GRID_COLUMNS}"
                )
            if x + placed.columns > GRID_COLUMNS:
                x, y = 0, y + row.height
            place = model.GridPos(h=row.height, w=placed.columns, x=x, y=y)
            board = board.with_panel(placed.panel.id(number).grid_pos(place))
            number, x = number + 1, x + placed.columns
        y += row.height
    return board


def annotate(name: str, expr: str, color: str) -> boards.AnnotationQuery:
    """Mark on every panel when ``expr`` gave something."""
    return (
        boards.AnnotationQuery()
        .name(name)
        .datasource(DATA_SOURCE)
        .enable(True)
        .icon_color(color)
        .expr(expr)
    )
