"""The command ``bench peers``.

In: arguments. Out: the table or JSON on standard output, progress on standard error,
``peers.json`` and ``peers.html``. It needs a checkout: the peers' programs and pinned
packages are no part of the package.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from int8qa.build.arguments import CheckpointOption, JsonOption, RepositoryOption
from int8qa.errors import GatewayRequestError
from int8qa.settings import load_settings

DataOption = Annotated[
    Path | None,
    typer.Option(
        help="SQuAD-format questions to ask.  [default: our own]", show_default=False
    ),
]


def bench_peers(
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="engine, stock, int8qa, triton, litserve or transformers; repeat "
            "for several.  [default: all]",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each, taking turns.")
    ] = 3,
    checkpoint: CheckpointOption = None,
    model_repository: RepositoryOption = None,
    peers: Annotated[
        Path, typer.Option(help="The peers' programs, in a checkout.")
    ] = Path("bench/peers"),
    output: Annotated[Path, typer.Option(help="Directory of the report.")] = Path(
        "bench/results"
    ),
    as_json: JsonOption = False,
) -> None:
    """The engine alone, int8qa and its peers over the same questions, in turns.

    Each is started, tuned, warmed, asked and stopped by this command; a peer's
    environment is installed on first use. Who does not run is named with the reason.
    """
    from int8qa.bench.peer_race import PeerOptions
    from int8qa.bench.peer_report import (
        list_peer_facts,
        render_peers,
        tabulate_peers,
        write_peers_verdict,
    )
    from int8qa.bench.peer_rounds import bench_peers as run_bench
    from int8qa.bench.report import check_output, write_files
    from int8qa.build.checkpoint import demo_checkpoint_directory

    check_output(output)
    # Like Ctrl-C: what was started has to be stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = PeerOptions(
        repository=model_repository or load_settings().model_repository,
        checkpoint=checkpoint or str(demo_checkpoint_directory()),
        peers=peers,
        limit=limit,
        rounds=rounds,
        groups=tuple(peer or ()),
        **({} if data is None else {"data": data}),
    )
    result = run_bench(options, _say)
    path, page = write_files(result, output, "peers", render_peers)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        table = tabulate_peers(result)
        for row in (table["head"], *table["rows"]):
            typer.echo(" | ".join(row))
        typer.echo(write_peers_verdict(result))
        for name, text in list_peer_facts(result):
            typer.echo(f"{name}: {text}")
    for remark in result["remarks"]:
        _say(f"remark: {remark}")
    _say(f"report: {path}, {page}")
    if result["problems"]:
        raise GatewayRequestError(
            "the report is written, but not everybody was measured: "
            + "; ".join(result["problems"])
        )


def _say(text: str) -> None:
    typer.echo(text, err=True)
