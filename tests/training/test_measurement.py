"""Scores of a checkpoint: on what, allowed what, and not on what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.errors import DataFileError
from int8qa.reader.squad import load_questions
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.training.measurement import load_evaluation, measure_reader
from tests.training.runs import ARTICLES, write_articles


class Oracle(torch.nn.Module):
    """Points at one token of every window, or at the null position."""

    def __init__(self, token: int, null: float) -> None:
        super().__init__()
        self.token = token
        self.null = null

    def forward(self, ids: Any, mask: Any, types: Any) -> Any:
        del mask, types
        logits = torch.where(ids == self.token, 5.0, -5.0)
        logits[:, 0] = self.null
        return logits, logits


def measure(
    checkpoint: Path, tokenizer: ReaderTokenizer, path: Path, reader: Oracle
) -> Any:
    loaded = load_checkpoint(resolve_checkpoint(str(checkpoint)))
    questions = load_questions(path)
    ticks: list[None] = []
    scores = measure_reader(
        reader, loaded, tokenizer, questions, on_question=lambda: ticks.append(None)
    )
    assert len(ticks) == len(questions)
    return scores


@pytest.mark.parametrize(("null", "expected"), [(-9.0, 100.0), (9.0, 100.0)])
def test_answers_are_demanded_where_all_have_one(
    checkpoint: Path,
    tokenizer: ReaderTokenizer,
    tmp_path: Path,
    null: float,
    expected: float,
) -> None:
    """As SQuAD v1.1 is scored: the null position is not looked at."""
    path = write_articles(
        tmp_path / "a.json", [[("The mill burned in 1931.", (("When?", "1931"),))]]
    )
    (token,) = np.unique(tokenizer.encode("1931", field="context").ids)[-1:]
    scores = measure(checkpoint, tokenizer, path, Oracle(int(token), null))
    assert scores.no_ans_total == 0
    assert scores.f1 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("null", "has_answer", "no_answer"), [(-9.0, 100.0, 0.0), (9.0, 0.0, 100.0)]
)
def test_silence_counts_where_some_have_none(
    checkpoint: Path,
    tokenizer: ReaderTokenizer,
    tmp_path: Path,
    null: float,
    has_answer: float,
    no_answer: float,
) -> None:
    """As SQuAD v2.0 is scored, each kind of question by itself."""
    path = write_articles(
        tmp_path / "a.json",
        [[("The mill burned in 1931.", (("When?", "1931"), ("Who?", "")))]],
    )
    (token,) = np.unique(tokenizer.encode("1931", field="context").ids)[-1:]
    scores = measure(checkpoint, tokenizer, path, Oracle(int(token), null))
    assert (scores.has_ans_f1, scores.no_ans_f1) == (has_answer, no_answer)
    assert (scores.has_ans_total, scores.no_ans_total) == (1, 1)


def test_what_was_learned_measures_nothing(questions: Path) -> None:
    """The same question on the same context; the same question elsewhere is another."""
    (context, ((question, _), *_)), *_ = ARTICLES[0]
    with pytest.raises(DataFileError, match=r"^1 questions of .* Split them"):
        load_evaluation(questions, None, frozenset({(question, context)}))
    found = load_evaluation(questions, None, frozenset({(question, "elsewhere")}))
    assert len(found) == 8
    assert len(load_evaluation(questions, 4, frozenset())) == 4
