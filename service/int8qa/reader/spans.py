"""Logits to answers.

In: the windows of one request and their start and end logits. Out: the n best
answers as spans of the context, with the scores of the former transformers 5.2
``QuestionAnsweringPipeline``. Knows neither the model nor how windows were batched.

Two departures from it, both where it answers with noise: candidates of probability
zero are dropped (it fills a short list with them), and a ``[CLS]`` typed by the user
into the question is no place for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from int8qa.errors import EngineOutputError, InvalidInputError
from int8qa.reader.tokenizer import NO_WORD
from int8qa.reader.windows import Window

FloatArray = npt.NDArray[np.float32]
LogitArray = npt.NDArray[np.floating[Any]]
IndexArray = npt.NDArray[np.intp]

MAX_ANSWER_TOKENS = 15
"""Source: transformers 5.2 ``QuestionAnsweringPipeline``, ``max_answer_len``."""


@dataclass(frozen=True, slots=True)
class Span:
    """An answer: ``context[start:end] == text``, offsets in code points."""

    text: str
    start: int
    end: int
    score: float
    """Sum over windows and wordings of the probability of the span; at least 0, and
    above 1 only when several windows agree on it."""

    @property
    def is_null(self) -> bool:
        """Whether this says that the context holds no answer."""
        return self.end == 0


def decode_spans(
    context: str,
    windows: Sequence[Window],
    start_logits: Sequence[LogitArray],
    end_logits: Sequence[LogitArray],
    *,
    top_k: int = 1,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    allow_no_answer: bool = False,
    null_score_diff_threshold: float = 0.0,
    align_to_words: bool = True,
) -> list[Span]:
    """Decode the best answers of one request.

    Args:
        context: the text the windows were split from.
        windows: all windows of the request, in document order.
        start_logits: per window float [S], padding already cut off.
        end_logits: likewise.
        top_k: answers wanted, 1 or more.
        max_answer_tokens: longest answer in tokens, 1 or more.
        allow_no_answer: also rank the null answer, text "" at [0, 0), scored by its
            lowest probability over all windows.
        null_score_diff_threshold: how far log(score) of the null answer must exceed
            an answer's to rank before it; below 0 it may even trail. Scores stay as
            they are. At 0 the source's ranking; otherwise that of transformers'
            ``run_qa.py --version_2_with_negative``.
        align_to_words: widen answers to whole words.

    Returns:
        At most ``top_k`` answers, best first, equal texts (but for case) merged into
        the first one found. Never empty: where the null position takes so much that
        every other probability underflows, the null answer with score 0.

    Raises:
        InvalidInputError: ``top_k`` or ``max_answer_tokens`` is below 1.
        EngineOutputError: logits are missing, of the wrong length, or not finite.

    Source: transformers 5.2.0, ``pipelines/question_answering.py``
    (``postprocess``, ``select_starts_ends``, ``decode_spans``).
    """
    for field, value in (("top_k", top_k), ("max_answer_tokens", max_answer_tokens)):
        if value < 1:
            raise InvalidInputError(field, f"{field} is {value}; allowed: 1 or more")
    if not windows or not len(windows) == len(start_logits) == len(end_logits):
        raise EngineOutputError(
            f"the engine returned {len(start_logits)} start and {len(end_logits)} end "
            f"vectors for {len(windows)} windows; expected one each per window"
        )
    # Word alignment maps several candidates onto one answer, hence the surplus.
    per_window = top_k * 2 + 10 if align_to_words else top_k
    null_score = np.inf
    places: dict[str, tuple[int, int]] = {}
    totals: dict[str, float] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        start_probability, null_start = _softmax(window, starts, "start")
        end_probability, null_end = _softmax(window, ends, "end")
        null_score = min(null_score, float(null_start * null_end))
        first, last, scores = _rank_candidates(
            start_probability, end_probability, per_window, max_answer_tokens
        )
        characters = _locate_candidates(window, first, last, align=align_to_words)
        for (begin, stop), score in zip(
            characters.tolist(), scores.tolist(), strict=True
        ):
            wording = context[begin:stop].lower()
            places.setdefault(wording, (begin, stop))
            totals[wording] = totals.get(wording, 0.0) + score

    answers = [
        Span(context[begin:stop], begin, stop, totals[wording])
        for wording, (begin, stop) in places.items()
    ]
    if allow_no_answer:
        answers.append(Span("", 0, 0, null_score))
    elif not answers:
        answers.append(Span("", 0, 0, 0.0))
    handicap = math.exp(-null_score_diff_threshold)
    # The sort is stable: of equal scores the first found stays first.
    answers.sort(
        key=lambda answer: answer.score * (handicap if answer.is_null else 1.0),
        reverse=True,
    )
    return answers[:top_k]


def _softmax(
    window: Window, logits: LogitArray, side: str
) -> tuple[FloatArray, np.float32]:
    """Probabilities of the context tokens [C], and of the null position, token 0.

    The softmax runs over both together, as in the pipeline; question and separator
    tokens take no share.
    """
    if logits.shape != window.input_ids.shape:
        raise EngineOutputError(
            f"the engine returned {side} logits of shape {logits.shape} for window "
            f"{window.index} of {len(window)} tokens; expected ({len(window)},)"
        )
    if not np.isfinite(logits).all():
        raise EngineOutputError(
            f"the engine returned {int((~np.isfinite(logits)).sum())} {side} logits "
            f"that are not finite among {len(window)} of window {window.index}; the "
            f"engine overflows (half precision, a bad scale) or is broken: rebuild it"
        )
    candidates = np.empty(
        1 + window.context_end - window.context_start, dtype=np.float32
    )
    candidates[0] = logits[0]
    candidates[1:] = logits[window.context_start : window.context_end]
    candidates -= candidates.max()
    np.exp(candidates, out=candidates)
    candidates /= candidates.sum()
    return candidates[1:], candidates[0]


def _rank_candidates(
    start: FloatArray, end: FloatArray, count: int, max_answer_tokens: int
) -> tuple[IndexArray, IndexArray, FloatArray]:
    """The ``count`` most probable [first, last] token pairs, best first.

    ``start`` and ``end`` are [C]; only the band of pairs at most ``max_answer_tokens``
    long is computed, [width, C] instead of [C, C].
    """
    width = min(max_answer_tokens, len(start))
    padded = np.zeros(len(end) + width - 1, dtype=np.float32)
    padded[: len(end)] = end
    # Row k is end[k : k + C]; numpy's own view of it costs as much as all the rest.
    band: FloatArray = np.ndarray(
        (width, len(start)), np.float32, padded, 0, padded.strides * 2
    )
    scores = band * start
    # A pair among the best is in one of as many columns of the best maxima. Stable, and
    # sorted again, so that of equal scores the earlier span wins.
    columns = np.sort(np.argsort(-scores.max(axis=0), kind="stable")[:count])
    scores = scores.T[columns].ravel()
    order = np.argsort(-scores, kind="stable")[:count]
    order = order[scores[order] > 0.0]
    column, length = np.divmod(order, width)
    first = columns[column]
    return first, first + length, scores[order]


def _locate_candidates(
    window: Window, first: IndexArray, last: IndexArray, *, align: bool
) -> npt.NDArray[np.int32]:
    """Character spans [K, 2] of K candidates, widened to whole words if asked.

    A word is only what this window holds of it, and a candidate that touches a token
    outside all words keeps its own offsets, both as in the pipeline.
    """
    if align:
        first_word = window.word_ids[first]
        last_word = window.word_ids[last]
        in_words = (first_word != NO_WORD) & (last_word != NO_WORD)
        word_start = (window.word_ids == first_word[:, None]).argmax(axis=1)
        word_end = (
            len(window.word_ids)
            - 1
            - (window.word_ids[::-1] == last_word[:, None]).argmax(axis=1)
        )
        first = np.where(in_words, word_start, first)
        last = np.where(in_words, word_end, last)
    characters = np.empty((len(first), 2), dtype=np.int32)
    characters[:, 0] = window.offsets[first, 0]
    characters[:, 1] = window.offsets[last, 1]
    return characters
