"""SQuAD files and SQuAD scores.

In: a SQuAD v1.1 or v2.0 JSON file; predicted texts by question id. Out: questions;
exact match and F1. Knows nothing of tokens or models.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8qa.errors import DataFileError

ANSWER_TOKENS = 30
"""Longest answer in SQuAD evaluations, in tokens. Source: the original BERT's
``run_squad.py``, ``max_answer_length``."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class SquadQuestion:
    """One question with its gold answers; both tuples are empty if impossible."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]
    """Character offset of each answer: ``context[start:].startswith(answer)``."""
    is_impossible: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over questions, in percent; the split is None where it has no question."""

    exact: float
    f1: float
    total: int
    missing: int
    """Questions without a prediction; they count as 0."""
    has_ans_exact: float | None
    has_ans_f1: float | None
    has_ans_total: int
    no_ans_exact: float | None
    no_ans_f1: float | None
    no_ans_total: int


def load_questions(path: Path) -> list[SquadQuestion]:
    """Read every question of a SQuAD v1.1 or v2.0 file, in file order.

    Raises:
        DataFileError: the file is missing, no JSON, or not of this format; the
            message names the JSON path of the first fault.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataFileError(
            f"cannot read the SQuAD file {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError:
        raise DataFileError(f"{path} is not UTF-8; SQuAD files are") from None
    except json.JSONDecodeError as error:
        # `from None`: the original error carries the whole file.
        raise DataFileError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}"
        ) from None
    except RecursionError:
        raise DataFileError(f"{path} is not SQuAD: nested too deeply") from None

    reader = _FaultNamingReader(path)
    questions: list[SquadQuestion] = []
    seen: set[str] = set()
    articles = reader.take(document, "$", "data", list)
    for i, article in enumerate(articles):
        at_article = f"$.data[{i}]"
        paragraphs = reader.take(article, at_article, "paragraphs", list)
        for j, paragraph in enumerate(paragraphs):
            at_paragraph = f"{at_article}.paragraphs[{j}]"
            context = reader.take(paragraph, at_paragraph, "context", str)
            entries = reader.take(paragraph, at_paragraph, "qas", list)
            for k, entry in enumerate(entries):
                at_question = f"{at_paragraph}.qas[{k}]"
                question = _read_question(reader, entry, at_question, context)
                if question.id in seen:
                    raise reader.fault(
                        f"{at_question}.id", "occurs twice; ids must be unique"
                    )
                seen.add(question.id)
                questions.append(question)
    if not questions:
        raise reader.fault("$.data", "holds no question")
    return questions


class _FaultNamingReader:
    """Takes typed members out of parsed JSON; its errors name file and JSON path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fault(self, json_path: str, what: str) -> DataFileError:
        return DataFileError(f"{self._path} is not SQuAD: {json_path} {what}")

    def take(self, parent: Any, json_path: str, key: str, kind: type) -> Any:
        if not isinstance(parent, dict):
            raise self.fault(json_path, f"is {type(parent).__name__}, expected object")
        if key not in parent:
            raise self.fault(f"{json_path}.{key}", "is missing")
        value = parent[key]
        # bool is an int to Python, but never a character offset.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fault(
                f"{json_path}.{key}",
                f"is {type(value).__name__}, expected {kind.__name__}",
            )
        return value


def _read_question(
    reader: _FaultNamingReader, entry: Any, at: str, context: str
) -> SquadQuestion:
    question_id = reader.take(entry, at, "id", str)
    question = reader.take(entry, at, "question", str)
    answers = reader.take(entry, at, "answers", list)
    is_impossible = False
    if "is_impossible" in entry:
        is_impossible = reader.take(entry, at, "is_impossible", bool)
    texts: list[str] = []
    starts: list[int] = []
    for index, answer in enumerate(answers):
        at_answer = f"{at}.answers[{index}]"
        text = reader.take(answer, at_answer, "text", str)
        start = reader.take(answer, at_answer, "answer_start", int)
        if start < 0 or not context.startswith(text, start):
            raise reader.fault(
                f"{at_answer}.answer_start",
                f"is {start}, but the context does not hold the answer there",
            )
        texts.append(text)
        starts.append(start)
    if is_impossible and texts:
        raise reader.fault(
            f"{at}.answers", f"holds {len(texts)} answers of an impossible question"
        )
    if not is_impossible and not texts:
        raise reader.fault(f"{at}.answers", "is empty, but is_impossible is not true")
    return SquadQuestion(
        id=question_id,
        question=question,
        context=context,
        answers=tuple(texts),
        answer_starts=tuple(starts),
        is_impossible=is_impossible,
    )


def normalize_answer(text: str) -> str:
    """Lower the case; drop ASCII punctuation and articles; single the spaces.

    Source: SQuAD ``evaluate-v1.1.py`` and ``evaluate-v2.0.py``, ``normalize_answer``.
    """
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if ``prediction`` equals a gold answer after normalisation, else 0.0.

    No gold answers means that the empty text is the right one.

    Source: SQuAD ``evaluate-v2.0.py``. On v1.1 files it differs from
    ``evaluate-v1.1.py`` only for gold answers that normalise to nothing, such as
    "a": v2.0 drops them (3 of the 10570 questions of the v1.1 dev set have one).
    """
    normalized = normalize_answer(prediction)
    return float(any(normalized == gold for gold in _normalize_gold(answers)))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of word precision and recall over the gold answers, 0-1.

    Source: SQuAD ``evaluate-v2.0.py``, ``compute_f1``; for v1.1 see ``exact_match``.
    """
    words = normalize_answer(prediction).split()
    return max(_word_f1(words, gold.split()) for gold in _normalize_gold(answers))


def _normalize_gold(answers: Sequence[str]) -> list[str]:
    normalized = [normalize_answer(answer) for answer in answers]
    return [answer for answer in normalized if answer] or [""]


def _word_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(gold)
    return 2 * precision * recall / (precision + recall)


def score_predictions(
    questions: Iterable[SquadQuestion], predictions: Mapping[str, str]
) -> Scores:
    """Score predicted texts, "" for no answer, by question id.

    A question without a prediction scores 0 (``evaluate-v1.1.py``); predictions of
    unknown ids are ignored.

    Raises:
        ValueError: there is no question to score.
    """
    answerable: list[tuple[float, float]] = []
    unanswerable: list[tuple[float, float]] = []
    missing = 0
    for question in questions:
        group = unanswerable if question.is_impossible else answerable
        prediction = predictions.get(question.id)
        if prediction is None:
            missing += 1
            group.append((0.0, 0.0))
            continue
        group.append(
            (
                exact_match(prediction, question.answers),
                f1_score(prediction, question.answers),
            )
        )
    everything = answerable + unanswerable
    if not everything:
        raise ValueError("there is no question to score")
    return Scores(
        exact=_mean_percent([exact for exact, _ in everything]),
        f1=_mean_percent([f1 for _, f1 in everything]),
        total=len(everything),
        missing=missing,
        has_ans_exact=_mean_percent([e for e, _ in answerable]) if answerable else None,
        has_ans_f1=_mean_percent([f for _, f in answerable]) if answerable else None,
        has_ans_total=len(answerable),
        no_ans_exact=(
            _mean_percent([e for e, _ in unanswerable]) if unanswerable else None
        ),
        no_ans_f1=_mean_percent([f for _, f in unanswerable]) if unanswerable else None,
        no_ans_total=len(unanswerable),
    )


def _mean_percent(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values)
