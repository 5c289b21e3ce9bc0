"""The commands of a client: ``ask`` and ``evaluate``.

In: arguments, and a running gateway's address. Out: answers or scores on standard
output, progress on standard error. Knows the gateway by its HTTP interface alone.
"""

from __future__ import annotations

import asyncio
import json
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

from int8qa import errors
from int8qa.build.arguments import JsonOption
from int8qa.contract import Precision
from int8qa.settings import load_settings

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Base URL of a running gateway.  [default: http://127.0.0.1:8080, or "
        "the port of INT8QA_PORT]",
        show_default=False,
    ),
]

NullThresholdOption = Annotated[
    float,
    typer.Option(
        help="How far the null answer's log score must lead to win, where it may; "
        "below 0 the reader abstains sooner."
    ),
]


def add_client_commands(app: typer.Typer) -> None:
    """Register the commands with ``app``."""
    app.command()(ask)
    app.command()(evaluate)


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
    null_score_diff_threshold: NullThresholdOption = 0.0,
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
        "null_score_diff_threshold": null_score_diff_threshold,
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
    typer.echo(
        f"{response['precision']}, {response['windows']} window(s), engine "
        f"{timing['inference']:.1f} ms, total {timing['total']:.1f} ms",
        err=True,
    )


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
    null_score_diff_threshold: NullThresholdOption = 0.0,
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
            base_url,
            questions,
            precisions,
            concurrency=concurrency,
            null_score_diff_threshold=null_score_diff_threshold,
            on_answer=tick,
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
