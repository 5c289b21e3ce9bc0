"""The commands ``bench gateway``, ``engine``, ``documents``, ``soak``, ``rehearsal``.

In: arguments. Out: a table or JSON on standard output, progress on standard error, and
a directory with the report. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.bench.load import Scenario
from int8qa.bench.peer_commands import DataOption, bench_peers
from int8qa.build.arguments import JsonOption, RepositoryOption
from int8qa.client_commands import UrlOption
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError
from int8qa.settings import load_settings

SOAK_NEWS_S = 30.0
"""Between two lines of a soak's progress."""

OutputOption = Annotated[
    Path, typer.Option(help="Directory of the report: JSON, page, LoadGen's files.")
]
PrecisionOption = Annotated[
    list[Precision] | None,
    typer.Option(
        help="Repeat for several.  [default: all that there are]", show_default=False
    ),
]


def add_bench_commands(app: typer.Typer) -> None:
    """Register ``bench`` with ``app``."""
    bench = typer.Typer(
        help="Measure a running gateway, or the engines alone; run a gateway for long; "
        "rehearse failures of many. One report each.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    bench.command("gateway")(bench_gateway)
    bench.command("engine")(bench_engine)
    bench.command("documents")(bench_documents)
    bench.command("soak")(bench_soak)
    bench.command("rehearsal")(bench_rehearsal)
    bench.command("peers")(bench_peers)
    app.add_typer(bench, name="bench")


def bench_gateway(
    scenario: Annotated[
        list[Scenario] | None,
        typer.Option(
            help="Repeat for several; Server runs Offline first.  [default: all]",
            show_default=False,
        ),
    ] = None,
    precision: PrecisionOption = None,
    data: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N questions.")
    ] = None,
    bound_ms: Annotated[
        float, typer.Option(min=0.1, help="Server's bound on the 99th percentile.")
    ] = 130.0,
    concurrency: Annotated[
        int, typer.Option(min=1, max=512, help="Offline's requests under way at once.")
    ] = 32,
    min_seconds: Annotated[
        float, typer.Option(min=0.5, help="Shortest test; MLPerf's own rule is 600.")
    ] = 60.0,
    min_queries: Annotated[
        int,
        typer.Option(
            min=1,
            help="Fewest questions of a test; of fewer than 662 LoadGen cannot be "
            "sure of a 99th percentile.",
        ),
    ] = 664,
    output: OutputOption = Path("int8qa-bench"),
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load a running gateway with MLPerf LoadGen: SingleStream, Offline, Server.

    Server searches the highest rate of Poisson arrivals that keeps to the bound. A
    test in which a request failed is invalid, and so the command ends with an error.
    """
    from int8qa.bench.report import check_output, tabulate_headline, write_verdict
    from int8qa.bench.scenarios import LoadOptions, Rules, check_loadgen
    from int8qa.bench.scenarios import bench_gateway as run_bench

    check_loadgen()
    check_output(output)
    given: dict[str, Any] = {} if data is None else {"data": data}
    if scenario:
        given["scenarios"] = tuple(scenario)
    options = LoadOptions(
        url=url or load_settings().local_url,
        output=output,
        limit=limit,
        precisions=tuple(precision or ()),
        concurrency=concurrency,
        rules=Rules(
            min_seconds=min_seconds, min_queries=min_queries, bound_ms=bound_ms
        ),
        **given,
    )
    try:
        result = run_bench(options, _say)
    except KeyboardInterrupt:
        _say(
            f"int8qa: stopped; no report was written, LoadGen's files of the finished "
            f"tests are in {output}"
        )
        raise
    _show(result, tabulate_headline(result), write_verdict(result), output, as_json)
    if result["problems"]:
        raise GatewayRequestError(
            "the report is written, but not all of it counts: "
            + "; ".join(result["problems"])
        )


def bench_engine(
    precision: PrecisionOption = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Padded tokens; repeat for several.  [default: every length served]",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed turns of each engine at each shape.")
    ] = 7,
    model_repository: RepositoryOption = None,
    output: OutputOption = Path("int8qa-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time the engines alone over batch × length, taking turns; no Triton, no HTTP."""
    from int8qa.bench.engine_grid import bench_engines
    from int8qa.bench.report import (
        check_output,
        tabulate_times,
        write_engine_verdict,
    )

    check_output(output)
    done = 0

    def tell(shape: str, count: int) -> None:
        nonlocal done
        done += 1
        _say(f"[{done}/{count}] {shape}")

    result = bench_engines(
        model_repository or load_settings().model_repository,
        precisions=tuple(precision or ()),
        lengths=tuple(length or ()),
        repeats=repeats,
        on_shape=tell,
    )
    verdict = write_engine_verdict(result)
    _show(result, tabulate_times(result), verdict, output, as_json)


def bench_documents(
    windows: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Length of a document; repeat for several.  [default: 1 to 500]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="[default: the gateway's]", show_default=False),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each, taking turns.")
    ] = 3,
    data: DataOption = None,
    output: OutputOption = Path("int8qa-bench"),
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a running gateway about documents of 1 to 500 windows, one at a time.

    What a window costs in each, the gateway's memory meanwhile, and what a question
    waits beside the longest.
    """
    from int8qa.bench.documents import WINDOWS, DocumentOptions
    from int8qa.bench.documents import bench_documents as run_bench
    from int8qa.bench.documents_page import (
        tabulate_documents,
        write_documents_verdict,
    )
    from int8qa.bench.report import check_output

    check_output(output)
    given: dict[str, Any] = {} if data is None else {"data": data}
    options = DocumentOptions(
        url=url or load_settings().local_url,
        precision=precision,
        windows=tuple(windows or WINDOWS),
        rounds=rounds,
        **given,
    )
    result = run_bench(options, _say)
    verdict = write_documents_verdict(result)
    _show(result, tabulate_documents(result), verdict, output, as_json)


def bench_soak(
    pid: Annotated[
        int,
        typer.Option(
            min=1, help="Process id of the gateway; its children are watched with it."
        ),
    ],
    minutes: Annotated[float, typer.Option(min=0.05, help="Length of the run.")] = 20.0,
    load: Annotated[
        float,
        typer.Option(
            min=0.01, max=2.0, help="Share of the capacity, which is measured first."
        ),
    ] = 0.8,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Requests a second, instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the mix of requests.")] = 1,
    output: OutputOption = Path("int8qa-bench"),
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mixed traffic for long: nothing may be lost, memory and descriptors may not grow.

    Short and long texts, batches, lines, clients that leave and bad requests. Ends with
    an error if a request got no well-formed answer in time or a process grew.
    """
    from int8qa.bench.report import (
        check_output,
        tabulate_processes,
        write_soak_verdict,
    )
    from int8qa.bench.soak import SoakOptions, run_soak

    check_output(output)
    told_s = -math.inf

    def tell(elapsed_s: float, chosen_rate: float) -> None:
        nonlocal told_s
        if elapsed_s - told_s >= SOAK_NEWS_S:
            told_s = elapsed_s
            _say(f"[{elapsed_s:.0f}/{60 * minutes:.0f} s] {chosen_rate:.1f} requests/s")

    options = SoakOptions(
        url=url or load_settings().local_url,
        pid=pid,
        duration_s=60 * minutes,
        load=load,
        rate=rate,
        seed=seed,
    )
    result = run_soak(options, tell)
    verdict = write_soak_verdict(result)
    _show(result, tabulate_processes(result), verdict, output, as_json)
    if result["problems"]:
        raise GatewayRequestError(
            "the soak failed, its report is written: " + "; ".join(result["problems"])
        )


