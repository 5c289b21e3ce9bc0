"""The JSON and the page of a plan, and its tables for a terminal.

In: the result of ``int8qa plan``. Out: two files, and tables. Computes nothing; the
page is filled into the frame of the calibrators' comparison.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from int8qa.bench.provenance import list_facts
from int8qa.bench.report import write_files
from int8qa.build.comparison.frame import bundle, render_frame
from int8qa.build.comparison.parts import Json, format_number, format_percent
from int8qa.planning.figures import plot_fleet, plot_load
from int8qa.planning.validation import write_verdict as write_validation_verdict

_TEMPLATE = Path(__file__).parent / "plan.html"
_OVERHEADS = {
    "request_s": "a request beside its batch",
    "call_s": "a batch on its way through Triton",
    "interference_s": "engine time lost to each request",
    "cold_s": "engine time that a batch takes more after a pause",
}


def write_report(result: Json, output: Path) -> tuple[Path, Path]:
    """Write ``plan.json`` and ``plan.html``."""
    return write_files(result, output, "plan", render_page)


def render_page(result: Json) -> str:
    """The page of ``int8qa plan``."""
    # Where it was planned is beside the point; where it was measured is not.
    beside = ("Machine", "System", "Command")
    return render_frame(
        _TEMPLATE,
        result=result,
        filename="int8qa-plan.json",
        verdict=write_verdict(result),
        provenance=result["provenance"],
        facts=[
            fact for fact in list_facts(result["provenance"]) if fact[0] not in beside
        ],
        tiles=_list_tiles(result),
        figures={
            "fleet": bundle(plot_fleet(result)),
            "load": bundle(plot_load(result)),
        },
        plan=tabulate_plan(result),
        sources=tabulate_sources(result),
        validation=tabulate_validation(result),
        validation_verdict=write_validation_verdict(result["validation"]),
        traffic=describe_traffic(result),
        contents=[
            ("precisions", f"{len(result['precisions'])} plans, what was simulated"),
            ("curve", f"{len(result['curve'])} rates"),
            ("validation", f"{len(result['validation'])} tests"),
        ],
    )


def write_verdict(result: Json) -> str:
    """The answer in a sentence or two."""
    asked = result["asked"]
    aim = f"{asked['rate_qps']:g} questions/s with p99 ≤ {asked['bound_ms']:g} ms"
    parts, hopeless = [], []
    for name, row in result["precisions"].items():
        if row["plan"] is None:
            hopeless.append(
                f"No number of {name.upper()} does: its p99 is "
                f"{format_number(row['lone']['p99']['ms'])} ms for questions that "
                f"hardly meet"
            )
            continue
        price = row["cost_per_million"]
        parts.append(
            f"{row['plan']['replicas']:,} replicas in {name.upper()}"
            + (
                ""
                if price is None
                else f" ({format_number(price)} a million questions)"
            )
        )
    found = f"{aim} takes {', '.join(parts)}." if parts else f"{aim}:"
    return " ".join([found, *(f"{text}." for text in hopeless)])


def tabulate_plan(result: Json) -> dict[str, Any]:
    """A row for each precision."""
    rows = []
    for name, row in result["precisions"].items():
        plan = row["plan"]
        if plan is None:
            rows.append((name.upper(), "none", *["–"] * 7))
            continue
        rows.append(
            (
                name.upper(),
                f"{plan['replicas']:,}",
                f"{100 * plan['utilisation']:.0f} %",
                *(_format_interval(plan[p]) for p in ("p50", "p95", "p99")),
                format_number(row["replica_limit_qps"]),
                format_number(row["gateway_cores"]),
                format_number(row["cost_per_million"]),
            )
        )
    return {
        "head": (
            "",
            "replicas",
            "engine busy",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "most questions/s each",
            "gateway cores",
            "cost per million",
        ),
        "rows": rows,
    }


def tabulate_sources(result: Json) -> dict[str, Any]:
    """Where each input of the plan comes from."""
    rows = []
    for name, row in result["precisions"].items():
        costs = row["costs"]
        text = f"{costs['measured']} of {costs['shapes']} shapes measured by "
        text += f"{costs['source']} on {costs['machine']}"
        if costs["measured"] < costs["shapes"]:
            error = costs["fit_error"]
            text += ", the others fitted " + (
                "with nothing left to check the fit"
                if error is None
                else f"within {format_percent(error)}"
            )
        rows.append((name.upper(), "engine times", "", text))
        rows += [
            (name.upper(), _OVERHEADS[key], f"{found['ms']:.2f} ms", found["source"])
            for key, found in row["overheads"].items()
        ]
        spread = row["spread"]
        share = f"×/÷ {math.exp(spread['log']):.2f}"
        rows.append((name.upper(), "spread of a batch's time", share, spread["source"]))
        plan = row["plan"]
        if plan is not None:
            how = "one replica simulated, which stands for all"
            if not plan["extrapolated"]:
                how = "all replicas simulated together"
            rows.append((name.upper(), "latency", "", how))
    return {"head": ("", "of", "is", "source"), "rows": rows}


def tabulate_validation(result: Json) -> dict[str, Any]:
    """A row for each Server test."""
    rows = []
    for row in result["validation"]:
        cells = [row["precision"].upper(), format_number(row["rate_qps"])]
        if row["skipped"] is not None:
            rows.append((*cells, *["–"] * 7, row["skipped"]))
            continue
        for name in ("p50", "p99"):
            found = row[name]
            low, high = (format_number(ms) for ms in found["spread_ms"])
            cells += [
                format_number(found["measured_ms"]),
                format_number(found["predicted_ms"]),
                f"{100 * found['error']:+.1f} %",
            ]
        rows.append((*cells, f"{low}–{high}", ""))
    return {
        "head": (
            "",
            "questions/s",
            *("p50 measured", "predicted", "error"),
            *("p99 measured", "predicted", "error"),
            "p99 by chance",
            "left out",
        ),
        "rows": rows,
    }


def describe_traffic(result: Json) -> str:
    """The lengths in a sentence."""
    traffic = result["traffic"]
    name = {"own": "the package's own"}.get(traffic["name"], traffic["name"])
    return (
        f"{traffic['questions']:,} questions ({name}), {traffic['windows_mean']:.2f} "
        f"windows and {traffic['tokens_mean']:.0f} tokens each in the mean, and "
        f"{format_percent(traffic['padding_share'])} of what engines compute is "
        f"padding."
    )


def _format_interval(interval: Json) -> str:
    return f"{format_number(interval['ms'])} ± {format_number(interval['margin_ms'])}"


def _list_tiles(result: Json) -> list[dict[str, Any]]:
    asked, rows = result["asked"], result["precisions"].items()
    aim = f"{asked['rate_qps']:g}/s, p99 ≤ {asked['bound_ms']:g} ms"

    def tile(label: str, values: list[str], detail: str) -> dict[str, Any]:
        named = [
            (value, name.upper()) for value, (name, _) in zip(values, rows, strict=True)
        ]
        return {"label": label, "values": named, "detail": detail}

    plans = [row["plan"] for _, row in rows]
    tiles = [
        tile("Replicas", [f"{p['replicas']:,}" if p else "none" for p in plans], aim),
        tile(
            "Engines busy",
            [f"{100 * p['utilisation']:.0f} %" if p else "–" for p in plans],
            "of the time",
        ),
    ]
    if asked["price_per_hour"] is not None:
        costs = [format_number(row["cost_per_million"]) for _, row in rows]
        detail = f"at {asked['price_per_hour']:g} per replica and hour"
        tiles.append(tile("A million questions", costs, detail))
    return tiles
