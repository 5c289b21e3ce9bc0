"""Attention whose every GEMM operand a quantizer can reach.

In: query, key and value as transformers hands them to an attention interface. Out:
what its own eager attention gives. The softmax output passes through the module's
``p_bmm_quantizer``, where ModelOpt put one.

ModelOpt 0.47 quantizes query, key and value in any interface, but the softmax output
only in FP8 and FP4: an INT8 ``p_bmm_quantizer`` is silently never called.
tests/build/test_attention.py tells when that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "int8qa"
"""Name of this attention among transformers' implementations."""


def register_attention() -> str:
    """Make the attention known to transformers; any number of times.

    Returns:
        The name to load checkpoints with.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    return ATTENTION


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, MatMul by MatMul.

    Written out, because the fused form hides the softmax output, and exports with
    guards against NaN that engines do not remove.

    Args:
        module: the attention module; its ``p_bmm_quantizer`` is used if it has one.
        query: float [B, heads, S, width]; ``key`` and ``value`` likewise.
        key: see ``query``.
        value: see ``query``.
        attention_mask: added to the scores, float [B, 1, 1, S] or [B, 1, S, S].
        scaling: of the scores; by default 1 / sqrt(width).
        dropout: share of probabilities dropped in training.

    Returns:
        The context [B, S, heads, width] and the probabilities [B, heads, S, S].

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    import torch
    from torch.nn import functional

    if scaling is None:
        scaling = query.size(-1) ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = functional.softmax(scores, dim=-1)
    probabilities = functional.dropout(
        probabilities, p=dropout, training=module.training
    )
    quantizer = getattr(module, "p_bmm_quantizer", None)
    if quantizer is not None:
        probabilities = quantizer(probabilities)
    context = torch.matmul(probabilities, value).transpose(1, 2).contiguous()
    return context, probabilities
