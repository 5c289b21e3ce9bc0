"""What a run works on, loaded and checked: reader, tokenizer, teacher, questions.

In: options and an open output directory. Out: :class:`Material`. Everything that can
be wrong with data and checkpoints is found here, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from int8qa.build.checkpoint import Checkpoint, CheckpointFiles
from int8qa.build.export import model_inputs, wrap_model
from int8qa.build.report import BuildProgress
from int8qa.build.subject import LEAST_WINDOW_TOKENS
from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import CheckpointError
from int8qa.reader.squad import SquadQuestion
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.training.examples import TrainingSet, load_training_set
from int8qa.training.measurement import load_evaluation
from int8qa.training.options import TrainingOptions
from int8qa.training.start import PROBE_TEXTS, load_start, load_teacher

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Material:
    """See the module."""

    checkpoint: Checkpoint
    fresh_head: bool
    tokenizer: ReaderTokenizer
    inputs: tuple[str, ...]
    max_window_tokens: int
    doc_stride: int
    examples: TrainingSet
    evaluation: list[tuple[str, list[SquadQuestion]]]
    """File name and questions."""
    teacher: torch.nn.Module | None
    """Wrapped like the reader, frozen."""


def load_material(
    options: TrainingOptions,
    files: CheckpointFiles,
    teacher_files: CheckpointFiles | None,
    scratch: Path,
    progress: BuildProgress,
) -> Material:
    """Load everything; two stages of ``progress``.

    Raises:
        CheckpointError: start or teacher cannot be used as asked.
        DataFileError: a file is malformed or empty, or measures what is trained on.
    """
    with progress.stage("load the checkpoint"):
        checkpoint, fresh_head = load_start(files, seed=options.seed)
    if fresh_head and options.quantization is not None:
        raise CheckpointError(
            f"{files.name} is not fine-tuned for question answering; train it without "
            f"--qat first, then start --qat from the result"
        )
    longest = min(options.max_window_tokens, checkpoint.max_positions)
    if longest < LEAST_WINDOW_TOKENS:
        raise CheckpointError(
            f"{files.name} reads at most {longest} tokens; at least "
            f"{LEAST_WINDOW_TOKENS} are needed"
        )
    stride = min(options.doc_stride, longest // 2)
    path = scratch / TOKENIZER_FILENAME
    path.write_bytes(checkpoint.tokenizer_json)
    tokenizer = ReaderTokenizer.from_file(path)
    with progress.stage("read the questions", steps=len(options.data)) as tick:
        examples = load_training_set(
            options.data,
            tokenizer,
            max_window_tokens=longest,
            doc_stride=stride,
            negatives=options.negatives,
            limit=options.limit,
            seed=options.seed,
            on_file=tick,
        )
        evaluation = [
            (path.name, load_evaluation(path, options.evaluation_limit, examples.keys))
            for path in options.evaluation
        ]
    teacher = None
    if teacher_files is not None:
        texts = sorted(text for pair in examples.keys for text in pair)
        teacher = wrap_model(
            load_teacher(
                teacher_files,
                checkpoint,
                texts[:: max(1, len(texts) // PROBE_TEXTS)],
                max_window_tokens=longest,
            )
        )
    return Material(
        checkpoint=checkpoint,
        fresh_head=fresh_head,
        tokenizer=tokenizer,
        inputs=model_inputs(takes_token_types=checkpoint.takes_token_types),
        max_window_tokens=longest,
        doc_stride=stride,
        examples=examples,
        evaluation=evaluation,
        teacher=teacher,
    )
