"""The command ``train``: fine-tuning, and training for INT8.

In: arguments. Out: scores or a JSON report on standard output, progress on standard
error. Heavy imports wait until the command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.build.arguments import (
    CheckpointOption,
    JsonOption,
    RevisionOption,
    TargetName,
)


class PrecisionName(str, Enum):
    """What matrices are multiplied in."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class WeightTypeName(str, Enum):
    """What weights are stored in."""

    FP16 = "fp16"
    FP32 = "fp32"


def add_training_commands(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command()(train)


def train(
    data: Annotated[
        list[Path],
        typer.Option(
            help="SQuAD v1.1 or v2.0 JSON to train on; repeat for several files."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="New directory for the checkpoint, its card and report."),
    ],
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    evaluation_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="SQuAD JSON to measure on at the end; none of it may be in --data. "
            "Repeat for several files.",
            show_default=False,
        ),
    ] = None,
    evaluation_limit: Annotated[
        int | None,
        typer.Option(min=1, help="Measure on N questions a file, evenly spaced."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Train on N questions a file, evenly spaced."),
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="Times each window is used; 1.5 is possible.")
    ] = 2.0,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of the head; the peak, after warm-up.  [default: 2e-4; with --qat "
            "2e-5]",
            show_default=False,
        ),
    ] = None,
    layer_decay: Annotated[
        float,
        typer.Option(help="Learning rate of a layer, as a share of the one above."),
    ] = 0.95,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.01,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises.")
    ] = 0.1,
    dropout: Annotated[
        float | None,
        typer.Option(
            help="[default: as the checkpoint says; with --qat 0]", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of order, head, dropout, pairs.")] = 0,
    keep_order: Annotated[
        bool,
        typer.Option(
            "--keep-order",
            help="Every epoch goes through the files as given, so that what is most "
            "like the task can come last.",
        ),
    ] = False,
    negatives: Annotated[
        float,
        typer.Option(
            help="Questions without an answer to make, as a share of the others: each "
            "is put to another paragraph of its article."
        ),
    ] = 0.0,
    max_window_tokens: Annotated[
        int, typer.Option(help="Longest window; less is faster.")
    ] = 384,
    doc_stride: Annotated[
        int, typer.Option(help="Tokens that neighbouring windows share.")
    ] = 128,
    precision: Annotated[
        PrecisionName,
        typer.Option(
            help="Of the arithmetic; auto takes bf16 where the hardware has it, and "
            "fp32 for --qat."
        ),
    ] = PrecisionName.AUTO,
    dtype: Annotated[
        WeightTypeName, typer.Option(help="Of the weights written.")
    ] = WeightTypeName.FP16,
    save_minutes: Annotated[
        float, typer.Option(help="Minutes between checkpoints to resume from.")
    ] = 3.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the unfinished run in --output, exactly; begins one if "
            "there is none.",
        ),
    ] = False,
    qat: Annotated[
        bool,
        typer.Option("--qat", help="Train with INT8's rounding, after calibration."),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="--qat: linear, gemms, full or a YAML file, as for `int8qa build`.  "
            "[default: gemms on CPUs with VNNI, else linear]",
            show_default=False,
        ),
    ] = None,
    calibrator: Annotated[
        str | None,
        typer.Option(
            help="--qat: max, percentile-N, mse, entropy or search.  [default: "
            "percentile-99.999]",
            show_default=False,
        ),
    ] = None,
    smooth: Annotated[
        bool | None,
        typer.Option(
            "--smooth/--no-smooth",
            help="--qat: SmoothQuant before calibration.  [default: smooth]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        TargetName | None,
        typer.Option(
            help="--qat: what it will be built for; full is not the same for all.  "
            "[default: openvino]",
            show_default=False,
        ),
    ] = None,
    distill_from: Annotated[
        str | None,
        typer.Option(
            help="Learn from the logits of this checkpoint, too (directory or hub id, "
            "same tokenizer), or of `self`, the float model --qat starts from.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="--distill-from: of both.  [default: 2]", show_default=False),
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(
            help="--distill-from: the teacher's share of the loss.  [default: 0.9]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a checkpoint for extractive QA, in float or for INT8 (--qat).

    The output is a checkpoint for `int8qa build --checkpoint`. A run that was killed
    goes on with the same command and --resume.
    """
    from int8qa.training.options import TrainingOptions
    from int8qa.training.run import train_reader

    chosen: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    options = TrainingOptions(
        data=tuple(data),
        output=output,
        revision=revision,
        evaluation=tuple(evaluation_data or ()),
        evaluation_limit=evaluation_limit,
        limit=limit,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        warmup=warmup,
        dropout=dropout,
        seed=seed,
        keep_order=keep_order,
        negatives=negatives,
        max_window_tokens=max_window_tokens,
        doc_stride=doc_stride,
        precision=precision.value,
        dtype=dtype.value,
        save_minutes=save_minutes,
        quantization=_choose_quantization(qat, recipe, calibrator, smooth, target),
        distillation=_choose_distillation(distill_from, temperature, distill_weight),
        resume=resume,
        **chosen,
    )
    command = shlex.join(["int8qa", *sys.argv[1:]])
    outcome = train_reader(options, command=command)
    report = outcome.report
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for scores in report["scores"]:
        split = (
            f", HasAns F1 {scores['has_ans_f1']:.2f}, NoAns {scores['no_ans_f1']:.2f}"
            if scores["no_ans_total"] and scores["has_ans_total"]
            else ""
        )
        typer.echo(
            f"{scores['file']}, {scores['precision']}: EM {scores['exact']:.2f}, F1 "
            f"{scores['f1']:.2f}{split} ({scores['total']} questions)"
        )
    done = "was finished already" if outcome.finished_before else "is ready"
    build = ["int8qa", "build", "--checkpoint", str(output)]
    for name, value in (("--recipe", recipe), ("--target", target)):
        build += [] if value is None else [name, str(getattr(value, "value", value))]
    typer.echo(f"{output} {done}; next: {shlex.join(build)}", err=True)


def _choose_quantization(
    qat: bool,
    recipe: str | None,
    calibrator: str | None,
    smooth: bool | None,
    target: TargetName | None,
) -> Any:
    if not qat:
        for name, value in (
            ("--recipe", recipe),
            ("--calibrator", calibrator),
            ("--smooth", smooth),
            ("--target", target),
        ):
            if value is not None:
                raise typer.BadParameter("needs --qat", param_hint=name)
        return None
    from int8qa.build.calibration import Calibrator, parse_calibrator
    from int8qa.build.quantization import choose_default
    from int8qa.build.recipe_file import load_recipe
    from int8qa.errors import BuildError
    from int8qa.training.options import FakeQuantization

    try:
        chosen = Calibrator() if calibrator is None else parse_calibrator(calibrator)
    except BuildError as error:
        raise typer.BadParameter(str(error), param_hint="--calibrator") from error
    default = choose_default(target or TargetName.OPENVINO)
    return FakeQuantization(
        load_recipe(recipe) if recipe else default,
        chosen,
        smooth=smooth is not False,
        tensorrt=target not in {None, TargetName.OPENVINO},
    )


def _choose_distillation(
    teacher: str | None, temperature: float | None, weight: float | None
) -> Any:
    given = {"temperature": temperature, "weight": weight}
    chosen = {name: value for name, value in given.items() if value is not None}
    if teacher is None:
        if chosen:
            raise typer.BadParameter(
                "--temperature and --distill-weight need it",
                param_hint="--distill-from",
            )
        return None
    from int8qa.training.options import Distillation

    return Distillation(teacher, **chosen)
