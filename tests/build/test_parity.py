"""Conversions held to one another."""

from __future__ import annotations

import numpy as np
import pytest

from int8qa.build.accuracy import Answers
from int8qa.build.parity import ParityRule, check_parity
from int8qa.errors import ParityError
from int8qa.reader.squad import SquadQuestion

QUESTIONS = [
    SquadQuestion(f"q{i}", "Where?", "The ferry goes to Vik.", ("Vik",), (18,))
    for i in range(4)
]


def _answers(*texts: str, logit: float = 1.0) -> Answers:
    row = np.array([logit], np.float32)
    return Answers(
        {q.id: text for q, text in zip(QUESTIONS, texts, strict=True)}, [(row, row)]
    )


EXPECTED = _answers("Vik", "Vik", "Vik", "Vik")
RULE = ParityRule("ONNX from torch", tolerance=0.1, agreement=0.75)


def test_within_the_rule_the_deviation_is_told() -> None:
    """A quarter of other answers and a small deviation are let through."""
    found = _answers("Vik", "Vik", "Vik", "ferry", logit=1.0625)
    assert check_parity(RULE, EXPECTED, found, QUESTIONS) == 0.0625


@pytest.mark.parametrize(
    "found",
    [
        _answers("Vik", "Vik", "ferry", "ferry"),
        _answers("Vik", "Vik", "Vik", "Vik", logit=1.5),
        _answers("Vik", "Vik", "Vik", "Vik", logit=float("nan")),
    ],
)
def test_beyond_the_rule_is_an_error_that_names_the_conversion(found: Answers) -> None:
    """Too many other answers, too large a deviation, or no numbers at all."""
    with pytest.raises(ParityError, match="ONNX from torch"):
        check_parity(RULE, EXPECTED, found, QUESTIONS)
