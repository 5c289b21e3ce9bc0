"""Questions as training windows, split and tokenized by the reader that serves.

In: SQuAD v1.1 and v2.0 files. Out: windows with the first and last token of every
answer, or the null position where a window holds none; counts of what was used.
Negatives pair a question with another paragraph of its article. Knows no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from int8qa.build.subject import spread_evenly
from int8qa.errors import DataFileError, InvalidInputError
from int8qa.reader.squad import SquadQuestion, load_questions, normalize_answer
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_tokens
from int8qa.training.options import hash_data

NULL = 0
"""Token that stands for "no answer here": the first, as in reader/spans.py."""


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """A window, and where its answers begin and end in tokens."""

    window: Window
    places: tuple[tuple[int, int], ...]
    """First and last token of each annotator's answer, NULL twice where the window
    does not hold it; at least one. Equal ones are kept: they are votes."""
    group: int
    """Number of its file."""


@dataclass(frozen=True, slots=True)
class FileCount:
    """What one file gave."""

    name: str
    sha256: str
    questions: int
    """With an answer."""
    unanswerable: int
    """Without one, as the file says."""
    negatives: int
    """Without one, made here."""
    windows: int
    skipped: int
    """Left out: the answer has no token, or the question fills a window."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """All windows of a run, file after file."""

    windows: list[TrainingWindow]
    counts: list[FileCount]
    keys: frozenset[tuple[str, str]]
    """Question and context of every question used."""


def load_training_set(
    paths: Sequence[Path],
    tokenizer: ReaderTokenizer,
    *,
    max_window_tokens: int,
    doc_stride: int,
    negatives: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
    on_file: Callable[[], None] = lambda: None,
) -> TrainingSet:
    """Read, pair and split.

    Args:
        paths: SQuAD-format files, in the order they are to be used.
        tokenizer: the checkpoint's.
        max_window_tokens: longest window.
        doc_stride: context tokens that neighbouring windows share.
        negatives: see :func:`pair_negatives`; of each file.
        limit: questions used of each file, evenly spaced.
        seed: of the pairing.
        on_file: called after each file.

    Raises:
        DataFileError: a file is malformed, or gives no window, or negatives are wanted
            and no file has an article of two paragraphs.
    """
    windows: list[TrainingWindow] = []
    counts: list[FileCount] = []
    keys: set[tuple[str, str]] = set()
    for group, path in enumerate(paths):
        questions = spread_evenly(load_questions(path), limit)
        made = pair_negatives(
            questions, read_articles(path), negatives, seed=f"{seed}/{group}"
        )
        found, skipped = _encode(
            [*questions, *made],
            tokenizer,
            group,
            max_window_tokens=max_window_tokens,
            doc_stride=doc_stride,
        )
        if not found:
            raise DataFileError(
                f"{path} gives nothing to train on: all {len(questions)} questions "
                f"were left out, as their answers have no tokens or they fill a "
                f"window of {max_window_tokens} tokens"
            )
        windows += found
        impossible = sum(question.is_impossible for question in questions)
        counts.append(
            FileCount(
                name=path.name,
                sha256=hash_data(path),
                questions=len(questions) - impossible,
                unanswerable=impossible,
                negatives=len(made),
                windows=len(found),
                skipped=skipped,
            )
        )
        keys |= {(question.question, question.context) for question in questions}
        on_file()
    if negatives and not any(count.negatives for count in counts):
        raise DataFileError(
            "--negatives pairs questions with other paragraphs of their article, and "
            "no article of the training files has a second one without the answer; "
            "leave it out, or train on files with questions marked is_impossible"
        )
    return TrainingSet(windows, counts, frozenset(keys))


def read_articles(path: Path) -> list[list[str]]:
    """The contexts of each article; of a file that ``load_questions`` has accepted."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [
        [paragraph["context"] for paragraph in article["paragraphs"]]
        for article in document["data"]
    ]


