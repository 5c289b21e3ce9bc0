"""The JSON and the page of a measurement, and its short form for a terminal.

In: the result of ``bench gateway``, ``engine`` or ``soak``; of ``rehearsal`` and
``documents`` the files alone. Out: two files, a table. Measures nothing; the page is
filled into the frame of the calibrators' comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from int8qa.bench.documents_page import render_documents
from int8qa.bench.figures import plot_cdf, plot_fill, plot_rates, plot_time
from int8qa.bench.provenance import drop_command, list_facts
from int8qa.bench.rehearsal_page import render_rehearsal
from int8qa.bench.soak_figure import plot_soak
from int8qa.build.comparison.frame import (
    bundle,
    drop_nonfinite,
    list_grids,
    render_frame,
)
from int8qa.build.comparison.parts import Json, format_number

_HERE = Path(__file__).parent


def check_output(output: Path) -> None:
    """Make the report's directory.

    Raises:
        RepositoryError: it cannot be written.
    """
    from int8qa.errors import RepositoryError

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepositoryError(
            f"cannot write the report to {output}: {error.strerror}"
        ) from error


def write_report(result: Json, output: Path) -> tuple[Path, Path]:
    """Write ``KIND.json`` and ``KIND.html``, of the result's own kind."""
    kind = result["kind"]
    render = {
        "gateway": render_gateway,
        "engine": render_engine,
        "soak": render_soak,
        "rehearsal": render_rehearsal,
        "documents": render_documents,
    }[kind]
    return write_files(result, output, kind, render)


def write_files(
    result: Json, output: Path, name: str, render: Callable[[Json], str]
) -> tuple[Path, Path]:
    """Write ``name.json`` and the page that ``render`` makes of it, ``name.html``."""
    data, page = output / f"{name}.json", output / f"{name}.html"
    clean = drop_nonfinite(result)
    text = json.dumps(clean, indent=2, ensure_ascii=False)
    data.write_text(text + "\n", encoding="utf-8")
    page.write_text(render(clean), encoding="utf-8")
    return data, page


def render_gateway(result: Json) -> str:
    """The page of ``int8qa bench gateway``."""
    runs = result["runs"]
    return render_frame(
        _HERE / "gateway.html",
        result=result,
        filename="int8qa-bench-gateway.json",
        verdict=write_verdict(result),
        provenance=result["provenance"],
        facts=_list_facts(result),
        tiles=_list_tiles(result),
        figures={
            "cdf": bundle(plot_cdf(result)),
            "rates": bundle(plot_rates(result)),
            "time": bundle(plot_time(result)),
            "fill": bundle(plot_fill(result)),
        },
        tests=tabulate_tests(runs),
        contents=[("headline", "the figures quoted"), ("runs", f"{len(runs)} tests")],
    )


def render_engine(result: Json) -> str:
    """The page of ``int8qa bench engine``."""
    grid = result["grid"] | {"variant": result["checkpoint"]}
    return render_frame(
        _HERE / "engine.html",
        result=result,
        filename="int8qa-bench-engine.json",
        verdict=write_engine_verdict(result),
        provenance=result["provenance"],
        facts=drop_command(list_facts(result["provenance"])),
        tiles=[],
        figures={},
        grid=grid,
        grids=list_grids(grid),
        times=tabulate_times(result),
        contents=[("latency", f"{len(result['latency'])} shapes")],
    )


def render_soak(result: Json) -> str:
    """The page of ``int8qa bench soak``."""
    return render_frame(
        _HERE / "soak.html",
        result=result,
        filename="int8qa-bench-soak.json",
        verdict=write_soak_verdict(result),
        provenance=result["provenance"],
        facts=drop_command(list_facts(result["provenance"])),
        tiles=[],
        figures={"curves": bundle(plot_soak(result))},
        processes=tabulate_processes(result),
        requests=tabulate_requests(result),
        contents=[("requests", f"{sum(result['sent'].values()):,} requests")],
    )


def write_verdict(result: Json) -> str:
    """The headline in a sentence."""
    rows = {row["precision"]: row for row in result["headline"]}
    int8, fp16 = rows.get("int8"), rows.get("fp16")
    parts = []
    if int8 and fp16:
        single, rival = int8["single_stream_ms"], fp16["single_stream_ms"]
        if single and rival:
            parts.append(f"{rival['p50'] / single['p50']:.2f}× as fast for one client")
        for key, words in (("offline_qps", "offline"), ("server_qps", "as a server")):
            if int8[key] and fp16[key]:
                ratio = int8[key] / fp16[key]
                parts.append(f"{ratio:.2f}× the questions per second {words}")
    if not parts:
        return "INT8 and FP16 were not both measured by valid tests."
    return f"INT8 against FP16, through HTTP: {', '.join(parts)}."


