"""The table, the sentence and the page of ``bench peers``.

In: its result. Out: cells, words, a page that opens without a network, and the
README's table. Measures nothing, and leaves out nobody: who did not run has a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from int8qa.bench.figures import COLOURS
from int8qa.bench.peer_scores import compare_reference, compare_rounds
from int8qa.bench.peers import CEILING, REFERENCE, STOCK
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
from int8qa.build.comparison.table import format_ms

_TEMPLATE = Path(__file__).parent / "peers.html"
_SHOWN_PINS = ("litserve", "onnxruntime", "transformers", "torch", "tritonclient")
HEAD = (
    "",
    "precision",
    "questions/s",
    "p50",
    "p99",
    "F1",
    "int8qa INT8 against it",
)


def tabulate_peers(result: Json) -> dict[str, Any]:
    """A row for each contestant, in the result's order."""
    rows = []
    for row in result["contestants"]:
        name = (row["title"], row["precision"].upper())
        if row["qps"] is None:
            rows.append((*name, f"not run: {row['reason']}", *["–"] * 4))
            continue
        ratio = compare_reference(result, row["name"])
        note = "" if row["status"] == "measured" else " (failed later)"
        rows.append(
            (
                *name,
                format_number(row["qps"]) + note,
                f"{format_ms(row['p50_ms'])} ms",
                f"{format_ms(row['p99_ms'])} ms",
                f"{row['f1']:.1f}",
                "–" if ratio is None else f"{ratio:.2f}×",
            )
        )
    return {"head": HEAD, "rows": rows}


def tabulate_tuning(result: Json) -> dict[str, Any]:
    """Everything that was tried, and what was taken."""
    rows = []
    for row in result["contestants"]:
        for run in row["tuning"]:
            taken = (row["variant"], row["concurrency"])
            rows.append(
                (
                    row["name"],
                    run["variant"],
                    str(run["concurrency"]),
                    format_number(run["qps"]),
                    f"{format_ms(run['p99_ms'])} ms",
                    _list_failures(run),
                    "taken" if (run["variant"], run["concurrency"]) == taken else "",
                )
            )
    head = ("", "variant", "at once", "questions/s", "p99", "failed requests", "")
    return {"head": head, "rows": rows}


def tabulate_rounds(result: Json) -> dict[str, Any]:
    """Every measurement."""
    rows = [
        (
            row["name"],
            str(run["round"]),
            format_number(run["qps"]),
            f"{format_ms(run['p50_ms'])} ms",
            f"{format_ms(run['p99_ms'])} ms",
            _list_failures(run),
            f"{format_ms(run['load_cpu_ms'])} ms",
        )
        for row in result["contestants"]
        for run in row["runs"]
    ]
    head = ("", "round", "questions/s", "p50", "p99", "failed requests")
    return {"head": (*head, "loader's CPU a question"), "rows": rows}


def write_peers_verdict(result: Json) -> str:
    """INT8 through HTTP against its ceiling and against each peer."""
    parts, graph = [], ""
    for row in result["contestants"]:
        precision = row["precision"]
        if row["group"] == "engine":
            share = compare_rounds(result, f"int8qa-{precision}", row["name"])
            if share is not None:
                parts.append(
                    f"{100 * share:.0f} % of the engine alone in {precision.upper()}"
                )
        elif row["name"] == STOCK:
            gain = compare_rounds(result, CEILING, STOCK)
            if gain is not None:
                graph = (
                    f" The INT8 engine alone answers {gain:.2f}× as many as the stock "
                    f"graph."
                )
        elif row["name"] != REFERENCE:
            ratio = compare_reference(result, row["name"])
            if ratio is not None:
                name = f"int8qa {precision.upper()}"
                name = name if row["group"] == "int8qa" else row["group"]
                parts.append(f"{ratio:.2f}× {name}")
    if not parts:
        return "int8qa and somebody to compare it with were not both measured."
    return f"Questions per second through HTTP: {', '.join(parts)}.{graph}"


