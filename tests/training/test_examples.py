"""Questions as windows: where the answer is, and questions that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from int8qa.errors import DataFileError
from int8qa.reader.squad import SquadQuestion, load_questions, normalize_answer
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import split_windows
from int8qa.training.examples import (
    NULL,
    TrainingSet,
    holds_answer,
    load_training_set,
    locate_answers,
    pair_negatives,
    read_articles,
)
from tests.training.runs import ARTICLES, write_articles

WORDS = (
    "oil",
    "Torvik",
    "1902",
    "naïve",
    "café",
    "don't",
    "😀",
    "Zürich-Nord",
    "a.b",
    "x",
)


def load(
    paths: list[Path],
    tokenizer: ReaderTokenizer,
    *,
    longest: int = 384,
    stride: int = 16,
    negatives: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
) -> TrainingSet:
    return load_training_set(
        paths,
        tokenizer,
        max_window_tokens=longest,
        doc_stride=stride,
        negatives=negatives,
        limit=limit,
        seed=seed,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(WORDS), min_size=2, max_size=60),
    st.data(),
    st.integers(16, 48),
)
def test_labels(
    tokenizer: ReaderTokenizer, words: list[str], data: st.DataObject, longest: int
) -> None:
    """A label is all of the answer and no more; one shorter than the overlap has one."""
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 2, len(words) - 1)))
    context = " ".join(words)
    begin = len(" ".join(words[:first])) + (first > 0)
    answer = " ".join(words[first : last + 1])
    stop = begin + len(answer)
    question = SquadQuestion("q", "Where?", context, (answer,), (begin,))
    stride = min(12, longest // 2 - 3)
    windows = split_windows(
        tokenizer, "Where?", context, max_window_tokens=longest, doc_stride=stride
    )
    whole = split_windows(tokenizer, "Where?", context, max_window_tokens=4096)[0]
    touching = sum(
        end > begin and start < stop and end > start for start, end in whole.offsets
    )
    labelled = 0
    for window in windows:
        ((start, end),) = locate_answers(question, window)
        offsets = window.offsets
        if start == NULL:
            assert end == NULL
            inside = [a for a, b in offsets if a < stop and b > begin and b > a]
            assert len(inside) < touching
            continue
        labelled += 1
        assert window.context_start <= start <= end < window.context_end
        chosen = offsets[start - window.context_start : end - window.context_start + 1]
        assert chosen[0][0] <= begin < chosen[0][1]
        assert chosen[-1][0] < stop <= chosen[-1][1]
    if touching <= stride:
        assert labelled >= 1


def test_questions_without_an_answer(tokenizer: ReaderTokenizer) -> None:
    """All their windows point at the null position."""
    window = split_windows(tokenizer, "Where?", "The key hangs behind the bar.")[0]
    question = SquadQuestion(
        "q", "Where?", "The key hangs behind the bar.", (), (), True
    )
    assert locate_answers(question, window) == ((NULL, NULL),)


def test_annotators_who_disagree(tokenizer: ReaderTokenizer) -> None:
    """Each has a vote, equal ones too; who is cut off votes for "not here"."""
    context = "The old mill burned in May 1931 and again in 1950."
    answers = ("May 1931", "1931", "May 1931", "1950")
    begins = tuple(context.index(answer) for answer in answers)
    question = SquadQuestion("q", "When?", context, answers, begins)
    (whole,) = split_windows(tokenizer, "When?", context)
    first, second, third, fourth = locate_answers(question, whole)
    assert first == third
    assert first[1] == second[1] > second[0] - 1 >= first[0]
    assert fourth[0] > first[1]
    windows = split_windows(
        tokenizer, "When?", context, max_window_tokens=16, doc_stride=2
    )
    found = [locate_answers(question, window) for window in windows]
    assert any(
        places[0] == (NULL, NULL) and places[3] != (NULL, NULL) for places in found
    )
    assert all(len(places) == 4 for places in found)


def test_counts(tokenizer: ReaderTokenizer, tmp_path: Path) -> None:
    """By file: with answer, without, made, windows; groups are the files' numbers."""
    one = write_articles(tmp_path / "one.json")
    context = ARTICLES[0][0][0]
    two = write_articles(
        tmp_path / "two.json", [[(context, (("Who?", ""), ("What?", "mill")))]]
    )
    found = load([one, two], tokenizer, negatives=0.5)
    counts = [
        (c.name, c.questions, c.unanswerable, c.negatives, c.windows, c.skipped)
        for c in found.counts
    ]
    assert counts == [("one.json", 8, 0, 4, 12, 0), ("two.json", 1, 1, 0, 2, 0)]
    assert [window.group for window in found.windows] == [0] * 12 + [1] * 2
    nulls = [not holds_answer(item.places) for item in found.windows]
    assert nulls == [False] * 8 + [True] * 4 + [True, False]
    assert ("What?", context) in found.keys
    assert len(found.keys) == 10


