"""The golden answers of the former pipeline, read back for the reader's tests.

In: ``pipeline/answers.json`` and ``pipeline/logits.npz``. Out: cases with their texts
resolved, the reader's names for the pipeline's parameters, and a comparison with the
stated tolerance.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import int8qa
from int8qa.reader.spans import Span
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_windows
from tests.golden.pipeline_cases import Case, QuestionTexts, load_texts

DATA = Path(int8qa.__file__).parent / "data"
CHECKPOINT = DATA / "checkpoint"
GOLDEN = Path(__file__).parent / "pipeline"

REMEDY = "the golden file is of other questions or of another checkpoint: `make golden`"

_DECODE_NAMES = {
    "top_k": "top_k",
    "max_answer_len": "max_answer_tokens",
    "handle_impossible_answer": "allow_no_answer",
    "align_to_words": "align_to_words",
}


@dataclass(frozen=True)
class GoldenCase:
    """One call of the pipeline with everything it answered; texts come on demand."""

    case: Case
    context_crc32: int
    windows: int
    input_ids_crc32: int
    answers: tuple[Span, ...]
    logits: tuple[tuple[np.ndarray, np.ndarray], ...] | None

    @property
    def id(self) -> str:
        return self.case.id

    @property
    def params(self) -> Mapping[str, Any]:
        return self.case.params

    @cached_property
    def texts(self) -> tuple[str, str]:
        """Question and context; fails if the question files have changed since."""
        try:
            question, context = load_project_texts().resolve(self.case)
        except KeyError:
            pytest.fail(f"{self.id}: {REMEDY}")
        assert zlib.crc32(context.encode("utf-8")) == self.context_crc32, REMEDY
        return question, context

    @property
    def context(self) -> str:
        return self.texts[1]

    @property
    def decode_params(self) -> dict[str, Any]:
        """The parameters that concern spans, by the reader's names."""
        return {
            _DECODE_NAMES[name]: value
            for name, value in self.params.items()
            if name in _DECODE_NAMES
        }

    def split(self, tokenizer: ReaderTokenizer) -> list[Window]:
        """The case's windows, with the pipeline's defaults."""
        max_window_tokens = self.params.get("max_seq_len", 384)
        return split_windows(
            tokenizer,
            *self.texts,
            max_window_tokens=max_window_tokens,
            doc_stride=self.params.get("doc_stride", min(max_window_tokens // 2, 128)),
        )

    def assert_answers(self, found: Sequence[Span], *, rel: float, abs_: float) -> None:
        """Fail unless texts and offsets are equal and scores within tolerance."""
        expected = [(a.text, a.start, a.end) for a in self.answers]
        assert [(a.text, a.start, a.end) for a in found] == expected, self.id
        np.testing.assert_allclose(
            [answer.score for answer in found],
            [answer.score for answer in self.answers],
            rtol=rel,
            atol=abs_,
            err_msg=self.id,
        )


@lru_cache(maxsize=1)
def load_tokenizer() -> ReaderTokenizer:
    return ReaderTokenizer.from_file(CHECKPOINT / "tokenizer.json")


@lru_cache(maxsize=1)
def load_project_texts() -> QuestionTexts:
    return load_texts(DATA / "questions")


@lru_cache(maxsize=1)
def load_golden() -> tuple[GoldenCase, ...]:
    """Every golden case, in the order of the file."""
    document = json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "logits.npz") as stored:
        edges = np.cumsum(stored["lengths"])[:-1]
        vectors = list(
            zip(
                np.split(stored["start"], edges),
                np.split(stored["end"], edges),
                strict=True,
            )
        )
    cases: list[GoldenCase] = []
    used = 0
    for entry in document["cases"]:
        logits = None
        if entry["logits"]:
            logits = tuple(vectors[used : used + entry["windows"]])
            used += entry["windows"]
        cases.append(
            GoldenCase(
                case=Case.from_json(entry),
                context_crc32=entry["context_crc32"],
                windows=entry["windows"],
                input_ids_crc32=entry["input_ids_crc32"],
                answers=tuple(Span(*answer) for answer in entry["answers"]),
                logits=logits,
            )
        )
    assert used == len(vectors), "answers.json and logits.npz are not of one run"
    return tuple(cases)
