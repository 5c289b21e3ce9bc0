"""The page of ``bench documents``: cost over length, its tables, its verdict.

In: the result. Out: a document, and a table for a terminal too. Measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from int8qa.bench.gateway_metrics import STAGES
from int8qa.bench.provenance import drop_command, list_facts
from int8qa.build.comparison.frame import bundle, render_frame
from int8qa.build.comparison.parts import (
    Choice,
    Json,
    escape_text,
    format_number,
    lay_out,
    make_axis,
)

_TEMPLATE = Path(__file__).parent / "documents.html"


def render_documents(result: Json) -> str:
    """The page of ``int8qa bench documents``."""
    provenance = result["provenance"]
    rows = result["documents"]
    return render_frame(
        _TEMPLATE,
        result=result,
        filename="int8qa-bench-documents.json",
        verdict=write_documents_verdict(result),
        provenance=provenance,
        facts=[
            *drop_command(list_facts(provenance)),
            ("Precision", result["precision"]),
            ("Texts", provenance["data"]),
        ],
        tiles=[],
        figures={"cost": bundle([plot_documents(result)])},
        documents=tabulate_documents(result),
        neighbours=tabulate_neighbours(result),
        contents=[("documents", f"{len(rows)} lengths")],
    )


def write_documents_verdict(result: Json) -> str:
    """What a window costs in a short and in the longest document, and its memory."""
    rows, ratio, memory = (
        result[key] for key in ("documents", "cost_ratio", "memory_mib")
    )
    last = rows[-1]
    plural = "" if last["windows"] == 1 else "s"
    text = (
        f"A document of {last['windows']} window{plural} takes "
        f"{format_number(last['median_s'])} s, {format_number(last['ms_per_window'])} "
        f"ms a window"
    )
    if ratio is not None:
        text += f", {ratio:.2f}× what a window of a short one takes"
    if memory:
        grown = memory["peak"] - memory["before"]
        text += f"; the gateway's memory rose by {grown:.0f} MiB at most"
    beside = result["neighbours"]
    if beside["alone_ms"] and beside["beside_ms"]:
        alone_ms, beside_ms = (beside[key]["p50"] for key in ("alone_ms", "beside_ms"))
        text += (
            f". A question beside it takes {format_number(beside_ms)} ms (p50), alone "
            f"{format_number(alone_ms)}"
        )
    return text + "."


def tabulate_documents(result: Json) -> dict[str, Any]:
    """A row for each length."""
    rows = [
        (
            f"{row['windows']:,}",
            f"{row['chars']:,}",
            format_number(row["median_s"]),
            format_number(row["ms_per_window"]),
            *(format_number(row["stages_ms"][stage]) for stage in STAGES),
        )
        for row in result["documents"]
    ]
    head = ("Windows", "characters", "seconds", "ms per window")
    return {"head": (*head, *(f"{stage} ms" for stage in STAGES)), "rows": rows}


def tabulate_neighbours(result: Json) -> dict[str, Any]:
    """Single-window questions without and with a document beside them."""
    seen = result["neighbours"]
    names = (
        ("nothing beside them", seen["alone_ms"]),
        (f"{seen['windows']} windows beside them", seen["beside_ms"]),
    )
    rows = [
        (
            name,
            f"{ms['asked']:,}" if ms else "0",
            *(format_number(ms[key] if ms else None) for key in ("p50", "p99", "max")),
        )
        for name, ms in names
    ]
    return {"head": ("", "asked", "p50 ms", "p99 ms", "max ms"), "rows": rows}


def plot_documents(result: Json) -> Choice:
    """Seconds over windows, both logarithmic, beside the line of proportion."""
    rows = result["documents"]
    windows = [row["windows"] for row in rows]
    last = rows[-1]
    figure = {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "name": "in proportion to the longest",
                "x": windows,
                "y": [last["median_s"] * n / last["windows"] for n in windows],
                "line": {"color": "var(--muted)", "width": 1, "dash": "dash"},
            },
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape_text(f"{result['precision'].upper()}, median"),
                "x": windows,
                "y": [row["median_s"] for row in rows],
                "line": {"color": "var(--recipe-1)", "width": 2},
            },
        ],
        "layout": lay_out(
            xaxis=make_axis("windows", type="log"),
            yaxis=make_axis("seconds", type="log"),
            legend={"orientation": "h", "y": -0.2},
            margin={"l": 70, "r": 16, "t": 16, "b": 50},
        ),
    }
    points = ", ".join(f"{row['windows']}: {row['median_s']:g} s" for row in rows)
    return Choice(
        label="Cost",
        figure=figure,
        description=f"Seconds for a document by its windows: {points}.",
    )
