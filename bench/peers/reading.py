"""Reading as most servers of extractive question answering do it by hand.

In: a question and a context; logits. Out: overlapping windows of tokens, padded to the
longest of a batch, and the best span as text. It follows the question answering script
among the examples of transformers: windows of 384 tokens that share 128, the best sum
of a start and an end logit over all windows. Knows no server and no engine; numpy and
tokenizers only. Shared by peers that get no reading from their framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

WINDOW_TOKENS = 384
STRIDE_TOKENS = 128
ANSWER_TOKENS = 30

Array = npt.NDArray[Any]


class Reading:
    """A checkpoint's tokenizer, with the windows of the example."""

    def __init__(self, tokenizer: Path) -> None:
        """Load ``tokenizer.json``."""
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(
            WINDOW_TOKENS, stride=STRIDE_TOKENS, strategy="only_second"
        )

    def split(self, question: str, context: str) -> list[Encoding]:
        """The windows of one question, in document order."""
        first = self._tokenizer.encode(question, context)
        return [first, *first.overflowing]


def pad_windows(windows: Sequence[Encoding], length: int = 0) -> dict[str, Array]:
    """Model inputs, int32 [B, S], padded to the longest window or to ``length``."""
    length = max(length, *(len(window) for window in windows))
    arrays = {
        name: np.zeros((len(windows), length), np.int32)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, window in enumerate(windows):
        size = len(window)
        arrays["input_ids"][row, :size] = window.ids
        arrays["attention_mask"][row, :size] = 1
        arrays["token_type_ids"][row, :size] = window.type_ids
    return arrays


def find_answer(
    context: str, windows: Sequence[Encoding], starts: Array, ends: Array
) -> str:
    """The best span of all windows; logits are [B, S], a row for each window."""
    best, answer = -np.inf, ""
    for window, start, end in zip(windows, starts, ends, strict=True):
        places = np.flatnonzero(np.array(window.sequence_ids) == 1)
        if not len(places):
            continue
        scores = start[places][:, None] + end[places][None, :]
        allowed = np.tril(np.triu(np.ones(scores.shape, bool)), ANSWER_TOKENS - 1)
        scores = np.where(allowed, scores, -np.inf)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, last] > best:
            best = scores[first, last]
            begin = window.offsets[places[first]][0]
            stop = window.offsets[places[last]][1]
            answer = context[begin:stop]
    return answer
