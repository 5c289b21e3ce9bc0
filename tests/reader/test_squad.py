from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from int8qa.errors import DataFileError
from int8qa.reader.squad import (
    SquadQuestion,
    exact_match,
    f1_score,
    load_questions,
    normalize_answer,
    score_predictions,
)
from tests.golden.pipeline_golden import DATA

WORDS = st.lists(
    st.sampled_from(["the", "a", "an", "Mill", "mill", "1788", "U.S.", "—", "!", "of"]),
    max_size=6,
).map(" ".join)

DOCUMENT: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Mill",
            "paragraphs": [
                {
                    "context": "Orla built the mill in 1788.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Who?",
                            "answers": [{"text": "Orla", "answer_start": 0}],
                            "is_impossible": False,
                        },
                        {
                            "id": "q2",
                            "question": "Why?",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


def write(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_questions_of_v2_are_read_in_order(tmp_path: Path) -> None:
    """Answers, their places and impossibility survive."""
    first, second = load_questions(write(tmp_path, DOCUMENT))
    assert first == SquadQuestion(
        id="q1",
        question="Who?",
        context="Orla built the mill in 1788.",
        answers=("Orla",),
        answer_starts=(0,),
    )
    assert second.is_impossible
    assert second.answers == ()


def test_questions_of_v1_need_no_is_impossible(tmp_path: Path) -> None:
    """v1.1 files have no such member: all questions are answerable."""
    document = copy.deepcopy(DOCUMENT)
    entries = document["data"][0]["paragraphs"][0]["qas"]
    del entries[1], entries[0]["is_impossible"]
    (question,) = load_questions(write(tmp_path, document))
    assert not question.is_impossible


@pytest.mark.parametrize("name", ["calibration.json", "evaluation.json"])
def test_shipped_question_files_are_readable(name: str) -> None:
    """The project's own files pass their own reader."""
    assert len(load_questions(DATA / "questions" / name)) >= 100


QA = ("data", 0, "paragraphs", 0, "qas", 0)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ((), [], r"\$ is list"),
        (("data",), {}, r"\$\.data is dict, expected list"),
        (("data",), [], r"\$\.data holds no question"),
        (("data", 0), 3, r"\$\.data\[0\] is int"),
        (("data", 0, "paragraphs", 0, "context"), None, r"paragraphs\[0\]\.context is"),
        ((*QA, "id"), 7, r"qas\[0\]\.id is int, expected str"),
        ((*QA, "id"), "q2", r"qas\[1\]\.id occurs twice"),
        ((*QA, "question"), ..., r"qas\[0\]\.question is missing"),
        ((*QA, "answers"), [], r"qas\[0\]\.answers is empty"),
        (
            (*QA, "answers", 0, "answer_start"),
            True,
            r"answers\[0\]\.answer_start is bool",
        ),
        ((*QA, "answers", 0, "answer_start"), 1, r"answer_start is 1, but the context"),
        ((*QA, "answers", 0, "answer_start"), -28, r"answer_start is -28, but"),
        ((*QA, "is_impossible"), True, r"answers holds 1 answers of an impossible"),
        ((*QA, "is_impossible"), "no", r"is_impossible is str, expected bool"),
    ],
)
def test_fault_is_named_by_its_json_path(
    tmp_path: Path, path: tuple[Any, ...], value: Any, fault: str
) -> None:
    """One broken member, one message that leads to it, without the texts."""
    document: Any = copy.deepcopy(DOCUMENT)
    if path:
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if value is ...:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
    else:
        document = value
    with pytest.raises(DataFileError, match=fault) as caught:
        load_questions(write(tmp_path, document))
    assert "squad.json" in str(caught.value)
    assert "Orla" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\xff\xfe{", "not UTF-8"),
        (b'{"data": [', "not JSON: .* line 1, column"),
        (b"[" * 200_000, "nested too deeply|not JSON"),
    ],
)
def test_unreadable_bytes_are_a_data_file_error(
    tmp_path: Path, data: bytes, fault: str
) -> None:
    """Encoding, syntax and depth all end in the same class."""
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=fault):
        load_questions(path)


def test_missing_file_is_a_data_file_error(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(DataFileError, match=r"absent\.json"):
        load_questions(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Mill!", "mill"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("“Olsa” — 1788", "“olsa” — 1788"),
        ("the", ""),
    ],
)
def test_normalisation_is_that_of_the_official_scripts(
    text: str, normalized: str
) -> None:
    """ASCII punctuation goes, whole-word articles go, other marks stay."""
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the mill", ["Mill."], 1.0, 1.0),
        ("old mill", ["mill"], 0.0, 2 / 3),
        ("mill mill", ["mill"], 0.0, 2 / 3),
        ("river", ["mill"], 0.0, 0.0),
        ("old mill", ["river", "the old mill"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("mill", [], 0.0, 0.0),
        ("", ["mill"], 0.0, 0.0),
        ("", ["the", "mill"], 0.0, 0.0),
        ("a", ["the"], 1.0, 1.0),
    ],
)
def test_scores_of_known_pairs(
    prediction: str, answers: list[str], exact: float, f1: float
) -> None:
    """Worked by hand after evaluate-v2.0."""
    assert exact_match(prediction, answers) == exact
    assert f1_score(prediction, answers) == pytest.approx(f1)


@given(WORDS)
def test_normalisation_twice_is_once(text: str) -> None:
    """A normalised answer stays as it is."""
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_f1_bounds_exact_match(prediction: str, answers: list[str]) -> None:
    """0 <= EM <= F1 <= 1: an exact match has full overlap."""
    assert 0 <= exact_match(prediction, answers) <= f1_score(prediction, answers) <= 1


@given(WORDS, WORDS)
def test_f1_is_symmetric(left: str, right: str) -> None:
    """Precision and recall change places, their harmonic mean does not."""
    assert f1_score(left, [right]) == pytest.approx(f1_score(right, [left]))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), WORDS)
def test_more_gold_answers_never_hurt(
    prediction: str, answers: list[str], extra: str
) -> None:
    """The best gold answer counts (once there is a real one among them)."""
    assume(any(normalize_answer(answer) for answer in answers))
    assert f1_score(prediction, [*answers, extra]) >= f1_score(prediction, answers)


def test_totals_and_split_of_v2(tmp_path: Path) -> None:
    """Means in percent, over all and over each kind of question."""
    questions = load_questions(write(tmp_path, DOCUMENT))
    scores = score_predictions(questions, {"q1": "Orla Finch", "q2": ""})
    assert (scores.total, scores.has_ans_total, scores.no_ans_total) == (2, 1, 1)
    assert scores.exact == 50.0
    assert scores.f1 == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert scores.has_ans_exact == 0.0
    assert scores.has_ans_f1 == pytest.approx(200 / 3)
    assert scores.no_ans_exact == scores.no_ans_f1 == 100.0


def test_missing_predictions_count_as_zero(tmp_path: Path) -> None:
    """Also for impossible questions: silence is not the answer "none"."""
    questions = load_questions(write(tmp_path, DOCUMENT))
    scores = score_predictions(questions, {"unknown": "x"})
    assert (scores.exact, scores.f1, scores.missing) == (0.0, 0.0, 2)


def test_split_without_questions_is_none() -> None:
    """A mean over nothing is None, not 0."""
    question = SquadQuestion("q", "Who?", "Orla", ("Orla",), (0,))
    scores = score_predictions([question], {"q": "Orla"})
    assert scores.no_ans_exact is None
    assert scores.no_ans_f1 is None
    with pytest.raises(ValueError, match="no question"):
        score_predictions([], {})
