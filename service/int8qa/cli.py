"""The command line: what serves, and the build stage's commands beside it.

In: arguments and ``INT8QA_`` settings. Out: results on standard output, everything
else on standard error, errors in one line, exit codes after sysexits.h.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from int8qa import __version__, errors
from int8qa.bench.commands import add_bench_commands
from int8qa.build.commands import (
    CheckpointOption,
    GateOption,
    JsonOption,
    RepositoryOption,
    add_commands,
)
from int8qa.build.gpu_commands import add_gpu_commands, check_embedded
from int8qa.contract import CONTRACT_FILENAME, Precision
from int8qa.key_commands import add_key_commands
from int8qa.settings import Settings, load_settings
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


UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Base URL of a running gateway.  [default: http://127.0.0.1:8080, or "
        "the port of INT8QA_PORT]",
        show_default=False,
    ),
]


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
add_gpu_commands(app)
add_training_commands(app)
add_key_commands(app)
add_bench_commands(app)


@app.command()
def up(
    model_repository: RepositoryOption = None,
    no_build: Annotated[
        bool,
        typer.Option("--no-build", help="Serve the repository as it is."),
    ] = False,
) -> None:
    """Build the demo repository if need be, then run Triton and the gateway."""
    settings = _settings(model_repository)
    # The port first: a build of minutes must not end in "address in use".
    from int8qa.gateway.app import bind_socket, run_event_loop

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
def serve(model_repository: RepositoryOption = None) -> None:
    """Run the gateway alone, against the Triton at INT8QA_TRITON__URL."""
    settings = _settings(model_repository)
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
    from int8qa.gateway.app import run_event_loop
    from int8qa.gateway.logs import configure_logging
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


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, quoted.")],
    context_file: Annotated[
        Path, typer.Option(help="UTF-8 text to answer from; - for standard input.")
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help="int8, fp16, fp32 or both; left out: the service's default.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Answers wanted.")] = 1,
    allow_no_answer: Annotated[
        bool, typer.Option(help="Let the reader say that there is none.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask one question of a text, through a running gateway."""
    from int8qa.client import GatewayClient

    base_url = url or load_settings().local_url
    context = _read_context(context_file)

    request: dict[str, Any] = {
        "question": question,
        "context": context,
        "top_k": top_k,
        "allow_no_answer": allow_no_answer,
    }
    if precision is not None:
        request["precision"] = precision

    async def run() -> dict[str, Any]:
        async with GatewayClient(base_url) as client:
            return await client.answer(request)

    response = asyncio.run(run())
    if as_json:
        print(json.dumps(response, indent=2, ensure_ascii=False))
        return
    answers = [response["answer"], *response["alternatives"]]
    for answer in answers:
        if answer is None:
            print("(no answer in this text)")
        else:
            place = f"[{answer['start']}:{answer['end']}]"
            print(f"{answer['text']}  {place} score {answer['score']:.3f}")
    timing = response["timing_ms"]
    _say(
        f"{response['precision']}, {response['windows']} window(s), engine "
        f"{timing['inference']:.1f} ms, total {timing['total']:.1f} ms"
    )


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="SQuAD v1.1 or v2.0 JSON file.")],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Repeat for several.  [default: int8 and fp16]", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N questions.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Requests under way at once.")
    ] = 8,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure EM and F1 by precision through a running gateway, paired."""
    from int8qa.evaluation import Evaluation, evaluate_service
    from int8qa.reader.squad import load_questions

    base_url = url or load_settings().local_url
    questions = load_questions(data)[:limit]
    precisions = precision or [Precision.INT8, Precision.FP16]

    async def run(tick: Callable[[], None]) -> Evaluation:
        return await evaluate_service(
            base_url, questions, precisions, concurrency=concurrency, on_answer=tick
        )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task("questions", total=len(questions) * len(precisions))
        evaluation = asyncio.run(run(lambda: bars.advance(task)))
    if as_json:
        print(json.dumps(evaluation.to_json(), indent=2))
    else:
        _show_evaluation(evaluation, data)


def _show_evaluation(evaluation: Any, data: Path) -> None:
    table = Table(
        title=f"{evaluation.checkpoint}, {data.name}: {evaluation.questions} questions"
    )
    table.add_column("precision")
    split = any(r.scores.no_ans_total for r in evaluation.results.values())
    headings = ["F1", "EM", *(["HasAns F1", "NoAns F1"] if split else [])]
    for heading in (*headings, "engine ms p50", "total ms p50", "total ms p99"):
        table.add_column(heading, justify="right")
    for name, result in evaluation.results.items():
        scores = result.scores
        parts = [scores.f1, scores.exact]
        if split:
            parts += [scores.has_ans_f1 or 0.0, scores.no_ans_f1 or 0.0]
        table.add_row(
            name,
            *(f"{value:.2f}" for value in parts),
            f"{result.inference_ms_p50:.1f}",
            f"{result.total_ms_p50:.1f}",
            f"{result.total_ms_p99:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    reference = evaluation.results.get("fp32") or evaluation.results.get("fp16")
    int8 = evaluation.results.get("int8")
    if reference is not None and int8 is not None and reference.scores.f1:
        ratio = 100 * int8.scores.f1 / reference.scores.f1
        name = "FP32" if "fp32" in evaluation.results else "FP16"
        print(f"INT8 keeps {ratio:.2f} % of {name}'s F1")
    for pair, share in evaluation.agreement.items():
        print(f"same answer, {pair}: {100 * share:.2f} %")
    print(f"{evaluation.seconds:.0f} s")


def _settings(model_repository: Path | None) -> Settings:
    overrides: dict[str, Any] = {}
    if model_repository is not None:
        overrides["model_repository"] = model_repository
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


def _read_context(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise errors.DataFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise errors.DataFileError(
            f"{path} is not UTF-8 (byte {error.start}); convert it first"
        ) from None


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
