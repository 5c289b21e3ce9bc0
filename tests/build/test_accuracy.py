"""The gate's ruling, paired comparison, and logits that are no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from int8qa.build.accuracy import (
    Accuracy,
    Answers,
    answer_questions,
    check_gate,
    compare_answers,
    encode_questions,
    max_deviation,
    passes_gate,
    rms_error,
    share_equal,
)
from int8qa.build.feed import window_feed
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.errors import AccuracyGateError
from int8qa.reader.squad import SquadQuestion, f1_score
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window

ALL_INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)


def make_question(name: str, answer: str) -> SquadQuestion:
    context = f"The ferry to {answer} leaves at seven from the old pier."
    return SquadQuestion(name, "Where does it go?", context, (answer,), (13,))


QUESTIONS = [make_question(f"q{i}", f"Vik{i}") for i in range(4)]
PERFECT = {q.id: q.answers[0] for q in QUESTIONS}


def logits(*values: float) -> Any:
    row = np.array(values, np.float32)
    return row, row


def make_accuracy(ratio: float, margin: float = 0.0) -> Accuracy:
    return Accuracy(
        f1=80.0 * ratio,
        exact_match=70.0,
        questions=200,
        f1_ratio=ratio,
        f1_ratio_margin=margin,
        agreement=0.9,
        max_logit_deviation=0.5,
        rms_logit_error=0.1,
    )


@pytest.mark.parametrize(
    ("ratio", "gate"), [(0.99, 0.99), (1.02, 0.99), (1.0, 1.0), (0.0, 0.0)]
)
def test_gate_lets_pass(ratio: float, gate: float) -> None:
    """At the gate is through it, and a gate of 0 is none."""
    assert check_gate(make_accuracy(ratio), gate=gate) == []


@pytest.mark.parametrize(("margin", "passes"), [(0.004, False), (0.012, True)])
def test_gate_refuses_only_what_chance_does_not_explain(
    margin: float, passes: bool
) -> None:
    """A share below the gate fails unless the gate lies within its margin."""
    found = make_accuracy(0.98, margin)
    if passes:
        (remark,) = check_gate(found, gate=0.99)
        assert "under the gate of 99 %" in remark
    else:
        with pytest.raises(AccuracyGateError, match=r"98.00 ± 0.40 %"):
            check_gate(found, gate=0.99)


def test_margin_is_the_bootstraps(windows: list[Window]) -> None:
    """The closed form agrees with resampling the questions, and shrinks with them."""
    rng = np.random.default_rng(3)
    half = {}
    for count in (200, 800):
        questions = [make_question(f"q{i}", f"Vik{i} Fjord") for i in range(count)]
        draw = rng.random((count, 2))
        texts = [
            {
                q.id: "pier" if draw[i, 0] < 0.3 else q.answers[0]
                for i, q in enumerate(questions)
            }
        ]
        texts.append(
            {
                q.id: f"Vik{i}" if draw[i, 1] < 0.1 else texts[0][q.id]
                for i, q in enumerate(questions)
            }
        )
        found = compare_answers(Answers(texts[0], []), Answers(texts[1], []), questions)
        x, y = (
            np.array([f1_score(t[q.id], q.answers) for q in questions]) for t in texts
        )
        picks = rng.integers(0, count, (4000, count))
        ratios = y[picks].mean(1) / x[picks].mean(1)
        half[count] = found.f1_ratio_margin
        assert half[count] == pytest.approx(1.645 * ratios.std(), rel=0.08)
    assert half[800] < half[200]


def test_gate_refuses() -> None:
    """Measured, allowed, and what to try: three things at most, then the gate."""
    advice = ("try a", "try b", "try c", "try d")
    with pytest.raises(AccuracyGateError) as caught:
        check_gate(make_accuracy(0.9512), gate=0.99, advice=advice)
    assert str(caught.value) == (
        "INT8 keeps 95.12 ± 0.00 % of FP32's F1 (76.10 over 200 questions); the gate "
        "asks for 99 %. Next: try a; try b; try c; --gate 0.950 if this loss is "
        "acceptable"
    )
    with pytest.raises(AccuracyGateError, match=r"Next: --gate 0\.950 if this loss"):
        check_gate(make_accuracy(0.9512), gate=0.99)


@pytest.mark.parametrize(
    ("ratio", "margin", "passes"),
    [
        (0.99, 0.0, True),
        (0.989, 0.0, False),
        (0.989, 0.0005, False),
        (0.9375, 0.0625, True),
        (0.5, 0.6, True),
    ],
)
def test_passing_is_what_the_gate_lets_pass(
    ratio: float, margin: float, passes: bool
) -> None:
    """One rule for a build's ruling and for a comparison's column."""
    found = make_accuracy(ratio, margin)
    assert passes_gate(found, 0.99) is passes
    assert passes_gate(found, 0.0)
    if passes:
        assert len(check_gate(found, gate=0.99)) == (ratio < 0.99)
    else:
        with pytest.raises(AccuracyGateError):
            check_gate(found, gate=0.99)


def test_gate_needs_something_to_lose() -> None:
    """Where FP32 answers nothing right, nothing is measured; 0 builds all the same."""
    nothing = Accuracy(0.0, 0.0, 5, 1.0, 0.0, 1.0, 0.0, 0.0)
    with pytest.raises(AccuracyGateError, match="none of the 5"):
        check_gate(nothing, gate=0.99)
    assert check_gate(nothing, gate=0.0) == []


@pytest.mark.parametrize("ratio", [0.98765, 0.5, 0.0004, 0.0])
def test_suggested_gate_would_pass(ratio: float) -> None:
    """Who takes the message at its word gets through, and asks for no gate below 0."""
    found = make_accuracy(ratio)
    with pytest.raises(AccuracyGateError) as caught:
        check_gate(found, gate=0.99)
    suggested = float(str(caught.value).split("--gate ")[1].split()[0])
    assert 0.0 <= suggested <= ratio
    check_gate(found, gate=suggested)


def test_comparison_with_itself() -> None:
    """The reference keeps all of itself."""
    reference = Answers(PERFECT, [logits(1.0, 2.0)])
    found = compare_answers(reference, reference, QUESTIONS)
    assert found == Accuracy(100.0, 100.0, 4, 1.0, 0.0, 1.0, 0.0, 0.0)


def test_comparison_is_paired() -> None:
    """Agreement counts equal texts, right or wrong; F1 is held to the reference's."""
    reference = Answers({**PERFECT, "q0": "seven"}, [logits(1.0, 2.0)])
    other = Answers({**PERFECT, "q0": "seven", "q1": "pier"}, [logits(1.0, 1.5)])
    found = compare_answers(reference, other, QUESTIONS)
    assert found.agreement == 0.75
    assert found.exact_match == 50.0
    assert found.f1_ratio == pytest.approx(50.0 / 75.0)
    assert found.max_logit_deviation == 0.5
    # One of two values, in start and end alike.
    assert found.rms_logit_error == pytest.approx(np.sqrt(0.5**2 / 2))


