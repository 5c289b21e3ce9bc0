"""The page of a rehearsal: its time line, its tables, its verdict.

In: the result of ``int8qa bench rehearsal``. Out: a document, and tables for a terminal
too. The time line has latency, requests and who was there. Measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from int8qa.bench.provenance import drop_command, list_facts
from int8qa.build.comparison.frame import bundle, render_frame
from int8qa.build.comparison.parts import (
    Choice,
    Json,
    escape_text,
    format_number,
    lay_out,
    make_axis,
    make_note,
)

_TEMPLATE = Path(__file__).parent / "rehearsal.html"
_GATEWAYS = ("var(--recipe-3)", "var(--recipe-4)")
_ROWS = {"yaxis": (0.62, 1.0), "yaxis2": (0.30, 0.55), "yaxis3": (0.0, 0.22)}
"""Heights of latency, requests and Tritons, as shares of the figure."""


def render_rehearsal(result: Json) -> str:
    """The page of ``int8qa bench rehearsal``."""
    phases = result["phases"]
    facts = drop_command(list_facts(result["provenance"]))
    return render_frame(
        _TEMPLATE,
        result=result,
        filename="int8qa-bench-rehearsal.json",
        verdict=write_rehearsal_verdict(result),
        provenance=result["provenance"],
        facts=[*facts, ("Tritons", ", ".join(result["addresses"]))],
        tiles=[],
        figures={"timeline": bundle(plot_rehearsal(result))},
        phases=tabulate_phases(result),
        tritons=tabulate_tritons(result),
        builds=tabulate_builds(result),
        drain=f"When gateway 2 was told to end it had {result['under_way_at_drain']} "
        f"requests under way.",
        contents=[("phases", f"{len(phases)} phases"), ("seconds", "every second")],
    )


def write_rehearsal_verdict(result: Json) -> str:
    """What was asked, and whether anything failed."""
    rush, *phases = result["phases"]
    asked = sum(phase["asked"] for phase in phases)
    text = (
        f"{asked:,} requests in {phases[-1]['end_s'] - rush['end_s']:.0f} s, "
        f"{result['rate']:g} a second of {result['capacity']:g} possible: "
    )
    return text + ("; ".join(result["problems"]) or "none failed") + "."


def tabulate_phases(result: Json) -> dict[str, Any]:
    """A row for each phase of a rehearsal."""
    rows = [
        (
            phase["name"],
            f"{phase['end_s'] - phase['begin_s']:.0f}",
            f"{phase['answered']:,}",
            f"{sum(phase['failed'].values()):,}",
            *(_format_ms(phase[key]) for key in ("p50_ms", "p99_ms", "slowest_ms")),
            f"{sum(phase['sent_again'].values()):,}",
        )
        for phase in result["phases"]
    ]
    head = ("Phase", "seconds", "answered", "failed", "p50 ms", "p99 ms", "slowest ms")
    return {"head": (*head, "batches sent again"), "rows": rows}


def tabulate_tritons(result: Json) -> dict[str, Any]:
    """A row for each Triton and undisturbed phase."""
    rows = [
        (
            f"{use['phase']}, {use['triton']}",
            *(f"{use[key]:,}" for key in ("requests", "executions", "windows")),
            *(
                format_number(use[key])
                for key in ("requests_per_execution", "windows_per_execution")
            ),
            _format_ms(use["queue_ms"]),
        )
        for use in result["tritons"]
    ]
    head = ("", "requests", "executions", "windows", "requests per execution")
    return {"head": (*head, "windows per execution", "wait, ms"), "rows": rows}


def list_merging(result: Json) -> list[str]:
    """A line for each Triton and undisturbed phase: what it made of its requests."""
    return [
        f"{use['phase']}, Triton at {use['triton']}: {use['requests']:,} requests in "
        f"{use['executions']:,} executions, of "
        f"{format_number(use['windows_per_execution'])} windows"
        for use in result["tritons"]
    ]


def tabulate_builds(result: Json) -> dict[str, Any]:
    """What the newer build's gateway sent, and what its Triton computed."""
    windows = result["newer_windows"]
    rows = [
        ("by the newer Triton, before its gateway came", f"{result['early_windows']}"),
        ("sent by the newer build's gateway", f"{windows['sent']:,}"),
        ("computed by the newer build's Triton", f"{windows['computed']:,}"),
    ]
    return {"head": ("", "windows"), "rows": rows}


