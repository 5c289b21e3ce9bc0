"""What a step minimizes, against the same by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int8qa.training.losses import distillation_loss, exclude_tokens, span_loss

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp((value - max(row)) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@given(
    st.lists(LOGITS, min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=4),
)
def test_span_loss(rows: list[list[float]], votes: list[tuple[int, int]]) -> None:
    """Minus the logarithm of what the answer's tokens get; the mean over annotators,
    windows, and start and end.
    """  # noqa: D205
    expected = np.mean(
        [
            -math.log(max(softmax(row, 1.0)[place], 1e-300))
            for row in rows
            for vote in votes
            for place in vote
        ]
    )
    logits = torch.tensor(rows)
    shares = torch.zeros(2, len(rows), 3)
    for vote in votes:
        for end, place in enumerate(vote):
            shares[end, :, place] += 1 / len(votes)
    assert float(span_loss((logits, logits), (shares[0], shares[1]))) == pytest.approx(
        expected, abs=1e-3
    )


@given(LOGITS, LOGITS, st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_distillation_loss(
    student: list[float], teacher: list[float], temperature: float
) -> None:
    """T² times the Kullback-Leibler divergence of the softened distributions."""
    wanted, found = softmax(teacher, temperature), softmax(student, temperature)
    divergence = sum(
        p * (math.log(p) - math.log(q))
        for p, q in zip(wanted, found, strict=True)
        if p > 0
    )
    taught, learned = torch.tensor([teacher]), torch.tensor([student])
    loss = distillation_loss((learned, learned), (taught, taught), temperature)
    assert float(loss) == pytest.approx(temperature**2 * divergence, abs=1e-3)


def test_distillation_is_a_mean_over_windows_and_both_ends() -> None:
    """Not over tokens as well: longer windows do not weigh less."""
    right, wrong = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    one = distillation_loss((wrong, right), (right, right), 1.0)
    both = distillation_loss((wrong, wrong), (right, right), 1.0)
    assert float(both) == pytest.approx(2 * float(one))
    half = distillation_loss(
        (torch.cat((wrong, right)),) * 2, (torch.cat((right, right)),) * 2, 1.0
    )
    assert float(half) == pytest.approx(float(both) / 2)
    padded = [
        exclude_tokens(
            torch.cat((logits, torch.randn(1, 30)), 1),
            torch.tensor([[True] * 2 + [False] * 30]),
        )
        for logits in (wrong, right)
    ]
    longer = distillation_loss((padded[0],) * 2, (padded[1],) * 2, 1.0)
    assert float(longer) == pytest.approx(float(both), rel=1e-5)


def test_excluded_tokens_take_no_share() -> None:
    """Whatever the model thinks of padding, loss and gradient are as without it."""
    allowed = torch.tensor([[True, False, True]])
    for value in (-50.0, 0.0, 50.0, 1e4):
        raw = torch.tensor([[1.0, value, 2.0]], requires_grad=True)
        logits = exclude_tokens(raw, allowed)
        loss = span_loss((logits, logits), (torch.tensor([[0.0, 0.0, 1.0]]),) * 2)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-6)
        loss.backward()
        assert raw.grad is not None
        assert raw.grad[0, 1] == 0.0


def test_half_logits() -> None:
    """bf16's logits are compared in float32."""
    logits = exclude_tokens(
        torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1, 2) > 0
    )
    assert logits.dtype == torch.float32