def pair_negatives(
    questions: Sequence[SquadQuestion],
    articles: Sequence[Sequence[str]],
    fraction: float,
    *,
    seed: str,
) -> list[SquadQuestion]:
    """Questions put to another paragraph of their article, which lacks the answer.

    Neighbouring paragraphs share names and words with the question, so that what is
    learned is more than spotting a foreign topic.

    Args:
        questions: of one file.
        articles: contexts by article, of the same file.
        fraction: of the answerable questions, 0-1, to be put a second time.
        seed: the same seed gives the same pairs.

    Returns:
        At most that many: a question whose answer stands in every other paragraph has
        no pair.
    """
    article_of = {
        context: number
        for number, contexts in enumerate(articles)
        for context in contexts
    }
    answerable = [question for question in questions if not question.is_impossible]
    # A string seeds by its bytes; Python's hash of it would differ in each process.
    draw = random.Random(seed)  # noqa: S311
    chosen = draw.sample(answerable, round(fraction * len(answerable)))
    made = []
    for question in chosen:
        answers = [normalize_answer(answer) for answer in question.answers]
        others = list(dict.fromkeys(articles[article_of[question.context]]))
        draw.shuffle(others)
        for context in others:
            text = f" {normalize_answer(context)} "
            if context == question.context or not context.strip():
                continue
            if not any(f" {answer} " in text for answer in answers):
                made.append(
                    replace(
                        question,
                        id=f"{question.id}-elsewhere",
                        context=context,
                        answers=(),
                        answer_starts=(),
                        is_impossible=True,
                    )
                )
                break
    return made


def _encode(
    questions: Sequence[SquadQuestion],
    tokenizer: ReaderTokenizer,
    group: int,
    *,
    max_window_tokens: int,
    doc_stride: int,
) -> tuple[list[TrainingWindow], int]:
    """Windows in the order of the questions, and how many questions were left out."""
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = tokenizer.encode_batch(contexts, field="context")
    tokens = dict(zip(contexts, encoded, strict=True))
    asked = tokenizer.encode_batch([q.question for q in questions], field="question")
    found: list[TrainingWindow] = []
    skipped = 0
    for question, question_tokens in zip(questions, asked, strict=True):
        try:
            windows = split_tokens(
                tokenizer.template,
                question_tokens,
                tokens[question.context],
                max_window_tokens=max_window_tokens,
                doc_stride=doc_stride,
            )
        except InvalidInputError:
            skipped += 1
            continue
        labels = [locate_answers(question, window) for window in windows]
        if not question.is_impossible and not any(map(holds_answer, labels)):
            skipped += 1
            continue
        found += [
            TrainingWindow(window, places, group)
            for window, places in zip(windows, labels, strict=True)
        ]
    return found, skipped


def holds_answer(places: Sequence[tuple[int, int]]) -> bool:
    """Whether any annotator's answer is in the window."""
    return any(start != NULL for start, _ in places)


def locate_answers(
    question: SquadQuestion, window: Window
) -> tuple[tuple[int, int], ...]:
    """First and last token in ``window`` of each of the question's answers, in order.

    NULL twice stands for an answer that the window does not hold or cuts off, and alone
    for a question without one.
    """
    if question.is_impossible:
        return ((NULL, NULL),)
    return tuple(
        _locate(begin, begin + len(answer), window)
        for answer, begin in zip(question.answers, question.answer_starts, strict=True)
    )


def _locate(begin: int, stop: int, window: Window) -> tuple[int, int]:
    """Tokens of the context's characters ``begin`` to ``stop``, all of them or NULL."""
    starts, ends = window.offsets[:, 0], window.offsets[:, 1]
    touched = np.flatnonzero((ends > begin) & (starts < stop) & (ends > starts))
    if not len(touched):
        return NULL, NULL
    first, last = int(touched[0]), int(touched[-1])
    cut_left = starts[first] > begin and first == 0 and window.index > 0
    cut_right = ends[last] < stop and last == len(ends) - 1
    if cut_left or cut_right:
        return NULL, NULL
    return window.context_start + first, window.context_start + last