def test_reference_without_a_right_answer() -> None:
    """With nothing to lose, nothing is lost; no division by zero."""
    wrong = Answers({q.id: "pier" for q in QUESTIONS}, [logits(0.0)])
    assert compare_answers(wrong, wrong, QUESTIONS).f1_ratio == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers(bad: float) -> None:
    """NaN compares as smaller than nothing; here it is the worst deviation there is."""
    pair = [logits(1.0, 2.0), logits(0.0)], [logits(1.0, bad), logits(0.0)]
    assert max_deviation(*pair) == float("inf")
    assert rms_error(*pair) == float("inf")


def test_largest_deviation() -> None:
    """The largest absolute difference, over all windows, start and end."""
    zero = np.zeros(2, np.float32)
    left = [(zero, zero), (zero, zero)]
    right = [(zero, np.float32([0, -3])), (np.float32([2, 0]), zero)]
    assert max_deviation(left, right) == 3.0
    with pytest.raises(ValueError, match="zip"):
        max_deviation(left, right[:1])


def test_root_mean_square() -> None:
    """Over all tokens of all windows, start and end; longer windows count for more."""
    zeros = [(np.zeros(n, np.float32),) * 2 for n in (2, 6)]
    found = [
        (np.float32([3, 0]), np.zeros(2, np.float32)),
        (np.float32([0, 0, 0, 0, 0, 4]), np.float32([1, 1, 1, 1, 1, 1])),
    ]
    assert rms_error(zeros, found) == pytest.approx(np.sqrt((9 + 16 + 6) / 16))
    assert rms_error(found, found) == 0.0
    assert rms_error([], []) == 0.0
    # Float32 would lose the small among the large.
    large = np.full(2**16, 1e4, np.float32)
    assert rms_error([(large, large)], [(-large, -large)]) == pytest.approx(2e4)
    with pytest.raises(ValueError, match="zip"):
        rms_error(zeros, found[:1])


def test_share_of_equal_answers() -> None:
    """By question, not by place; right or wrong does not matter."""
    one = Answers({"a": "x", "b": "y", "c": "", "d": "z"}, [])
    other = Answers({"d": "z", "c": "", "b": "x", "a": "y"}, [])
    assert share_equal(one, other) == 0.5
    assert share_equal(one, one) == 1.0


