"""A whole training run, from options to a checkpoint that the build takes.

In: :class:`TrainingOptions`. Out: a directory with fp16 or fp32 safetensors, config,
tokenizer, model card, report and, after QAT, the ranges; complete or absent. A run that
was killed goes on at its last checkpoint as if nothing had been.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.build.export import wrap_model
from int8qa.build.report import BuildProgress
from int8qa.build.stored_ranges import StoredRanges, read_ranges, write_ranges
from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import BuildError
from int8qa.training.card import write_card
from int8qa.training.fake_quantization import (
    calibrate,
    choose_calibration,
    count_stages,
    plain_weights,
    restore,
)
from int8qa.training.machine import (
    check_accelerate,
    choose_bf16,
    describe_device,
    keep_memory,
    stop_gently,
)
from int8qa.training.material import Material, load_material
from int8qa.training.measurement import measure_reader
from int8qa.training.options import SELF, TrainingOptions
from int8qa.training.order import plan_steps
from int8qa.training.record import describe_run
from int8qa.training.start import copy_tokenizer
from int8qa.training.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a run ended with."""

    report: dict[str, Any]
    finished_before: bool = False
    """Whether there was nothing left to do."""


def train_reader(
    options: TrainingOptions,
    *,
    command: str = "int8qa train",
    console: Console | None = None,
    on_step: Callable[[int], None] = lambda _step: None,
) -> TrainingOutcome:
    """Train, measure and write.

    Args:
        options: what is wanted.
        command: as typed, for the card.
        console: for progress; by default standard error.
        on_step: called after each step with the number of those done.

    Raises:
        MissingDependencyError: accelerate is missing.
        ConfigurationError: options contradict, or differ from those of the run resumed.
        RepositoryError: the output directory cannot be used.
        BuildError: training diverged.
        CheckpointError: no checkpoint, or not one that can be trained so.
        DataFileError: a file is missing, malformed or empty, or measures what was
            trained on.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; a checkpoint was written.
    """
    check_accelerate()
    options.check()
    workspace = Workspace(options.output)
    if options.resume:
        report = workspace.read_report(options.describe())
        if report is not None:
            return TrainingOutcome(report, finished_before=True)
    workspace.check(resume=options.resume)
    bf16 = choose_bf16(options.precision, quantizing=options.quantization is not None)
    keep_memory()
    console = console or Console(stderr=True, highlight=False)
    run = _Run(options, workspace, console, bf16=bf16)
    return TrainingOutcome(run.execute(command, on_step))


