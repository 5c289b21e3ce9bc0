"""Answers by precision, held against float32 on the same questions.

In: questions, and functions that turn windows into logits. Out: EM/F1 by precision,
how many answers equal float32's, the largest logit deviation, and the gate's ruling.
Knows neither torch nor an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from int8qa.build.feed import window_feed
from int8qa.errors import AccuracyGateError
from int8qa.reader.spans import decode_spans
from int8qa.reader.squad import (
    ANSWER_TOKENS,
    SquadQuestion,
    f1_score,
    score_predictions,
)
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_windows

DEFAULT_GATE = 0.99
"""Least share of float32's F1. Source: MLPerf Inference rules, BERT-99."""

_ONE_SIDED_95 = 1.645
"""Standard errors below which 95 % of a normal distribution lie, on one side."""

Logits = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Infer = Callable[[Mapping[str, Any]], Logits]
"""int32 [B, S] per input name to start and end logits, float32 [B, S]."""


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question with its windows."""

    question: SquadQuestion
    windows: list[Window]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one precision made of a question set."""

    texts: dict[str, str]
    """Answer by question id."""
    logits: list[Logits]
    """Per window start and end, [S] without padding, in question order."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One precision against float32."""

    f1: float
    exact_match: float
    questions: int
    f1_ratio: float
    """Share of float32's F1."""
    f1_ratio_margin: float
    """What chance may add to or take from that share: the half-width of its one-sided
    95 % confidence bound over these questions, which shrinks with their number."""
    agreement: float
    """Share of answers equal to float32's, 0-1."""
    max_logit_deviation: float
    """Largest |logit - float32's logit| over all tokens of all windows."""
    rms_logit_error: float
    """Root mean square of the same difference: steadier than F1, which moves by whole
    answers."""


def encode_questions(
    tokenizer: ReaderTokenizer,
    questions: Sequence[SquadQuestion],
    *,
    max_window_tokens: int,
    doc_stride: int,
) -> list[EncodedQuestion]:
    """Split each question and its context into windows."""
    return [
        EncodedQuestion(
            question,
            split_windows(
                tokenizer,
                question.question,
                question.context,
                max_window_tokens=max_window_tokens,
                doc_stride=doc_stride,
            ),
        )
        for question in questions
    ]


def answer_questions(
    infer: Infer,
    encoded: Sequence[EncodedQuestion],
    inputs: Sequence[str],
    *,
    bucket_for: Callable[[int], int],
    pad_token_id: int,
    batch: int = 1,
    allow_no_answer: bool = False,
    on_question: Callable[[], None] = lambda: None,
) -> Answers:
    """Answer every question, its windows padded as the gateway pads.

    Args:
        infer: the model.
        encoded: the questions.
        inputs: names of the model's inputs.
        bucket_for: padded length of a window of so many tokens.
        pad_token_id: what stands behind a window's end.
        batch: windows of one padded length that go in together; fewer than that go in
            one by one, because engines compile for each new shape.
        allow_no_answer: whether the null answer may win; its text is empty.
        on_question: called once per question.
    """
    windows = [window for item in encoded for window in item.windows]
    rows: dict[int, Logits] = {}
    waiting: dict[int, list[int]] = {}

    def run(indices: Sequence[int], length: int) -> None:
        feeds = [
            window_feed(windows[i], inputs, length=length, pad_token_id=pad_token_id)
            for i in indices
        ]
        start, end = infer(
            {name: np.concatenate([feed[name] for feed in feeds]) for name in inputs}
        )
        for row, index in enumerate(indices):
            size = len(windows[index])
            rows[index] = (start[row, :size], end[row, :size])

    index = 0
    for item in encoded:
        for window in item.windows:
            length = bucket_for(len(window))
            waiting.setdefault(length, []).append(index)
            if len(waiting[length]) == batch:
                run(waiting.pop(length), length)
            index += 1
        on_question()
    for length, indices in waiting.items():
        for rest in indices:
            run([rest], length)

    logits = [rows[i] for i in range(len(windows))]
    texts: dict[str, str] = {}
    low = 0
    for item in encoded:
        high = low + len(item.windows)
        spans = decode_spans(
            item.question.context,
            item.windows,
            [start for start, _ in logits[low:high]],
            [end for _, end in logits[low:high]],
            max_answer_tokens=ANSWER_TOKENS,
            allow_no_answer=allow_no_answer,
        )
        texts[item.question.id] = spans[0].text if spans else ""
        low = high
    return Answers(texts, logits)


def compare_answers(
    reference: Answers, answers: Answers, questions: Sequence[SquadQuestion]
) -> Accuracy:
    """Score ``answers`` and hold them to ``reference``, question by question."""
    score = score_predictions(questions, answers.texts)
    base = score_predictions(questions, reference.texts)
    ratio = score.f1 / base.f1 if base.f1 else 1.0
    same = sum(
        answers.texts[question.id] == reference.texts[question.id]
        for question in questions
    )
    return Accuracy(
        f1=score.f1,
        exact_match=score.exact,
        questions=len(questions),
        f1_ratio=ratio,
        f1_ratio_margin=_ratio_margin(reference, answers, questions, ratio),
        agreement=same / len(questions),
        max_logit_deviation=max_deviation(reference.logits, answers.logits),
        rms_logit_error=rms_error(reference.logits, answers.logits),
    )