def test_padding(windows: list[Window]) -> None:
    """Padding holds the padding id, mask 0 and type 0, as the gateway pads."""
    window = windows[0]
    feed = window_feed(window, ALL_INPUTS, length=64, pad_token_id=9)
    size = len(window)
    assert {value.shape for value in feed.values()} == {(1, 64)}
    assert {value.dtype for value in feed.values()} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(feed[INPUT_IDS][0, :size], window.input_ids)
    assert (feed[INPUT_IDS][0, size:] == 9).all()
    assert feed[ATTENTION_MASK].sum() == size
    np.testing.assert_array_equal(feed[TOKEN_TYPE_IDS][0, :size], window.token_type_ids)
    assert not feed[TOKEN_TYPE_IDS][0, size:].any()
    assert TOKEN_TYPE_IDS not in window_feed(
        window, ALL_INPUTS[:2], length=64, pad_token_id=9
    )


def test_answers_come_from_the_logits(tokenizer: ReaderTokenizer) -> None:
    """The span with the highest logits is the answer; padding is cut off first."""
    encoded = encode_questions(
        tokenizer, QUESTIONS, max_window_tokens=384, doc_stride=128
    )
    lengths: list[int] = []

    def infer(feed: Any) -> Any:
        # Start and end on every token "v" or "##ik0" … of the name; padding highest.
        ids = feed[INPUT_IDS]
        lengths.append(ids.shape[1])
        first = encoded[len(lengths) - 1].windows[0]
        name = [
            first.context_start + i
            for i, (low, high) in enumerate(first.offsets)
            if low >= 13 and high <= 17
        ]
        start = np.zeros(ids.shape, np.float32)
        end = np.zeros(ids.shape, np.float32)
        start[0, name[0]], end[0, name[-1]] = 20, 20
        start[feed[ATTENTION_MASK] == 0] = 99
        return start, end

    ticks: list[None] = []
    answers = answer_questions(
        infer,
        encoded,
        ALL_INPUTS,
        bucket_for=lambda size: 64,
        pad_token_id=0,
        on_question=lambda: ticks.append(None),
    )
    assert answers.texts == PERFECT
    assert lengths == [64] * 4
    assert [len(start) for start, _ in answers.logits] == [
        len(item.windows[0]) for item in encoded
    ]
    assert len(ticks) == 4


def make_long_questions(words: list[int]) -> list[SquadQuestion]:
    """Questions on contexts of so many words."""
    return [
        SquadQuestion(
            f"q{i}",
            "Which number comes last?",
            " ".join(str(1000 + 7 * i + n) for n in range(count)),
            (str(1000 + 7 * i),),
            (0,),
        )
        for i, count in enumerate(words)
    ]


def fake_logits(feed: Any) -> Any:
    """Logits that depend on a token and its place, not on its row or its padding."""
    ids = feed[INPUT_IDS].astype(np.int64) * (1 + np.arange(feed[INPUT_IDS].shape[1]))
    return ((ids * 31 % 97) / 10).astype(np.float32), ((ids * 57 % 89) / 10).astype(
        np.float32
    )


@pytest.mark.parametrize("batch", [2, 3, 8, 64])
def test_batches_change_nothing(tokenizer: ReaderTokenizer, batch: int) -> None:
    """Answers and logits are those of single windows, in the questions' order."""
    words = [3, 40, 5, 300, 8, 41, 4, 90, 260, 3, 7, 42, 6, 5, 44, 310, 2, 9]
    encoded = encode_questions(
        tokenizer, make_long_questions(words), max_window_tokens=128, doc_stride=32
    )
    sizes = [len(window) for item in encoded for window in item.windows]
    shapes: list[tuple[int, int]] = []
    ticks: list[int] = []

    def infer(feed: Any) -> Any:
        assert {array.shape for array in feed.values()} == {feed[INPUT_IDS].shape}
        shapes.append(feed[INPUT_IDS].shape)
        return fake_logits(feed)

    def answer(size: int) -> Answers:
        return answer_questions(
            infer,
            encoded,
            ALL_INPUTS,
            bucket_for=lambda tokens: -(-tokens // 32) * 32,
            pad_token_id=0,
            batch=size,
            on_question=lambda: ticks.append(len(shapes)),
        )

    single = answer(1)
    assert [b for b, _ in shapes] == [1] * len(sizes)
    shapes.clear()
    ticks.clear()
    found = answer(batch)
    assert list(found.texts) == [item.question.id for item in encoded]
    assert found.texts == single.texts
    assert len(set(found.texts.values())) > len(words) // 2
    assert [len(start) for start, _ in found.logits] == sizes
    for left, right in zip(found.logits, single.logits, strict=True):
        np.testing.assert_array_equal(left, right)
    # Full batches, and what is left over of each length alone: no third shape.
    padded = [-(-size // 32) * 32 for size in sizes]
    for length in set(padded):
        full, rest = divmod(padded.count(length), batch)
        assert shapes.count((batch, length)) == full
        assert shapes.count((1, length)) == rest
    assert sum(b for b, _ in shapes) == len(sizes)
    assert len(ticks) == len(words)
