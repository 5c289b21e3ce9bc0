"""What is being quantized, and the questions it is measured on.

In: a checkpoint's files, calibration and evaluation data. Out: the loaded reader with
both question sets as windows, ready for any number of quantizations of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from int8qa.build.accuracy import (
    Answers,
    EncodedQuestion,
    Infer,
    answer_questions,
    encode_questions,
)
from int8qa.build.checkpoint import Checkpoint, CheckpointFiles, load_checkpoint
from int8qa.build.export import model_inputs, wrap_model
from int8qa.errors import CheckpointError, DataFileError
from int8qa.reader.squad import SquadQuestion, load_questions
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS, Window

if TYPE_CHECKING:
    import torch

BUCKET_STEP = 16
"""Padded lengths are multiples of this, in tokens. OpenVINO compiles primitives for
each new shape, so there must be few: 8 is no faster, 32 slower by 4 %
(docs/performance.md, Shapes)."""
PLAN_BUCKET_STEP = 32
"""The same for TensorRT's plans: each length costs CUDA graphs, and tokens cost a GPU
less than calls do."""
LEAST_WINDOW_TOKENS = 32
"""A model that reads fewer has no room for a question and a text."""
CALIBRATION_WINDOWS = 128
"""Most windows used, evenly spaced over the calibration questions. Ranges settle
early, and each window costs a float inference and a histogram per tensor."""
EVALUATION_BATCH = 8
"""Windows of one length that are answered together."""


def questions_file(split: str) -> Path:
    """The project's own questions: ``calibration`` or ``evaluation``."""
    root = Path(str(resources.files("int8qa")))
    return root / "data" / "questions" / f"{split}.json"


def data_name(path: Path, split: str) -> str:
    """``own`` for the project's questions, else the file's name."""
    own = questions_file(split)
    return "own" if path.resolve() == own.resolve() else path.name


@dataclass(frozen=True, slots=True)
class QuestionSources:
    """Where the questions come from, and how many of them are used."""

    calibration: Path = field(default_factory=lambda: questions_file("calibration"))
    evaluation: Path = field(default_factory=lambda: questions_file("evaluation"))
    calibration_limit: int | None = None
    evaluation_limit: int | None = None

    def check(self) -> None:
        """Refuse paths that are no files, before anything slow begins.

        Raises:
            DataFileError: no such file.
        """
        for path in (self.calibration, self.evaluation):
            if not path.is_file():
                raise DataFileError(
                    f"no such file: {path}; give a SQuAD-format JSON file"
                )


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded checkpoint and its questions as windows."""

    files: CheckpointFiles
    checkpoint: Checkpoint
    tokenizer: ReaderTokenizer
    inputs: tuple[str, ...]
    buckets: tuple[int, ...]
    """Padded lengths, ascending, in tokens."""
    calibration: list[EncodedQuestion]
    evaluation: list[EncodedQuestion]

    @property
    def max_window_tokens(self) -> int:
        """Longest window."""
        return self.buckets[-1]

    @property
    def calibration_windows(self) -> list[Window]:
        """What ranges are collected on."""
        windows = [window for item in self.calibration for window in item.windows]
        return windows[:: -(-len(windows) // CALIBRATION_WINDOWS)]

    @property
    def questions(self) -> list[SquadQuestion]:
        """The evaluation questions, in order."""
        return [item.question for item in self.evaluation]

    def load_reader(self) -> torch.nn.Module:
        """The float reader, loaded anew: quantizing one changes it in place."""
        return wrap_model(load_checkpoint(self.files).model)

    def answer(
        self,
        infer: Infer,
        encoded: Sequence[EncodedQuestion] | None = None,
        *,
        on_question: Callable[[], None] = lambda: None,
    ) -> Answers:
        """Answers of one model, by default to the evaluation questions."""
        return answer_questions(
            infer,
            self.evaluation if encoded is None else encoded,
            self.inputs,
            bucket_for=lambda size: next(b for b in self.buckets if b >= size),
            pad_token_id=self.checkpoint.pad_token_id,
            batch=EVALUATION_BATCH,
            on_question=on_question,
        )


def load_subject(
    files: CheckpointFiles,
    sources: QuestionSources,
    tokenizer_path: Path,
    *,
    bucket_step: int = BUCKET_STEP,
) -> Subject:
    """Load the checkpoint and encode its questions.

    Args:
        files: see checkpoint.resolve_checkpoint.
        sources: calibration and evaluation questions.
        tokenizer_path: where ``tokenizer.json`` is written.
        bucket_step: what padded lengths are multiples of, in tokens.

    Raises:
        CheckpointError: the checkpoint reads too few tokens.
        DataFileError: a file has no answerable question, or both share questions.
    """
    checkpoint = load_checkpoint(files)
    longest = min(MAX_WINDOW_TOKENS, checkpoint.max_positions)
    buckets = tuple(range(bucket_step, longest + 1, bucket_step))
    if longest < LEAST_WINDOW_TOKENS:
        raise CheckpointError(
            f"{files.name} reads at most {checkpoint.max_positions} tokens; at least "
            f"{LEAST_WINDOW_TOKENS} are needed"
        )
    tokenizer_path.write_bytes(checkpoint.tokenizer_json)
    tokenizer = ReaderTokenizer.from_file(tokenizer_path)

    def encode(path: Path, limit: int | None) -> list[EncodedQuestion]:
        questions = [q for q in load_questions(path) if not q.is_impossible]
        if not questions:
            raise DataFileError(f"{path} has no answerable question")
        return encode_questions(
            tokenizer,
            spread_evenly(questions, limit),
            max_window_tokens=buckets[-1],
            doc_stride=min(DOC_STRIDE_TOKENS, buckets[-1] // 2),
        )

    calibration = encode(sources.calibration, sources.calibration_limit)
    evaluation = encode(sources.evaluation, sources.evaluation_limit)
    shared = {_key(item) for item in calibration} & {_key(item) for item in evaluation}
    if shared:
        raise DataFileError(
            f"{len(shared)} questions are in both the calibration and the evaluation "
            f"data; the accuracy measured would be too good. Split them"
        )
    return Subject(
        files=files,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        inputs=model_inputs(takes_token_types=checkpoint.takes_token_types),
        buckets=buckets,
        calibration=calibration,
        evaluation=evaluation,
    )


_Item = TypeVar("_Item")


def spread_evenly(items: Sequence[_Item], limit: int | None) -> list[_Item]:
    """At most ``limit`` questions, evenly spaced: neighbours share a paragraph."""
    if limit is None or limit >= len(items):
        return list(items)
    step = len(items) / limit
    return [items[int(i * step)] for i in range(limit)]


def _key(item: EncodedQuestion) -> tuple[str, str]:
    return item.question.question, item.question.context