def plot_rehearsal(result: Json) -> list[Choice]:
    """Latency, requests a second, and the Tritons each gateway used; one axis of time.

    A line stands where something was done; the phases' names are above.
    """
    seconds, serving = result["seconds"], result["serving"]
    x = seconds["time_s"]
    data = [
        _draw_line("slowest", x, seconds["slowest_ms"], "var(--recipe-2)"),
        _draw_line("median", x, seconds["p50_ms"], "var(--recipe-1)"),
        _draw_bars("answered", x, seconds["answered"], "var(--bars)"),
        _draw_bars("failed", x, seconds["failed"], "var(--fails)"),
    ]
    for number, counts in enumerate(serving["gateways"]):
        line = _draw_line(
            f"gateway {number + 1}", serving["time_s"], counts, _GATEWAYS[number % 2]
        )
        # A little apart, or one would hide the other.
        line["y"] = [None if n is None else n + 0.06 * number for n in counts]
        line["line"] |= {"shape": "hv"}
        data.append(line | {"mode": "lines", "yaxis": "y3", "hoverinfo": "skip"})
    end_s = result["phases"][-1]["end_s"]
    layout = lay_out(
        xaxis=make_axis("seconds", anchor="y3", range=[0, end_s]),
        yaxis=make_axis("latency, ms", type="log", domain=_ROWS["yaxis"]),
        yaxis2=make_axis("requests/s", rangemode="tozero", domain=_ROWS["yaxis2"]),
        yaxis3=make_axis(
            "Tritons used", range=[-0.2, 3.4], dtick=1, domain=_ROWS["yaxis3"]
        ),
        barmode="stack",
        bargap=0.1,
        legend={"orientation": "h", "y": -0.12},
        margin={"l": 70, "r": 16, "t": 60, "b": 50},
        shapes=[_draw_mark(event["at_s"], "dot", 1) for event in result["events"]]
        + [_draw_mark(phase["begin_s"], "solid", 1.5) for phase in result["phases"]],
        annotations=[
            make_note(
                escape_text(phase["name"]),
                xref="x",
                x=phase["begin_s"],
                yref="paper",
                # At two heights in turn, or short phases' names would overlap.
                y=1.0 + 0.035 * (number % 2),
                yanchor="bottom",
            )
            for number, phase in enumerate(result["phases"])
        ],
    )
    words = "; ".join(
        f"{phase['name']}: {phase['answered']} of {phase['asked']} answered, slowest "
        f"{_format_ms(phase['slowest_ms'])} ms"
        for phase in result["phases"]
    )
    return [
        Choice(
            "Time line",
            {"data": data, "layout": layout},
            f"{words}.",
            head=("second", "what was done"),
            rows=[
                (f"{event['at_s']:.1f}", event["what"]) for event in result["events"]
            ],
            height=620,
        )
    ]


def _format_ms(value: float | None) -> str:
    """Seconds are no rarity here: 3,950, and not 3.95e+03."""
    return "–" if value is None else f"{value:,.{0 if value >= 10 else 1}f}"


def _draw_line(name: str, x: Any, y: Any, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "marker": {"size": 4},
        "name": name,
        "x": x,
        "y": y,
        "connectgaps": False,
        "line": {"color": colour, "width": 2},
    }


def _draw_bars(name: str, x: Any, y: Any, colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "yaxis": "y2",
        "marker": {"color": colour},
    }


def _draw_mark(at_s: float, dash: str, width: float) -> dict[str, Any]:
    return {
        "type": "line",
        "x0": at_s,
        "x1": at_s,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"dash": dash, "width": width, "color": "var(--muted)"},
    }