def share_equal(one: Answers, other: Answers) -> float:
    """Share of questions that both answer alike, 0-1."""
    same = sum(text == other.texts[key] for key, text in one.texts.items())
    return same / len(one.texts)


def rms_error(reference: Sequence[Logits], other: Sequence[Logits]) -> float:
    """Root mean square difference of two lists of logits; NaN counts as inf."""
    squares, count = 0.0, 0
    for expected, found in zip(reference, other, strict=True):
        for left, right in zip(expected, found, strict=True):
            squares += float(np.sum((left - right).astype(np.float64) ** 2))
            count += left.size
    error = float(np.sqrt(squares / count)) if count else 0.0
    return error if np.isfinite(error) else float("inf")


def _ratio_margin(
    reference: Answers,
    answers: Answers,
    questions: Sequence[SquadQuestion],
    ratio: float,
) -> float:
    """Half-width of the confidence bound of a ratio of paired means.

    Source: Cochran, Sampling Techniques, section 6.4 (variance of a ratio estimate by
    linearization): the standard error of mean(y) / mean(x) is that of the mean of
    y - ratio * x, divided by mean(x).
    """
    expected = np.array([f1_score(reference.texts[q.id], q.answers) for q in questions])
    found = np.array([f1_score(answers.texts[q.id], q.answers) for q in questions])
    if len(questions) < 2 or not expected.any():
        return 0.0
    residuals = found - ratio * expected
    error = residuals.std(ddof=1) / np.sqrt(len(questions)) / expected.mean()
    return float(_ONE_SIDED_95 * error)


def max_deviation(reference: Sequence[Logits], other: Sequence[Logits]) -> float:
    """Largest absolute difference between two lists of logits; NaN counts as inf."""
    worst = 0.0
    for expected, found in zip(reference, other, strict=True):
        for left, right in zip(expected, found, strict=True):
            deviation = float(np.max(np.abs(left - right)))
            worst = max(worst, deviation if np.isfinite(deviation) else float("inf"))
    return worst


def check_gate(int8: Accuracy, *, gate: float, advice: Sequence[str] = ()) -> list[str]:
    """Refuse an INT8 model that is shown to lose more than the gate allows.

    Shown: the share of float32's F1 lies below the gate by more than chance explains.
    On 200 questions INT8 and float32 differ on some ten answers, and one answer moves
    the share by half a point; without the margin good models would fail by luck.

    Args:
        int8: measured against float32 on the same checkpoint and questions; seeds of
            one training differ by as much as quantization costs, so an unpaired
            comparison would say nothing.
        gate: least share of float32's F1, 0-1; 0 switches the gate off.
        advice: what could be tried next, the most promising first.

    Returns:
        Remarks for the report: that the questions are too few to decide.

    Raises:
        AccuracyGateError: measured, allowed, and what to try next; or FP32 itself
            answers nothing right, so that there is nothing to compare.
    """
    if gate and not int8.f1 and int8.f1_ratio == 1.0:
        raise AccuracyGateError(
            f"FP32 answers none of the {int8.questions} evaluation questions right, so "
            f"what INT8 costs cannot be measured; give other --evaluation-data, or "
            f"--gate 0 to build all the same"
        )
    share = describe_share(int8.f1_ratio, int8.f1_ratio_margin)
    if not passes_gate(int8, gate):
        raise AccuracyGateError(
            f"INT8 keeps {share} of FP32's F1 ({int8.f1:.2f} over {int8.questions} "
            f"questions); the gate asks for {100 * gate:g} %. "
            f"{list_steps(advice, int8.f1_ratio)}"
        )
    if int8.f1_ratio < gate:
        remark = (
            f"INT8 keeps {share} of FP32's F1: under the gate of {100 * gate:g} %, but "
            f"by no more than chance explains on {int8.questions} questions. Measure "
            f"on more of them with `int8qa evaluate`"
        )
        return [remark]
    return []


def list_steps(advice: Sequence[str], ratio: float) -> str:
    """The next three things to try, and the gate that a share ``ratio`` passes."""
    accept = f"--gate {max(ratio - 0.001, 0.0):.3f} if this loss is acceptable"
    return f"Next: {'; '.join([*advice[:3], accept])}"


def passes_gate(int8: Accuracy, gate: float) -> bool:
    """Whether the loss is not shown to be larger than the gate allows."""
    return int8.f1_ratio + int8.f1_ratio_margin >= gate


def describe_share(ratio: float, margin: float) -> str:
    """A share of F1 for people: ``98.85 ± 1.10 %``."""
    return f"{100 * ratio:.2f} ± {100 * margin:.2f} %"