def list_peer_facts(result: Json) -> list[tuple[str, str]]:
    """Machine, versions, data and rules: name and text."""
    provenance, rules = result["provenance"], result["rules"]
    pins = {
        name: version
        for row in result["contestants"]
        for name, version in row["versions"].items()
        if name in _SHOWN_PINS
    }
    cores = ", ".join(map(str, rules["cores"]))
    load = rules["pinning"] or "not pinned"
    return [
        *list_facts(provenance),
        ("Peers", ", ".join(f"{name} {version}" for name, version in pins.items())),
        ("Questions", f"{provenance['data']}, {provenance['questions']:,}"),
        ("Build", f"{result['checkpoint']}, {result['build_id'][:12]}"),
        ("Cores", f"services {cores}; what loads them: {load}"),
        ("Rounds", f"{rules['rounds']}, in turns, every second one in reverse order"),
    ]


def render_peers(result: Json) -> str:
    """The page."""
    facts = drop_command(list_peer_facts(result))
    return render_frame(
        _TEMPLATE,
        result=result,
        filename="int8qa-bench-peers.json",
        verdict=write_peers_verdict(result),
        provenance=result["provenance"],
        facts=facts,
        tiles=[],
        figures={"speed": bundle(plot_speed(result))},
        tuning=tabulate_tuning(result),
        rounds=tabulate_rounds(result),
        contents=[("contestants", f"{len(result['contestants'])} contestants")],
    )


def plot_speed(result: Json) -> list[Choice]:
    """Questions per second: a bar for each contestant, its rounds as whiskers."""
    rows = [row for row in result["contestants"] if row["qps"] is not None]
    if not rows:
        return []
    names = [f"{row['title']}, {row['precision'].upper()}" for row in rows]
    rates = [[run["qps"] for run in row["runs"]] for row in rows]
    figure = {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": [escape_text(name) for name in names],
                "x": [row["qps"] for row in rows],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [
                        max(qps) - row["qps"]
                        for qps, row in zip(rates, rows, strict=True)
                    ],
                    "arrayminus": [
                        row["qps"] - min(qps)
                        for qps, row in zip(rates, rows, strict=True)
                    ],
                    "color": "var(--muted)",
                },
                "marker": {"color": [COLOURS[row["precision"]] for row in rows]},
                "hovertemplate": "%{x:.1f} questions/s<extra></extra>",
            }
        ],
        "layout": lay_out(
            xaxis=make_axis("questions per second", rangemode="tozero"),
            yaxis={"automargin": True, "autorange": "reversed"},
            margin={"l": 70, "r": 16, "t": 16, "b": 50},
        ),
    }
    table = tabulate_peers(result)
    words = "; ".join(
        f"{name}: {format_number(row['qps'])} questions/s"
        for name, row in zip(names, rows, strict=True)
    )
    return [
        Choice(
            "Throughput",
            figure,
            f"{words}.",
            head=table["head"],
            rows=table["rows"],
            height=120 + 44 * len(rows),
        )
    ]


def write_markdown(result: Json) -> str:
    """The README's table, and beneath it where it comes from."""
    table = tabulate_peers(result)
    lines = [
        "| " + " | ".join(table["head"]) + " |",
        "| " + " | ".join("---" for _ in table["head"]) + " |",
        *(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in table["rows"]
        ),
    ]
    provenance, rules = result["provenance"], result["rules"]
    machine = provenance["machine"]
    source = (
        f"{provenance['questions']:,} questions of {provenance['data']}, "
        f"{rules['rounds']} rounds in turns, each at the configuration and concurrency "
        f"it is fastest with; {machine['cores']} cores of {machine['processor']}, "
        f"which the load generator shares; {provenance['started_at'][:10]}. "
        f"{write_peers_verdict(result)}"
    )
    lines += ["", source]
    return "\n".join(lines)


def _list_failures(run: Json) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in run["failures"].items())
