"""The command line: what serves, and the build stage's commands beside it.

In: arguments and ``INT8QA_`` settings. Out: results on standard output, everything
else on standard error, errors in one line, exit codes after sysexits.h.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa import __version__, errors
from int8qa.bench.commands import add_bench_commands
from int8qa.build.arguments import (
    CheckpointOption,
    GateOption,
    RepositoryOption,
)
from int8qa.build.commands import add_commands
from int8qa.build.gpu_commands import add_gpu_commands, check_embedded
from int8qa.build.laboratory_commands import add_laboratory_commands
from int8qa.client_commands import add_client_commands
from int8qa.contract import CONTRACT_FILENAME
from int8qa.key_commands import add_key_commands
from int8qa.planning.commands import add_planning_commands
from int8qa.settings import MAX_WORKERS, Settings, load_settings
from int8qa.training.commands import add_training_commands

EXIT_CODES: dict[type[errors.Int8qaError], int] = {
    errors.Int8qaError: 70,  # EX_SOFTWARE
    errors.InvalidInputError: 65,  # EX_DATAERR
    errors.UnknownModelError: 64,  # EX_USAGE
    errors.OverloadedError: 75,  # EX_TEMPFAIL
    errors.DeadlineExceededError: 75,
    errors.EngineError: 69,  # EX_UNAVAILABLE
    errors.ConfigurationError: 78,  # EX_CONFIG
    errors.MissingDependencyError: 69,
    errors.ContractError: 78,
    errors.EmbeddedTritonError: 69,
    errors.GatewayRequestError: 69,
    errors.BuildError: 70,
    errors.CheckpointError: 66,  # EX_NOINPUT
    errors.DataFileError: 66,
    errors.RecipeError: 78,
    errors.RepositoryError: 73,  # EX_CANTCREAT
}
"""Exit code of an error: its own, else that of the nearest class above it."""

WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_WORKERS,
        help="Gateway processes behind the port.  [default: INT8QA_WORKERS, or 1]",
        show_default=False,
    ),
]

SAMPLE_QUESTION = "When was the lighthouse finished?"
SAMPLE_CONTEXT = (
    "Work on the Norrvik lighthouse began in 1884. It was finished in May 1887 and "
    "cost 41,200 crowns."
)

app = typer.Typer(
    name="int8qa",
    help="Extractive question answering in INT8, beside FP16, on Triton.",
    epilog="Settings are INT8QA_ environment variables; the README lists them. Exit "
    "codes follow sysexits.h: 64 usage, 65 and 66 data, 69 unavailable, 70 failed, "
    "73 cannot write, 75 try again, 78 configuration.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "[default: …]" in a help text is no markup
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"int8qa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    del version


add_commands(app)
add_laboratory_commands(app)
add_gpu_commands(app)
add_training_commands(app)
add_client_commands(app)
add_key_commands(app)
add_bench_commands(app)
add_planning_commands(app)


@app.command()
def up(
    model_repository: RepositoryOption = None,
    no_build: Annotated[
        bool,
        typer.Option("--no-build", help="Serve the repository as it is."),
    ] = False,
    workers: WorkersOption = None,
) -> None:
    """Build the demo repository if need be, then run Triton and the gateway."""
    settings = _settings(model_repository, workers)
    # The port first: a build of minutes must not end in "address in use".
    from int8qa.gateway.process import bind_socket, run_event_loop

    with bind_socket(settings.host, settings.port) as listener:
        from int8qa.embedded import locate_triton

        locate_triton()
        if not no_build:
            _ensure_repository(settings)
        check_embedded(settings.model_repository)
        from int8qa.gateway.logs import configure_logging
        from int8qa.stack import run_stack

        configure_logging(settings)
        run_event_loop(run_stack(settings, listener, on_ready=_announce))


@app.command()
def serve(
    model_repository: RepositoryOption = None, workers: WorkersOption = None
) -> None:
    """Run the gateway alone, against the Triton at INT8QA_TRITON__URL."""
    settings = _settings(model_repository, workers)
    if settings.workers > 1:
        from int8qa.gateway.workers import serve_workers

        serve_workers(settings, on_ready=_announce)
        return
    from int8qa.gateway.app import serve as serve_gateway

    serve_gateway(settings, on_ready=_announce)


@app.command()
def triton(
    model_repository: RepositoryOption = None,
    host: Annotated[
        str, typer.Option(help="Address for gRPC and metrics.")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
    http_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="For health checks, on loopback only; 0: none."
        ),
    ] = 8000,
) -> None:
    """Run Triton alone, from its wheel, for a gateway in another process."""
    settings = _settings(model_repository)
    check_embedded(settings.model_repository)
    from int8qa.embedded.launch import TritonPorts
    from int8qa.gateway.logs import configure_logging
    from int8qa.gateway.process import run_event_loop
    from int8qa.stack import run_triton

    configure_logging(settings)
    run_event_loop(
        run_triton(
            settings,
            host=host,
            ports=TritonPorts(grpc_port, metrics_port, http_port),
            on_ready=lambda url: _say(f"Triton is ready at {url}"),
        )
    )


@app.command("gpu-check")
def check_gpu(
    checkpoint: CheckpointOption = None,
    model_repository: Annotated[
        Path | None,
        typer.Option(
            help="Directory to build into; not one that is served.  [default: "
            "~/.cache/int8qa/gpu-check]",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path, typer.Option(help="The report, to attach to an issue.")
    ] = Path("int8qa-gpu-check.json"),
    evaluation_limit: Annotated[
        int | None, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = None,
    gate: GateOption = 0.99,
) -> None:
    """Build for the GPU at hand, start NVIDIA's Triton, measure; write one report."""
    from int8qa.build.engines.tensorrt import check_builder
    from int8qa.build.engines.tensorrt_options import PlanOptions
    from int8qa.build.options import BuildOptions
    from int8qa.build.sensitivity import default_cache
    from int8qa.build.subject import QuestionSources
    from int8qa.gpu_check import GpuCheck, find_server
    from int8qa.gpu_check import check_gpu as run_check

    plans = PlanOptions()
    check_builder(plans)
    server = find_server()
    if not report.absolute().parent.is_dir():
        raise errors.RepositoryError(
            f"no such directory for the report: {report.absolute().parent}"
        )
    given: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    options = BuildOptions(
        model_repository=(model_repository or default_cache() / "gpu-check").absolute(),
        sources=QuestionSources(evaluation_limit=evaluation_limit),
        gate=gate,
        plans=plans,
        **given,
    )
    found = run_check(GpuCheck(options, server, report), _say)
    for shape, row in found["latency"].items():
        print(
            f"{shape}: INT8 {row['int8']['p50_ms']:.2f} ms, FP16 "
            f"{row['fp16']['p50_ms']:.2f} ms, {row['int8_over_fp16']:.2f}×"
        )
    _say(f"report: {report}")


