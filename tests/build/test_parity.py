"""Conversions held to one another."""

from __future__ import annotations

import numpy as np
import pytest

from int8qa.build.accuracy import Answers
from int8qa.build.parity import ParityRule, check_halved, check_parity
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


def _logits(*rows: list[float]) -> Answers:
    found = [np.array(row, np.float32) for row in rows]
    return Answers({}, [(row, row) for row in found])


def test_halved_logits() -> None:
    """What float16 moves counts by the spread of the logits, over all windows."""
    expected = _logits([0.0, 8.0], [0.0, 8.0])
    assert check_halved(expected, _logits([0.0, 8.0], [0.0, 8.0])) == 0.0
    # The spread is 4; half of the values are off by 1.
    found = _logits([1.0, 8.0], [1.0, 8.0])
    assert check_halved(expected, found) == pytest.approx(0.5**0.5 / 4)


@pytest.mark.parametrize("off", [2.0, float("nan"), float("inf")])
def test_halved_logits_that_are_others(off: float) -> None:
    """A graph that overflows, or is another one, is refused with both figures."""
    with pytest.raises(ParityError, match=r"float16 graph .* \(allowed 0.25\)"):
        check_halved(_logits([0.0, 8.0]), _logits([off, 8.0]))