class _Run:
    """One run: its methods are its stages, in order."""

    def __init__(
        self,
        options: TrainingOptions,
        workspace: Workspace,
        console: Console,
        *,
        bf16: bool,
    ) -> None:
        self.options = options
        self.bf16 = bf16
        self.workspace = workspace
        self.console = console
        self.files = resolve_checkpoint(options.checkpoint, revision=options.revision)
        self.teacher_files = None
        if options.distillation is not None:
            own = options.distillation.teacher == SELF
            self.teacher_files = (
                self.files if own else resolve_checkpoint(options.distillation.teacher)
            )
        self.resumed = workspace.open(
            options.describe()
            | {
                "checkpoint": self.files.sha256,
                "teacher": self.teacher_files and self.teacher_files.sha256,
            }
        )
        self.stored: StoredRanges | None = read_ranges(workspace.scratch)
        wanted = options.quantization
        stages = 3 + len(options.evaluation) * (1 if wanted is None else 2)
        if wanted is not None and self.stored is None:
            stages += count_stages(wanted)
        self.progress = BuildProgress(stages, console=console)

    def execute(self, command: str, on_step: Callable[[int], None]) -> dict[str, Any]:
        """All stages; the report."""
        try:
            material, reader = self._prepare()
        except BaseException:
            if not self.resumed:
                self.workspace.forget()
            raise
        trained = self._train(reader, material, on_step)
        directory = self.workspace.begin_final()
        self._write_weights(reader, material, directory)
        scores = self._measure(directory, material)
        report = describe_run(
            self.options,
            files=self.files,
            teacher_files=self.teacher_files,
            material=material,
            directory=directory,
            quantized_tensors=len(self.stored.grids) if self.stored else 0,
            scores=scores,
        ) | {
            "command": command,
            "device": describe_device(),
            "precision": "bf16" if self.bf16 else "fp32",
            "resumed": self.resumed,
            **trained,
        }
        (directory / "README.md").write_text(write_card(report), encoding="utf-8")
        self.workspace.publish(report)
        return report

    def _prepare(self) -> tuple[Material, Any]:
        """Everything before the first step."""
        material = load_material(
            self.options,
            self.files,
            self.teacher_files,
            self.workspace.scratch,
            self.progress,
        )
        reader = wrap_model(material.checkpoint.model)
        if self.options.quantization is not None:
            self._quantize(reader, material)
        return material, reader

    def _quantize(self, reader: Any, material: Material) -> None:
        """Calibrate, unless the run has its ranges; then begin with them.

        Calibrated is a copy, so that a run that is resumed begins with the same bits.
        """
        wanted = self.options.quantization
        assert wanted is not None
        if self.stored is None:
            windows = choose_calibration(
                [item.window for item in material.examples.windows]
            )
            self.stored = calibrate(
                copy.deepcopy(reader), windows, material.inputs, wanted, self.progress
            )
            self.workspace.keep_ranges(self.stored)
        restore(reader, material.inputs, wanted.grids, self.stored)

    def _train(
        self, reader: Any, material: Material, on_step: Callable[[int], None]
    ) -> dict[str, Any]:
        """Every step that is still to be done: steps, losses and seconds."""
        from int8qa.training.progress import TrainingProgress
        from int8qa.training.trainer import CheckpointClock

        steps = self._plan_steps(material)
        trainer = self._make_trainer(reader, material, steps)
        clock = CheckpointClock(60.0 * self.options.save_minutes, on_step)
        shown = TrainingProgress([len(step) for step in steps], self.console)
        trainer.add_callback(clock)
        trainer.add_callback(shown)
        before = trainer.last_step
        if before:
            self.progress.say(f"      going on after step {before}")
        try:
            with (
                self.progress.stage(f"train, {len(steps)} steps"),
                stop_gently(clock.ask_to_stop),
            ):
                trainer.resume()
        finally:
            shown.close()
        done = trainer.state.global_step
        if done < len(steps):
            self.progress.say(
                f"stopped after step {done} of {len(steps)}; the same command with "
                f"--resume goes on"
            )
            raise KeyboardInterrupt
        return {
            "steps": done,
            "losses": trainer.losses,
            "train_seconds": round(trainer.seconds, 1),
        }

    def _plan_steps(self, material: Material) -> list[list[int]]:
        windows = material.examples.windows
        return plan_steps(
            [len(item.window) for item in windows],
            [item.group for item in windows],
            batch=self.options.batch,
            epochs=self.options.epochs,
            seed=self.options.seed,
            keep_order=self.options.keep_order,
        )

    def _make_trainer(
        self, reader: Any, material: Material, steps: list[list[int]]
    ) -> Any:
        from int8qa.training.trainer import ReaderTrainer, set_dropout

        set_dropout(reader, self.options.chosen_dropout)
        return ReaderTrainer(
            reader,
            material.examples.windows,
            steps,
            self.options,
            inputs=material.inputs,
            pad_token_id=material.checkpoint.pad_token_id,
            folder=self.workspace.scratch,
            bf16=self.bf16,
            teacher=material.teacher,
        )

    def _write_weights(self, reader: Any, material: Material, directory: Path) -> None:
        """A plain checkpoint, and the ranges beside it.

        Raises:
            BuildError: the weights are not finite.
        """
        import torch
        from transformers import AutoModelForQuestionAnswering

        config = material.checkpoint.model.config
        model = AutoModelForQuestionAnswering.from_config(config)
        model.load_state_dict(plain_weights(reader.model), strict=True)
        model.to(torch.float16 if self.options.dtype == "fp16" else torch.float32)
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise BuildError(
                    f"training ended with weights that are not finite ({name}): lower "
                    f"--learning-rate, or, if the loss was finite, use --dtype fp32"
                )
        model.save_pretrained(directory)
        copy_tokenizer(self.files.directory, directory)
        (directory / TOKENIZER_FILENAME).write_bytes(material.checkpoint.tokenizer_json)
        if self.stored is not None:
            write_ranges(directory, self.stored)

    def _measure(self, directory: Path, material: Material) -> list[dict[str, Any]]:
        """Scores of what was written: in float, and with INT8's rounding after QAT."""
        scores: list[dict[str, Any]] = []
        if not material.evaluation:
            return scores
        files = resolve_checkpoint(str(directory))
        wanted = self.options.quantization
        for precision in ("float", "int8") if wanted else ("float",):
            checkpoint = load_checkpoint(files)
            reader = wrap_model(checkpoint.model)
            if wanted is not None and precision == "int8":
                stored = read_ranges(directory)
                assert stored is not None
                restore(reader, material.inputs, wanted.grids, stored)
            for name, questions in material.evaluation:
                title = f"measure {precision} on {name}"
                with self.progress.stage(title, steps=len(questions)) as tick:
                    found = measure_reader(
                        reader,
                        checkpoint,
                        material.tokenizer,
                        questions,
                        on_question=tick,
                    )
                scores.append({"file": name, "precision": precision, **asdict(found)})
        return scores