def test_long_contexts(tokenizer: ReaderTokenizer, tmp_path: Path) -> None:
    """Every window of a question is used; one without the answer says so."""
    context = "filler text here. " * 40 + "The mill burned in 1931."
    path = write_articles(tmp_path / "long.json", [[(context, (("When?", "1931"),))]])
    found = load([path], tokenizer, longest=64)
    assert len(found.windows) > 3
    assert [holds_answer(item.places) for item in found.windows] == [
        *[False] * (len(found.windows) - 1),
        True,
    ]
    ids = found.windows[-1].window.input_ids
    ((first, last),) = found.windows[-1].places
    place = slice(first, last + 1)
    assert tokenizer.encode("1931", field="context").ids.tolist() == ids[place].tolist()


def test_what_cannot_be_learned_is_left_out(
    tokenizer: ReaderTokenizer, tmp_path: Path
) -> None:
    """A question that fills a window; counted, and refused if it is all there is."""
    long = "why " * 80 + "?"
    path = write_articles(
        tmp_path / "long.json",
        [[("The key hangs here.", ((long, "here"), ("Where?", "here")))]],
    )
    found = load([path], tokenizer, longest=64)
    assert (found.counts[0].questions, found.counts[0].skipped) == (2, 1)
    assert len(found.windows) == 1
    alone = write_articles(
        tmp_path / "alone.json", [[("The key hangs here.", ((long, "here"),))]]
    )
    with pytest.raises(DataFileError, match="nothing to train on: all 1 questions"):
        load([alone], tokenizer, longest=64)


@given(st.floats(0, 1), st.integers(0, 99))
def test_negatives(fraction: float, seed: int) -> None:
    """Each has another paragraph of the same article, without the answer."""
    articles = [[context for context, _ in article] for article in ARTICLES]
    questions = [
        SquadQuestion(
            f"{question}-{context}",
            question,
            context,
            (answer,),
            (context.index(answer),),
        )
        for article in ARTICLES
        for context, pairs in article
        for question, answer in pairs
    ]
    made = pair_negatives(questions, articles, fraction, seed=str(seed))
    assert made == pair_negatives(questions, articles, fraction, seed=str(seed))
    assert len(made) == round(fraction * len(questions))
    originals = {f"{question.id}-elsewhere": question for question in questions}
    assert len({negative.id for negative in made}) == len(made)
    for negative in made:
        original = originals[negative.id]
        assert negative.is_impossible
        assert not negative.answers
        assert negative.question == original.question
        assert negative.context != original.context
        (home,) = (article for article in articles if original.context in article)
        assert negative.context in home
        answer = normalize_answer(original.answers[0])
        assert answer not in normalize_answer(negative.context)


def test_negatives_that_cannot_be_made(
    tokenizer: ReaderTokenizer, tmp_path: Path
) -> None:
    """None where the answer stands in the other paragraph, or there is no other."""
    contexts = ["The oil is red.", "Red oil, again."]
    question = SquadQuestion("q", "Which?", contexts[0], ("oil",), (4,))
    assert pair_negatives([question], [contexts], 1.0, seed="0") == []
    words = SquadQuestion("q", "Which?", contexts[0], ("The oil is",), (0,))
    assert len(pair_negatives([words], [contexts], 1.0, seed="0")) == 1
    path = write_articles(
        tmp_path / "one.json", [[(contexts[0], (("Which?", "oil"),))]]
    )
    with pytest.raises(DataFileError, match="--negatives pairs questions"):
        load([path], tokenizer, negatives=0.5)


def test_limit_spreads(tokenizer: ReaderTokenizer, questions: Path) -> None:
    """Of each file, evenly; pairs may still take any paragraph."""
    found = load([questions], tokenizer, limit=4, negatives=1.0)
    count = found.counts[0]
    assert (count.questions, count.negatives) == (4, 4)
    asked = [q.question for q in load_questions(questions)]
    assert {question for question, _ in found.keys} == set(asked[::2])


def test_articles(questions: Path) -> None:
    """Contexts by article, as the file has them."""
    assert read_articles(questions) == [
        [context for context, _ in article] for article in ARTICLES
    ]


def test_faulty_file(tokenizer: ReaderTokenizer, tmp_path: Path) -> None:
    """The reader of SQuAD files names the fault."""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"data": [{}]}))
    with pytest.raises(DataFileError, match=r"\$\.data\[0\]\.paragraphs is missing"):
        load([path], tokenizer)