def bench_rehearsal(
    newer: Annotated[
        Path | None,
        typer.Option(
            help="Model repository of a newer build.  [default: the same engines under "
            "another id]",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Share of the capacity, which is measured first."
        ),
    ] = 0.25,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Questions a second, instead.")
    ] = None,
    phase_seconds: Annotated[
        float, typer.Option(min=4.0, help="Length of each of the six phases.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and questions.")] = 1,
    model_repository: RepositoryOption = None,
    output: OutputOption = Path("int8qa-bench"),
    as_json: JsonOption = False,
) -> None:
    """Three Tritons and two gateways, started here: kill, stop, replace, drain.

    Under steady load one Triton is killed, one stopped, one replaced by a newer build,
    and one gateway drained. Ends with an error if a request failed. Nothing that runs
    already is touched.
    """
    from int8qa.bench.rehearsal import RehearsalOptions, run_rehearsal
    from int8qa.bench.rehearsal_page import (
        list_merging,
        tabulate_phases,
        write_rehearsal_verdict,
    )
    from int8qa.bench.report import check_output
    from int8qa.build.gpu_commands import check_embedded

    settings = load_settings()
    repository = model_repository or settings.model_repository
    for one in filter(None, (repository, newer)):
        check_embedded(one)
    check_output(output)
    options = RehearsalOptions(
        repository=repository,
        output=output,
        embedded=settings.embedded,
        newer=newer,
        load=load,
        rate=rate,
        phase_s=phase_seconds,
        seed=seed,
    )
    try:
        result = run_rehearsal(options, _say)
    except KeyboardInterrupt:
        _say("int8qa: stopped; nothing is left running, and no report was written")
        raise
    verdict = "\n".join([write_rehearsal_verdict(result), *list_merging(result)])
    _show(result, tabulate_phases(result), verdict, output, as_json)
    if result["problems"]:
        raise GatewayRequestError(
            "the rehearsal failed, its report is written: "
            + "; ".join(result["problems"])
        )


def _show(
    result: dict[str, Any],
    table: dict[str, Any],
    verdict: str,
    output: Path,
    as_json: bool,
) -> None:
    """Write the report; print the result, and what it was measured with."""
    from rich.console import Console
    from rich.table import Table

    from int8qa.bench.provenance import list_facts
    from int8qa.bench.report import write_report

    data, page = write_report(result, output)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        shown = Table()
        for i, heading in enumerate(table["head"]):
            shown.add_column(heading, justify="right" if i else "left")
        for row in table["rows"]:
            shown.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 100).print(shown)
        typer.echo(verdict)
        for name, text in list_facts(result["provenance"]):
            typer.echo(f"{name}: {text}")
    for remark in result["remarks"]:
        _say(f"remark: {remark}")
    _say(f"report: {data}, {page}")


def _say(text: str) -> None:
    typer.echo(text, err=True)
