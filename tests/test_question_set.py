"""Structure of the question set shipped with the package.

In: the two SQuAD-format files and their README. Knows nothing of any model.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = (
    Path(__file__).resolve().parents[1] / "service" / "int8qa" / "data" / "questions"
)
NAMES = ("calibration", "evaluation")
PREFIXES = {"calibration": "cal", "evaluation": "eval"}
MIN_PARAGRAPHS = 26
MIN_ANSWERABLE = 130
MIN_IMPOSSIBLE = 18
LONG_WORDS = range(700, 1201)


def load_paragraphs(name: str) -> list[dict[str, Any]]:
    document = json.loads((FOLDER / f"{name}.json").read_bytes())
    return [p for article in document["data"] for p in article["paragraphs"]]


def iterate_questions(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for paragraph in load_paragraphs(name):
        for question in paragraph["qas"]:
            yield paragraph["context"], question


def fold_text(text: str) -> str:
    """Compare texts without regard to case, spacing, punctuation or composition."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def count_questions(name: str) -> tuple[int, int, int]:
    paragraphs = load_paragraphs(name)
    flags = [q["is_impossible"] for p in paragraphs for q in p["qas"]]
    return len(paragraphs), flags.count(False), flags.count(True)


@pytest.mark.parametrize("name", NAMES)
def test_schema_holds_exactly_the_squad_fields(name: str) -> None:
    """Every level has the SQuAD v2 keys, and no others, with the right types."""
    document = json.loads((FOLDER / f"{name}.json").read_bytes())
    assert document.keys() == {"version", "data"}
    assert document["version"] == "int8qa-1"
    for article in document["data"]:
        assert article.keys() == {"title", "paragraphs"}
        assert article["title"].strip()
        for paragraph in article["paragraphs"]:
            assert paragraph.keys() == {"context", "qas"}
            for question in paragraph["qas"]:
                assert question.keys() == {"id", "question", "answers", "is_impossible"}
                assert type(question["is_impossible"]) is bool
                for answer in question["answers"]:
                    assert answer.keys() == {"text", "answer_start"}
                    assert type(answer["answer_start"]) is int


@pytest.mark.parametrize("name", NAMES)
def test_counts_reach_the_minimum(name: str) -> None:
    """Each file has enough paragraphs and questions of both kinds."""
    paragraphs, answerable, impossible = count_questions(name)
    assert paragraphs >= MIN_PARAGRAPHS
    assert answerable >= MIN_ANSWERABLE
    assert impossible >= MIN_IMPOSSIBLE


