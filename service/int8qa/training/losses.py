"""What a step minimizes.

In: start and end logits, the tokens that may hold an answer, the annotators' votes and
a teacher's logits. Out: one number. Question, separator and padding tokens take no
share in the softmax, as in reader/spans.py, so training sees what serving computes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXCLUDED = -1e4
"""Logit of a token that cannot be an answer: exp(-1e4) is 0 in float32."""


def exclude_tokens(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``logits`` in float32, with tokens that are not ``allowed`` out of the race."""
    return logits.float().masked_fill(~allowed, EXCLUDED)


def span_loss(
    logits: tuple[torch.Tensor, torch.Tensor],
    shares: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Mean cross entropy of first and last token, each against the annotators' votes.

    With one annotator it is BERT's: Devlin et al. 2018, arXiv:1810.04805, section 4.2.
    With several it is the mean of that over them, so that where people disagree the
    reader learns how far, instead of the first one's choice.

    Args:
        logits: start and end, float [B, S], after :func:`exclude_tokens`.
        shares: of the annotators whose answer begins and ends at a token, float32
            [B, S]; each row sums to 1.
    """
    from torch.nn import functional

    start, end = (
        functional.cross_entropy(found, share)
        for found, share in zip(logits, shares, strict=True)
    )
    return (start + end) / 2


def distillation_loss(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> torch.Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), mean of start and end.

    ModelOpt's ``LogitsDistillationLoss``, on each of the two distributions.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; T² keeps the gradients'
    size when T changes.

    Args:
        student: start and end logits, float [B, S], after :func:`exclude_tokens`.
        teacher: likewise.
        temperature: T, above 0.
    """
    loss = _logits_loss(temperature)
    start, end = (
        loss(found, wanted) for found, wanted in zip(student, teacher, strict=True)
    )
    return (start + end) / 2


@functools.cache
def _logits_loss(temperature: float) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # ModelOpt warns that it has not been tested with this transformers.
        warnings.simplefilter("ignore")
        from modelopt.torch.distill import LogitsDistillationLoss

    # "mean" would divide by S as well.
    return LogitsDistillationLoss(temperature, reduction="batchmean")
