"""The questions the golden file of the former pipeline asks.

In: the project's own question files. Out: cases (question, context, parameters) and
the compact form in which the golden file refers to them by question id. Imports
nothing but the standard library, so that both the pipeline's environment and the test
suite can read it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUESTION_FILES = ("calibration.json", "evaluation.json")

REFERENCE = "@"
"""A part that begins with this is a question id; anything else is literal text."""

TRANSFORMS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "crlf": lambda text: text.replace("\n", "\r\n").replace(". ", ".\r\n"),
    "nfd": lambda text: unicodedata.normalize("NFD", text),
    "tabs": lambda text: text.replace(" ", "\t \u00a0"),
    "emoji": lambda text: text.replace(". ", ". 👩‍🚀🇸🇪 "),
    "marks": lambda text: text.replace(" ", "\u200f \u200b").replace("e", "e\u0301"),
}


@dataclass(frozen=True)
class Case:
    """One call of the pipeline, its texts still by reference."""

    id: str
    question: str
    context: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    transform: str = "none"
    null_boost: float = 0.0
    """Added to the logits of token 0, start and end, in every second window: the
    checkpoint was never taught to say that there is no answer."""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "question": self.question,
            "context": list(self.context),
            "transform": self.transform,
            "null_boost": self.null_boost,
            "params": dict(self.params),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Case:
        return cls(
            id=entry["id"],
            question=entry["question"],
            context=tuple(entry["context"]),
            params=entry["params"],
            transform=entry["transform"],
            null_boost=entry["null_boost"],
        )


@dataclass(frozen=True)
class QuestionTexts:
    """Question and context of every known id, in file order."""

    questions: Mapping[str, str]
    contexts: Mapping[str, str]

    def resolve(self, case: Case) -> tuple[str, str]:
        """Question and context of a case, as texts."""
        question = case.question
        if question.startswith(REFERENCE):
            question = self.questions[question[1:]]
        context = "".join(
            self.contexts[part[1:]] if part.startswith(REFERENCE) else part
            for part in case.context
        )
        return question, TRANSFORMS[case.transform](context)


def load_texts(directory: Path) -> QuestionTexts:
    """Read the question files of ``directory``; absent ones are left out."""
    questions: dict[str, str] = {}
    contexts: dict[str, str] = {}
    for name in QUESTION_FILES:
        path = directory / name
        if not path.exists():
            continue
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    questions[entry["id"]] = entry["question"]
                    contexts[entry["id"]] = paragraph["context"]
    return QuestionTexts(questions, contexts)


# Cycled over the questions; their number is prime to that of the files' habits.
BASE_PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 5},
    {"top_k": 5, "align_to_words": False},
    {"handle_impossible_answer": True},
    {"top_k": 3, "handle_impossible_answer": True, "align_to_words": False},
    {"max_answer_len": 3},
    {"max_answer_len": 50, "top_k": 2},
    {"max_seq_len": 96, "doc_stride": 32},
    {"max_seq_len": 128, "doc_stride": 64, "top_k": 5},
    {"align_to_words": False},
    {"max_seq_len": 256, "doc_stride": 0, "handle_impossible_answer": True},
)
IMPOSSIBLE_PARAMS: tuple[dict[str, Any], ...] = (
    {"handle_impossible_answer": True},
    {"handle_impossible_answer": True, "top_k": 5},
    {"handle_impossible_answer": True, "max_seq_len": 96, "doc_stride": 16},
)
NULL_PARAMS: tuple[dict[str, Any], ...] = (
    {"handle_impossible_answer": True, "top_k": 2},
    {"handle_impossible_answer": True, "top_k": 5},
    {"handle_impossible_answer": True, "max_seq_len": 128, "doc_stride": 32},
    {"handle_impossible_answer": True, "align_to_words": False, "top_k": 3},
    {"top_k": 3},
)
# Small windows with little overlap cut many answers in two.
BORDER_PARAMS: tuple[dict[str, Any], ...] = (
    {"max_seq_len": 40, "doc_stride": 0, "top_k": 5},
    {"max_seq_len": 40, "doc_stride": 1},
    {"max_seq_len": 40, "doc_stride": 8, "top_k": 5, "align_to_words": False},
    {"max_seq_len": 48, "doc_stride": 16, "handle_impossible_answer": True},
)
LONG_PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 5},
    {"handle_impossible_answer": True, "top_k": 5},
    {"doc_stride": 32, "align_to_words": False},
    {"max_seq_len": 512, "doc_stride": 64, "top_k": 5},
)

LITERALS: tuple[tuple[str, str], ...] = (
    ("Who baked the bread?", "Mira."),
    ("When does the shop open?", "At 9."),
    ("What is it?", "😀"),
    ("What colour is the boat?", "The boat is 🟥 red 🟥 and the oars are yellow."),
    ("Who won?", "👩‍🚀 Ada beat 👨🏽‍🍳 Tomé by 3–1 in Zürich 🇨🇭."),
    (
        "Where is the café?",
        "The cafe\u0301 lies on the Rue de l’E\u0301glise, beside a well.",
    ),
    ("Who wrote the letter?", "המכתב נכתב על ידי Dana Levi בשנת 1987 בחיפה."),
    ("Where was the ship built?", "بُنيت السفينة في Port Helmand سنة 1902."),
    (
        "What did the engineer order?",
        "First line.\r\nThe engineer ordered\r\nsix brass valves\r\nand left.\r\n",
    ),
    ("What is the price?", "Price:\t€12.50\u00a0per kilo\u2009(incl. VAT)."),
    ("Who is the captain?", "Captain:\u0000 Ines\u0000 Valdra\u0007 sails at dawn."),
    (
        "Which token is hidden?",
        "The hidden token is [SEP] and the visible one is [CLS] today.",
    ),
    ("What is [MASK] of the river?", "The length of the river Olsa is 214 kilometres."),
    ("Where do they meet?", "They meet at 東京駅 (Tokyo Station) near the north exit."),
    (
        "How tall is the tower?",
        "ＴＨＥ ＴＯＷＥＲ is ９７ metres tall; the chimney is 40.",
    ),
    ("Who founded the mill?", "\ufeffThe mill was founded by Orla Finch in 1788."),
    ("What is the code?", "Code: " + "x" * 120 + " is wrong; the right code is 4711."),
    ("Who paints?", "paints " * 60 + "Ravel paints the door."),
    ("Who sings?", "Alto sings. alto sings. ALTO sings. Bruno listens."),
    (
        "What does the sign say?",
        "The sign says “Ne pas toucher” — in French, i.e. “do not touch”.",
    ),
    ("Who owns the dog?", "The dog's owner is Mr. O'Neill-Đặng; the cat's is Ms. Łoś."),
    ("Which village has the bell?", "\n\n\n   The bell hangs in Unterkirnach   \n\n"),
    ("What costs 5?", "a-b_c/d\\e|f;g:h,i.j!k?l 5 = soup & bread @ noon #1 ~ 100%"),
    ("Who came second?", "1. Kei\n2. Noor\n3. Pál\n4. 李娜\n5. Æsa"),
)

LONG_QUESTION_WORDS = "please tell me in all the detail that you can find "


def make_cases(texts: QuestionTexts) -> Iterator[Case]:
    """Every case, in a fixed order, from the question files as they stand."""
    ids = list(texts.questions)
    for index, question_id in enumerate(ids):
        reference = REFERENCE + question_id
        params = BASE_PARAMS[index % len(BASE_PARAMS)]
        yield Case(f"base-{question_id}", reference, (reference,), params)
    yield from _foreign_cases(ids)
    yield from _null_cases(ids)
    yield from _border_cases(ids)
    yield from _transformed_cases(ids)
    yield from _literal_cases()
    yield from _long_cases(texts)


def _foreign_cases(ids: list[str]) -> Iterator[Case]:
    """Questions asked of a context that does not answer them."""
    for number, index in enumerate(range(0, len(ids), 12)):
        other = ids[(index + len(ids) // 2) % len(ids)]
        yield Case(
            f"foreign-{number}",
            REFERENCE + ids[index],
            (REFERENCE + other,),
            IMPOSSIBLE_PARAMS[number % len(IMPOSSIBLE_PARAMS)],
        )


def _null_cases(ids: list[str]) -> Iterator[Case]:
    """Questions that a model taught so might call impossible, in some windows."""
    # Below 7 the null answer hardly ever shows, above 11 it always wins.
    boosts = (7.0, 8.0, 9.0, 10.0)
    for number, index in enumerate(range(1, len(ids), 9)):
        reference = REFERENCE + ids[index]
        yield Case(
            f"null-{number}",
            reference,
            (reference,),
            NULL_PARAMS[number % len(NULL_PARAMS)],
            null_boost=boosts[number % len(boosts)],
        )


def _border_cases(ids: list[str]) -> Iterator[Case]:
    for number, index in enumerate(range(3, len(ids), 11)):
        reference = REFERENCE + ids[index]
        params = BORDER_PARAMS[number % len(BORDER_PARAMS)]
        yield Case(f"border-{number}", reference, (reference,), params)


def _transformed_cases(ids: list[str]) -> Iterator[Case]:
    names = [name for name in TRANSFORMS if name != "none"]
    for number, index in enumerate(range(5, len(ids), 8)):
        reference = REFERENCE + ids[index]
        yield Case(
            f"{names[number % len(names)]}-{number}",
            reference,
            ("🎈 ", reference, " שלום\r\n"),
            BASE_PARAMS[number % len(BASE_PARAMS)],
            names[number % len(names)],
        )


def _literal_cases() -> Iterator[Case]:
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"top_k": 5, "align_to_words": False, "handle_impossible_answer": True},
        {"max_seq_len": 24, "doc_stride": 4, "top_k": 3},
    )
    for number, (question, context) in enumerate(LITERALS):
        for variant, params in enumerate(variants):
            yield Case(f"literal-{number}-{variant}", question, (context,), params)
    # Beyond max_question_len (64): the pipeline does not cut it.
    yield Case(
        "literal-long-question",
        LONG_QUESTION_WORDS * 8 + "who wrote the diary?",
        ("The diary was written by Sunniva Brae in 1911.",),
    )


def _long_cases(texts: QuestionTexts) -> Iterator[Case]:
    """Documents of all paragraphs, rotated, of 3000 words and more."""
    paragraphs: dict[str, str] = {}
    for question_id, context in texts.contexts.items():
        paragraphs.setdefault(context, question_id)
    firsts = list(paragraphs.values())
    for number in range(10):
        turn = number * len(firsts) // 10
        order = firsts[turn:] + firsts[:turn]
        parts: list[str] = []
        words = 0
        chosen: list[str] = []
        for question_id in order:
            parts += [REFERENCE + question_id, "\n\n"]
            chosen.append(question_id)
            words += len(texts.contexts[question_id].split())
            if words >= 3000 + 100 * number:
                break
        asked = chosen[(7 * number + 3) % len(chosen)]
        yield Case(
            f"long-{number}",
            REFERENCE + asked,
            tuple(parts),
            LONG_PARAMS[number % len(LONG_PARAMS)],
            "crlf" if number % 4 == 3 else "none",
        )