@pytest.mark.parametrize("name", NAMES)
def test_readme_states_the_true_counts(name: str) -> None:
    """The table in the README repeats the counts of the file."""
    paragraphs, answerable, impossible = count_questions(name)
    words = [len(p["context"].split()) for p in load_paragraphs(name)]
    row = (
        f"| `{name}.json` | {paragraphs} | {answerable} | {impossible} "
        f"| {sum(words) / len(words):.0f} |"
    )
    assert row in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_an_exact_span(name: str) -> None:
    """Cutting the context at answer_start gives the answer text, code point by one."""
    for context, question in iterate_questions(name):
        for answer in question["answers"]:
            start = answer["answer_start"]
            assert start >= 0, question["id"]
            end = start + len(answer["text"])
            assert context[start:end] == answer["text"], question["id"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_short_and_cut_at_word_edges(name: str) -> None:
    """No answer is blank, padded, overlong, listed twice or cut inside a word."""
    for context, question in iterate_questions(name):
        spans = [(a["answer_start"], a["text"]) for a in question["answers"]]
        assert len(set(spans)) == len(spans), question["id"]
        for start, text in spans:
            assert text, question["id"]
            assert text == text.strip(), question["id"]
            assert len(text.split()) <= 20, question["id"]
            around = f" {context} "[start : start + len(text) + 2]
            assert not re.match(r"\w\w", around[:2]), question["id"]
            assert not re.match(r"\w\w", around[-2:]), question["id"]


@pytest.mark.parametrize("name", NAMES)
def test_most_questions_have_a_short_answer(name: str) -> None:
    """Nine answerable questions in ten have an acceptable answer of 1-8 words."""
    shortest = [
        min(len(a["text"].split()) for a in question["answers"])
        for _, question in iterate_questions(name)
        if question["answers"]
    ]
    assert sum(words <= 8 for words in shortest) >= 0.9 * len(shortest)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_present_unless_impossible(name: str) -> None:
    """A question has answers exactly when it is not marked impossible."""
    for _, question in iterate_questions(name):
        assert bool(question["answers"]) is not question["is_impossible"], question[
            "id"
        ]


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_single_lines_that_ask(name: str) -> None:
    """Every question is one trimmed line that ends in a question mark."""
    for _, question in iterate_questions(name):
        text = question["question"]
        assert text == text.strip(), question["id"]
        assert text.endswith("?"), question["id"]
        assert not re.search(r"[\r\n~]", text), question["id"]


def test_ids_are_unique_and_name_their_place() -> None:
    """Ids say file, paragraph and question, and never repeat across the files."""
    seen: set[str] = set()
    for name in NAMES:
        for number, paragraph in enumerate(load_paragraphs(name), start=1):
            for place, question in enumerate(paragraph["qas"], start=1):
                assert question["id"] == f"{PREFIXES[name]}-{number:03d}-{place}"
                assert question["id"] not in seen
                seen.add(question["id"])


def test_files_share_no_context_and_no_question() -> None:
    """Calibration and evaluation have no title, context or question in common."""
    texts: list[set[str]] = []
    for name in NAMES:
        articles = json.loads((FOLDER / f"{name}.json").read_bytes())["data"]
        texts.append(
            {fold_text(article["title"]) for article in articles}
            | {fold_text(p["context"]) for p in load_paragraphs(name)}
            | {fold_text(q["question"]) for _, q in iterate_questions(name)}
        )
    assert not texts[0] & texts[1]


def test_files_share_no_sentence() -> None:
    """No run of eight words occurs in both files."""

    def list_runs(name: str) -> set[tuple[str, ...]]:
        runs: set[tuple[str, ...]] = set()
        for paragraph in load_paragraphs(name):
            words = fold_text(paragraph["context"]).split()
            runs.update(tuple(words[i : i + 8]) for i in range(len(words) - 7))
        return runs

    assert not list_runs(NAMES[0]) & list_runs(NAMES[1])


@pytest.mark.parametrize("name", NAMES)
def test_no_context_or_question_is_repeated_within_a_file(name: str) -> None:
    """Within a file contexts differ, and so do the questions on one context."""
    contexts = [fold_text(p["context"]) for p in load_paragraphs(name)]
    assert len(set(contexts)) == len(contexts)
    for paragraph in load_paragraphs(name):
        questions = [fold_text(q["question"]) for q in paragraph["qas"]]
        assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", NAMES)
def test_long_documents_are_asked_about_everywhere(name: str) -> None:
    """Three documents need several windows; answers lie in each third of them."""
    lengths = [len(p["context"].split()) for p in load_paragraphs(name)]
    assert max(lengths) in LONG_WORDS
    long_paragraphs = [
        paragraph
        for paragraph, words in zip(load_paragraphs(name), lengths, strict=True)
        if words in LONG_WORDS
    ]
    assert len(long_paragraphs) == 3
    for paragraph in long_paragraphs:
        thirds = {
            3 * question["answers"][0]["answer_start"] // len(paragraph["context"])
            for question in paragraph["qas"]
            if question["answers"]
        }
        assert thirds == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("feature", "pattern"),
    [
        ("CRLF line break", r"\r\n"),
        ("no-break space", "\u00a0"),
        ("combining mark", "[\u0300-\u036f]"),
        ("character outside the BMP", "[\U00010000-\U0010ffff]"),
        ("emoji joined by ZWJ or variation selector", "[\u200d\ufe0f]"),
        ("Greek", "[\u0370-\u03ff]{3}"),
        ("Cyrillic", "[\u0400-\u04ff]{3}"),
        ("Japanese", "[\u3040-\u30ff\u4e00-\u9fff]{3}"),
        ("price", r"€\s?\d|\d\s?€"),
        ("numbered clause", r"(?m)\b\d\.\d [A-Z]|\(\d\) [A-Z]"),
    ],
)
def test_contexts_hold_hard_text(name: str, feature: str, pattern: str) -> None:
    """Each kind of text that breaks offset arithmetic occurs in both files."""
    contexts = [p["context"] for p in load_paragraphs(name)]
    assert any(re.search(pattern, context) for context in contexts), feature


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("feature", "pattern"),
    [
        ("digit", r"\d"),
        ("precomposed diacritic", "[\u00c0-\u017f]"),
        ("combining mark", "[\u0300-\u036f]"),
        ("no-break space", "\u00a0"),
        ("non-Latin script", "[\u0370-\u04ff\u3040-\u30ff\u4e00-\u9fff]"),
        ("unit or currency sign", "[€£°%]"),
    ],
)
def test_answers_hold_hard_text(name: str, feature: str, pattern: str) -> None:
    """At least one answer in each file contains each kind of character."""
    texts = [a["text"] for _, q in iterate_questions(name) for a in q["answers"]]
    assert any(re.search(pattern, text) for text in texts), feature


@pytest.mark.parametrize("name", NAMES)
def test_some_answer_follows_an_emoji(name: str) -> None:
    """An answer starts after astral characters, where UTF-16 counting would shift."""
    assert any(
        re.search("[\U00010000-\U0010ffff]", context[: a["answer_start"]])
        for context, question in iterate_questions(name)
        for a in question["answers"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_file_is_written_in_the_stated_form(name: str) -> None:
    """UTF-8 without escapes, indent of one, LF line ends, newline at the end."""
    raw = (FOLDER / f"{name}.json").read_bytes()
    form = json.dumps(json.loads(raw), ensure_ascii=False, indent=1) + "\n"
    assert raw == form.encode("utf-8")