def _settings(model_repository: Path | None, workers: int | None = None) -> Settings:
    overrides: dict[str, Any] = {}
    if model_repository is not None:
        overrides["model_repository"] = model_repository
    if workers is not None:
        overrides["workers"] = workers
    return load_settings(**overrides)


def _ensure_repository(settings: Settings) -> None:
    """Build the demo repository where there is none or a stale demo.

    A repository built from another checkpoint or with other options is the user's:
    it is served as it is.
    """
    target = settings.model_repository
    has_contract = (target / CONTRACT_FILENAME).is_file()
    try:
        from int8qa.build.pipeline import BuildOptions, build_repository, is_demo
        from int8qa.build.report import show_manifest

        if has_contract and not is_demo(target):
            return
        outcome = build_repository(BuildOptions(model_repository=target))
    except (ImportError, errors.MissingDependencyError) as error:
        if has_contract:
            return  # a serving machine without the build stage
        if isinstance(error, ImportError):
            raise errors.MissingDependencyError(
                f"{target} holds no model repository, and the build stage is not "
                f"installed here: run `make install` in the checkout, or "
                f"pip install -e '.[build,cpu]'"
            ) from error
        raise
    if not outcome.cached:
        show_manifest(outcome.manifest)


def _announce(base_url: str) -> None:
    body = json.dumps(
        {"question": SAMPLE_QUESTION, "context": SAMPLE_CONTEXT, "precision": "both"}
    )
    _say(
        f"\nint8qa is ready at {base_url} (docs: {base_url}/docs). Try:\n\n"
        f"curl -s {base_url}/v1/answer -H 'content-type: application/json' "
        f"-d {shlex.quote(body)}\n\nCtrl-C stops everything."
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def exit_code(error: errors.Int8qaError) -> int:
    """The process's exit code for ``error``."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    try:
        app()
    except errors.Int8qaError as error:
        _say(f"int8qa: {error}")
        raise SystemExit(exit_code(error)) from None
    except SystemExit as error:
        # click leaves with 2 after a usage error; sysexits.h says 64.
        raise SystemExit(64 if error.code == 2 else error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("INT8QA_LOG_LEVEL", "").lower() == "debug":
            raise
        _say(
            f"int8qa: unexpected {type(error).__name__}: this is a fault of int8qa. "
            f"Run again with INT8QA_LOG_LEVEL=debug and report what it prints"
        )
        raise SystemExit(70) from error


if __name__ == "__main__":
    main()
