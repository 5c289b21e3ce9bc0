"""The command ``plan``.

In: arguments. Out: tables or JSON on standard output, progress on standard error, and
a directory with the report if one is named. Heavy imports wait until the command runs.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.build.arguments import JsonOption, RepositoryOption
from int8qa.contract import Precision
from int8qa.errors import MissingDependencyError
from int8qa.settings import load_settings

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)")
_MS = {"ms": 1.0, "s": 1e3}


def parse_duration_ms(text: str | float) -> float:
    """``100ms`` or ``0.1s``, above 0.

    Raises:
        typer.BadParameter: anything else.
    """
    found = _DURATION.fullmatch(str(text).strip())
    value = float(found[1]) * _MS[found[2]] if found else 0.0
    if value <= 0:
        raise typer.BadParameter(f"{text!r} is no duration such as 100ms or 0.1s")
    return value


def add_planning_commands(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command()(plan)


def plan(
    rate: Annotated[
        float, typer.Option(min=0.001, help="Questions per second, all together.")
    ],
    p99: Annotated[
        float,
        typer.Option(
            parser=parse_duration_ms,
            metavar="DURATION",
            help="Bound on the 99th percentile of latency: 100ms, 0.1s.",
        ),
    ],
    traffic: Annotated[
        Path | None,
        typer.Option(
            help="SQuAD-format questions whose lengths to expect.  [default: our own]",
            show_default=False,
        ),
    ] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option(
            help="engine.json of `bench engine`, and gateway.json of `bench gateway`; "
            "once for each.  [default: the few times the build took]",
            show_default=False,
        ),
    ] = None,
    validate: Annotated[
        list[Path] | None,
        typer.Option(
            help="gateway.json of `bench gateway`: predict its Server tests and show "
            "the error. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Repeat for several.  [default: all that were timed]",
            show_default=False,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of one replica, in any currency.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    model_repository: RepositoryOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for plan.json and the page.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many replicas keep a rate within a bound, by simulation.

    Each precision gets as many as it takes; the batcher's settings are those of the
    environment.
    """
    check_simulator()
    from int8qa.bench.report import check_output
    from int8qa.planning.inputs import PlanOptions
    from int8qa.planning.plan import make_plan
    from int8qa.planning.report import write_report

    settings = load_settings()
    if output is not None:
        check_output(output)
    result = make_plan(
        PlanOptions(
            repository=model_repository or settings.model_repository,
            rate_qps=rate,
            bound_ms=p99,
            traffic=traffic,
            bench=tuple(bench or ()),
            validation=tuple(validate or ()),
            precisions=tuple(precision or ()),
            price_per_hour=price_per_hour,
            batcher=settings.batcher,
            seed=seed,
        ),
        _say,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _show(result)
    for remark in result["remarks"]:
        _say(f"remark: {remark}")
    if output is not None:
        data, page = write_report(result, output)
        _say(f"report: {data}, {page}")


def check_simulator() -> None:
    """Refuse to begin without SimPy.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("simpy") is None:
        raise MissingDependencyError(
            "planning takes SimPy: pip install -e '.[plan]' in the checkout, or "
            "pip install simpy"
        )


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from int8qa.planning import report, validation

    console = Console(width=None if sys.stdout.isatty() else 120)
    tables = [report.tabulate_plan(result), report.tabulate_sources(result)]
    if result["validation"]:
        tables.append(report.tabulate_validation(result))
    typer.echo(report.write_verdict(result))
    typer.echo(report.describe_traffic(result))
    for table in tables:
        shown = Table()
        for heading in table["head"]:
            shown.add_column(heading)
        for row in table["rows"]:
            shown.add_row(*row)
        console.print(shown)
    typer.echo(validation.write_verdict(result["validation"]))
    for assumption in result["assumptions"]:
        typer.echo(f"- {assumption}")


def _say(text: str) -> None:
    typer.echo(text, err=True)
