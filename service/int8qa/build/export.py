"""A torch reader as a clean ONNX graph.

In: a :class:`~int8qa.build.checkpoint.Checkpoint`'s model, float or with
ModelOpt's quantizers in it. Out: an ONNX model with int32 inputs [B, S] and float
logits [B, S], whose attention mask is one additive tensor. Knows no engine.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from int8qa.contract import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_IDS,
    START_LOGITS,
    TOKEN_TYPE_IDS,
)
from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 17
"""First opset with LayerNormalization as one operator, which engines fuse."""

MASKED_SCORE = -10_000.0
"""Added to the scores of padding. Finite in float16 (lowest: -65504), and
exp(-10000) is 0 in every float type, so it masks as well as -inf does."""


def model_inputs(*, takes_token_types: bool) -> tuple[str, ...]:
    """Names of the graph's inputs, in the order the wrapper takes them."""
    names = (INPUT_IDS, ATTENTION_MASK)
    return (*names, TOKEN_TYPE_IDS) if takes_token_types else names


def wrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the signature of the contract.

    The wrapper turns the mask [B, S] of 0 and 1 into one additive tensor
    [B, 1, 1, S]: transformers passes a 4-d mask through untouched, and its own mask
    code (ranges, comparisons, broadcasts) stays out of the graph.
    """
    import torch

    class Reader(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            scores = (1.0 - attention_mask[:, None, None, :].float()) * MASKED_SCORE
            extra: dict[str, Any] = {}
            if token_type_ids is not None:
                extra["token_type_ids"] = token_type_ids
            output = self.model(input_ids=input_ids, attention_mask=scores, **extra)
            return output.start_logits, output.end_logits

    return Reader().eval()


def export_onnx(model: torch.nn.Module, inputs: Sequence[str]) -> onnx.ModelProto:
    """Trace ``model`` (see :func:`wrap_model`) into an ONNX model.

    Args:
        model: takes one int32 tensor [B, S] per name of ``inputs``.
        inputs: names of the inputs, in order.

    Raises:
        ExportError: the exporter refused the model; the cause says where.
    """
    import onnx
    import torch

    # Any two rows of unequal length do; nothing of them stays in the graph.
    ids = torch.arange(5, 5 + 2 * 16, dtype=torch.int32).reshape(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    examples = {
        INPUT_IDS: ids,
        ATTENTION_MASK: mask,
        TOKEN_TYPE_IDS: torch.zeros_like(ids),
    }
    names = [*inputs, START_LOGITS, END_LOGITS]
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The TorchScript exporter warns of its own age and of constants it
            # traces (our shapes are dynamic where the contract says so). ModelOpt's
            # Q/DQ symbolic functions exist only for this exporter (0.47).
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(examples[name] for name in inputs),
                buffer,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[START_LOGITS, END_LOGITS],
                dynamic_axes={name: {0: "B", 1: "S"} for name in names},
                do_constant_folding=True,
            )
    except (
        RuntimeError,
        TypeError,
        ValueError,
        torch.onnx.errors.OnnxExporterError,
    ) as error:
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"torch.onnx.export refused the model: {reason[0] if reason else error!r}"
        ) from error
    return onnx.load_from_string(buffer.getvalue())