def write_engine_verdict(result: Json) -> str:
    """INT8's speed against each float, over all shapes."""
    parts = [
        f"{gain:.2f}× as fast as {rival.upper()}"
        for rival, gain in result["int8_gain"].items()
    ]
    if not parts:
        return "INT8 and a float were not both measured."
    return f"INT8 is {' and '.join(parts)}, geometric mean of all shapes."


def write_soak_verdict(result: Json) -> str:
    """What was asked, and whether anything was lost or grew."""
    asked = (
        f"{sum(result['sent'].values()):,} requests in {result['duration_s']:.0f} s, "
        f"{result['rate']:g} a second: "
    )
    return asked + ("; ".join(result["problems"]) or "nothing lost, nothing grew") + "."


def tabulate_headline(result: Json) -> dict[str, Any]:
    """A row for each precision: what is quoted."""
    bound = f"{result['rules']['bound_ms']:g} ms"
    head = ("", "SingleStream p50 | p90 | p99, ms", "Offline, questions/s")
    rows = []
    for row in result["headline"]:
        single = row["single_stream_ms"] or {}
        rows.append(
            (
                row["precision"].upper(),
                " | ".join(format_number(single.get(p)) for p in ("p50", "p90", "p99")),
                format_number(row["offline_qps"]),
                format_number(row["server_qps"]),
            )
        )
    return {"head": (*head, f"Server, questions/s with p99 ≤ {bound}"), "rows": rows}


def tabulate_tests(runs: Sequence[Json]) -> dict[str, Any]:
    """A row for each test."""
    rows = []
    for run in runs:
        latency = run["latency_ms"] or {}
        rows.append(
            (
                f"{run['scenario']} {run['precision'].upper()}",
                format_number(run["target_qps"]),
                f"{run['queries']:,}",
                format_number(run["throughput_qps"]),
                *(format_number(latency.get(p)) for p in ("p50", "p99", "max")),
                format_number(run["generator"]["lag_ms_p99"]),
                "valid" if run["valid"] else "; ".join(run["reasons"]) or "invalid",
            )
        )
    head = ("Test", "asked/s", "questions", "answered/s", "p50 ms", "p99 ms", "max ms")
    return {"head": (*head, "generator's lag p99, ms", "verdict"), "rows": rows}


def tabulate_times(result: Json) -> dict[str, Any]:
    """A row for each shape."""
    rows = []
    for shape, by_name in result["latency"].items():
        batch = int(shape.partition("x")[0])
        cells = [shape.replace("x", "×")]
        for latency in by_name.values():
            p50, p99 = latency["p50_ms"], latency["p99_ms"]
            cells.append(f"{format_number(p50)} / {format_number(p99)}")
            cells.append(format_number(1e3 * batch / p50))
        rows.append(tuple(cells))
    names = [
        heading
        for name in result["precisions"]
        for heading in (f"{name.upper()} ms", "windows/s")
    ]
    return {"head": ("batch × tokens", *names), "rows": rows}


def tabulate_processes(result: Json) -> dict[str, Any]:
    """A row for each process that was watched."""
    rows = [
        (
            process["name"],
            *(format_number(mib) for mib in process["rss_mib"].values()),
            *(f"{count:,}" for count in process["descriptors"].values()),
        )
        for process in result["processes"]
    ]
    head = ("Process", "MiB after warm-up", "at the end", "descriptors", "at the end")
    return {"head": head, "rows": rows}


def tabulate_requests(result: Json) -> dict[str, Any]:
    """What was sent, what came back, what did not."""
    rows = [
        *((f"sent: {kind}", f"{count:,}") for kind, count in result["sent"].items()),
        *((f"HTTP {code}", f"{count:,}") for code, count in result["statuses"].items()),
        ("clients that left", f"{result['cancelled']:,}"),
        ("lost", f"{result['lost']:,}"),
        ("late", f"{result['late']:,}"),
    ]
    return {"head": ("", "requests"), "rows": rows}


def _list_facts(result: Json) -> list[tuple[str, str]]:
    provenance, gateway = result["provenance"], result["gateway"]
    return [
        *drop_command(list_facts(provenance)),
        ("LoadGen", provenance["loadgen"]),
        ("Questions", f"{provenance['data']}, {provenance['questions']:,}"),
        ("Gateway", f"{gateway['url']}, build {gateway['build_id']}"),
    ]


def _list_tiles(result: Json) -> list[dict[str, Any]]:
    rows = result["headline"]
    bound = f"{result['rules']['bound_ms']:g} ms"

    def tile(label: str, values: list[Any], detail: str) -> dict[str, Any]:
        named = [
            (format_number(value), row["precision"].upper())
            for value, row in zip(values, rows, strict=True)
        ]
        return {"label": label, "values": named, "detail": detail}

    single = [(row["single_stream_ms"] or {}).get("p50") for row in rows]
    return [
        tile("SingleStream", single, "median milliseconds, one client"),
        tile("Offline", [row["offline_qps"] for row in rows], "questions per second"),
        tile(
            "Server",
            [row["server_qps"] for row in rows],
            f"questions per second with p99 ≤ {bound}",
        ),
    ]
