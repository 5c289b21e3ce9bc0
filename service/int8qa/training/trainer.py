"""transformers' Trainer, told what our readers, orders and losses are.

In: a reader, windows, the list of steps, options, a folder for what can be resumed.
Out: the reader trained, in place. A checkpoint is complete or absent: it is written
aside and renamed. Knows no file format of data and no model card.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.errors import BuildError
from int8qa.training.examples import TrainingWindow
from int8qa.training.losses import distillation_loss, exclude_tokens, span_loss
from int8qa.training.machine import release_memory
from int8qa.training.options import Distillation, TrainingOptions

LOG_STEPS = 10
"""Steps between two entries of the loss's history."""
PAD_MULTIPLE = 8
"""Tensor cores and AVX512 like lengths of eights."""
MAX_GRADIENT_NORM = 1.0
"""Source: Devlin et al.'s BERT, ``optimization.py``."""
CLOCK_FILENAME = "clock.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LAYER = re.compile(r"\.layers?\.(\d+)\.")

ALLOWED = "allowed"
FIRST, LAST = "first", "last"

Batch = dict[str, Any]


def collate(
    windows: Sequence[TrainingWindow], inputs: Sequence[str], pad_token_id: int
) -> Batch:
    """Windows as one batch, padded to the longest: int32 [B, S], votes float32 [B, S].

    ``first`` and ``last`` hold the share of a window's annotators whose answer begins
    and ends at a token.
    """
    longest = max(len(item.window) for item in windows)
    shape = (len(windows), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in inputs}
    arrays[INPUT_IDS][:] = pad_token_id
    allowed = np.zeros(shape, np.bool_)
    allowed[:, 0] = True  # the null position
    votes = {name: np.zeros(shape, np.float32) for name in (FIRST, LAST)}
    for row, item in enumerate(windows):
        window, size = item.window, len(item.window)
        arrays[INPUT_IDS][row, :size] = window.input_ids
        arrays[ATTENTION_MASK][row, :size] = 1
        if TOKEN_TYPE_IDS in arrays:
            arrays[TOKEN_TYPE_IDS][row, :size] = window.token_type_ids
        allowed[row, window.context_start : window.context_end] = True
        for place in item.places:
            for name, token in zip((FIRST, LAST), place, strict=True):
                votes[name][row, token] += 1 / len(item.places)
    arrays |= {ALLOWED: allowed, **votes}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def group_parameters(
    model: torch.nn.Module, *, learning_rate: float, decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters by depth: the head at ``learning_rate``, each layer below at ``decay``
    of the one above, embeddings last; biases and norms without weight decay.

    Args:
        model: a BERT-family reader; of layers under other names (ALBERT's shared one)
            nothing is known, and they learn at the head's rate.
        learning_rate: of the head.
        decay: factor from one layer to the next one below.
        weight_decay: of matrices.
    """  # noqa: D205
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = (_LAYER.search(name) for name, _ in named)
    layers = 1 + max((int(match[1]) for match in found if match), default=-1)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        match = _LAYER.search(name)
        if match:
            below_head = layers - int(match[1])
        else:
            below_head = layers + 1 if "embedding" in name else 0
        matrix = parameter.ndim > 1
        group = groups.setdefault(
            (below_head, matrix),
            {
                "params": [],
                "lr": learning_rate * decay**below_head,
                "weight_decay": weight_decay if matrix else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


class ReaderTrainer(Trainer):  # type: ignore[misc]
    """Steps in a fixed order, our loss, checkpoints that are whole."""

    optimizer: Any

    def __init__(
        self,
        reader: torch.nn.Module,
        windows: Sequence[TrainingWindow],
        steps: list[list[int]],
        options: TrainingOptions,
        *,
        inputs: Sequence[str],
        pad_token_id: int,
        folder: Path,
        bf16: bool,
        teacher: torch.nn.Module | None = None,
    ) -> None:
        self._steps = steps
        self._options = options
        self._inputs = tuple(inputs)
        self._folder = folder
        self._seconds_before = 0.0
        self._began = time.monotonic()
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=len(steps),
            per_device_train_batch_size=options.batch,
            learning_rate=options.chosen_learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(options.warmup * len(steps)),
            max_grad_norm=MAX_GRADIENT_NORM,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
            logging_steps=LOG_STEPS,
            logging_nan_inf_filter=False,
            save_strategy="no",  # our callback says when
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        super().__init__(
            model=reader,
            args=arguments,
            train_dataset=windows,
            data_collator=lambda items: collate(items, self._inputs, pad_token_id),
        )
        self.remove_callback(PrinterCallback)  # it prints to standard output
        self._teacher = None if teacher is None else teacher.to(self.args.device)

    @property
    def last_step(self) -> int:
        """Of the latest checkpoint in the folder; 0 if there is none."""
        checkpoints = list_checkpoints(self._folder)
        return checkpoints[-1][0] if checkpoints else 0

    def resume(self) -> None:
        """Train on from the latest checkpoint in the folder, or from the start.

        Raises:
            BuildError: the loss is no longer a number.
        """
        checkpoints = list_checkpoints(self._folder)
        latest = None
        if checkpoints:
            latest = str(checkpoints[-1][1])
            clock = Path(latest, CLOCK_FILENAME).read_text(encoding="utf-8")
            self._seconds_before = float(json.loads(clock)["seconds"])
        self._began = time.monotonic()
        self.train(resume_from_checkpoint=latest)

    @property
    def losses(self) -> list[list[float]]:
        """Steps and the mean loss of the ``LOG_STEPS`` up to them."""
        return [
            [entry["step"], round(entry["loss"], 4)]
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Note a loss, or end a run that has none any more."""
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise BuildError(
                f"the loss is {loss} at step {self.state.global_step}: the run has "
                f"diverged. Begin another with a lower --learning-rate, in a new "
                f"directory for --output"
            )
        super().log(logs, *arguments, **options)

    @property
    def seconds(self) -> float:
        """Time spent in training, earlier runs included."""
        return self._seconds_before + time.monotonic() - self._began

    def get_train_dataloader(self) -> DataLoader:
        """The steps as planned; a resumed run skips those that are done."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._steps,
            collate_fn=self.data_collator,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with layer-wise learning rates."""
        if self.optimizer is None:
            groups = group_parameters(
                model or self.model,
                learning_rate=self._options.chosen_learning_rate,
                decay=self._options.layer_decay,
                weight_decay=self._options.weight_decay,
            )
            self.optimizer = torch.optim.AdamW(groups, fused=True)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The answers' loss, mixed with the teacher's if there is one."""
        del num_items_in_batch
        feed = [inputs[name] for name in self._inputs]
        logits = _exclude(model(*feed), inputs[ALLOWED])
        loss = span_loss(logits, (inputs[FIRST], inputs[LAST]))
        wanted = self._options.distillation
        if self._teacher is not None and wanted is not None:
            loss = self._learn_from_teacher(loss, logits, feed, inputs, wanted)
        return (loss, logits) if return_outputs else loss

    def _learn_from_teacher(
        self, loss: Any, logits: Any, feed: list[Any], inputs: Batch, how: Distillation
    ) -> Any:
        with torch.no_grad():
            taught = _exclude(self._teacher(*feed), inputs[ALLOWED])  # type: ignore[misc]
        distilled = distillation_loss(logits, taught, how.temperature)
        return (1.0 - how.weight) * loss + how.weight * distilled

    def _get_output_dir(self, trial: Any) -> str:
        del trial
        return str(self._folder / "partial")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        partial = Path(self._get_output_dir(None))
        shutil.rmtree(partial, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        (written,) = partial.iterdir()
        clock = {"seconds": self.seconds, "step": self.state.global_step}
        (written / CLOCK_FILENAME).write_text(json.dumps(clock))
        for path in written.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        target = self._folder / written.name
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
        for _, old in list_checkpoints(self._folder)[:-1]:
            shutil.rmtree(old)


def _exclude(pair: tuple[Any, Any], allowed: Any) -> tuple[Any, Any]:
    start, end = pair
    return exclude_tokens(start, allowed), exclude_tokens(end, allowed)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in ``folder`` by step, the latest last."""
    found = (
        (match, path)
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    )
    return sorted((int(match[1]), path) for match, path in found)


class CheckpointClock(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many seconds, at a stop and at the end."""

    def __init__(
        self, period_s: float, on_step: Callable[[int], None] = lambda _step: None
    ) -> None:
        self._period_s = period_s
        self._on_step = on_step
        self._last = time.monotonic()
        self._stop = False

    def ask_to_stop(self) -> None:
        """End after the step under way, with a checkpoint."""
        self._stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        del args
        self._on_step(state.global_step)
        due = time.monotonic() - self._last >= self._period_s
        if due or self._stop or state.global_step >= state.max_steps:
            control.should_save = True
        control.should_training_stop |= self._stop
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        release_memory()
        self._last = time.monotonic()


def set_dropout(reader: torch.nn.Module, probability: float | None) -> None:
    """Set every dropout of ``reader``; None leaves them as they are."""
    if probability is None:
        return
    for module in reader.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
