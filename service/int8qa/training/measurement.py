"""EM and F1 of a checkpoint as it lies on disk.

In: a checkpoint's directory and SQuAD questions. Out: scores in float, and with the
fake quantization it was trained with. What is measured is what was written: read
back, weights rounded to the type they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa.build.accuracy import (
    Infer,
    Logits,
    answer_questions,
    encode_questions,
)
from int8qa.build.checkpoint import Checkpoint
from int8qa.build.export import model_inputs
from int8qa.build.subject import BUCKET_STEP, EVALUATION_BATCH, spread_evenly
from int8qa.errors import DataFileError
from int8qa.reader.squad import (
    Scores,
    SquadQuestion,
    load_questions,
    score_predictions,
)
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS

if TYPE_CHECKING:
    import torch


def load_evaluation(
    path: Path, limit: int | None, trained_on: frozenset[tuple[str, str]]
) -> list[SquadQuestion]:
    """Questions to measure on.

    Raises:
        DataFileError: some of them were trained on.
    """
    questions = spread_evenly(load_questions(path), limit)
    shared = sum((item.question, item.context) in trained_on for item in questions)
    if shared:
        raise DataFileError(
            f"{shared} questions of {path} are in the training data, too; the accuracy "
            f"measured would be too good. Split them"
        )
    return questions


def measure_reader(
    reader: torch.nn.Module,
    checkpoint: Checkpoint,
    tokenizer: ReaderTokenizer,
    questions: Sequence[SquadQuestion],
    *,
    on_question: Callable[[], None] = lambda: None,
) -> Scores:
    """Answer and score, on the GPU if there is one.

    The null answer is allowed where the file has questions without one, as SQuAD v2.0
    is scored, and not elsewhere, as v1.1 is.

    Args:
        reader: the wrapped model of ``checkpoint``, float or with quantizers.
        checkpoint: whose limits and padding count.
        tokenizer: the checkpoint's.
        questions: see :func:`load_evaluation`.
        on_question: called once a question.
    """
    longest = min(MAX_WINDOW_TOKENS, checkpoint.max_positions)
    longest -= longest % BUCKET_STEP
    encoded = encode_questions(
        tokenizer,
        questions,
        max_window_tokens=longest,
        doc_stride=min(DOC_STRIDE_TOKENS, longest // 2),
    )
    inputs = model_inputs(takes_token_types=checkpoint.takes_token_types)
    answers = answer_questions(
        _run_on_device(reader, inputs),
        encoded,
        inputs,
        bucket_for=lambda size: -(-size // BUCKET_STEP) * BUCKET_STEP,
        pad_token_id=checkpoint.pad_token_id,
        batch=EVALUATION_BATCH,
        allow_no_answer=any(question.is_impossible for question in questions),
        on_question=on_question,
    )
    return score_predictions(questions, answers.texts)


def _run_on_device(reader: torch.nn.Module, inputs: Sequence[str]) -> Infer:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader.to(device).eval()

    def infer(feed: Mapping[str, Any]) -> Logits:
        with torch.no_grad():
            start, end = reader(
                *(torch.from_numpy(feed[name]).to(device) for name in inputs)
            )
        return start.float().cpu().numpy(), end.float().cpu().numpy()

    return infer
