"""Exactly the encoder's GEMMs are quantized, in every architecture."""

from __future__ import annotations

from typing import Any

import pytest

from int8qa.build.quantization import RECIPES, find_head, insert_quantizers
from int8qa.errors import BuildError
from tests.build.tiny import ARCHITECTURES, make_reader

# Per layer Q, K, V, attention output and two of the feed-forward; ELECTRA projects its
# embeddings too.
GEMMS = {"bert": 12, "roberta": 12, "distilbert": 12, "electra": 13}


def enabled_quantizers(model: Any) -> dict[str, Any]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_recipe(name: str) -> None:
    """Inputs and weights of every GEMM but the head's, and nothing else."""
    import torch

    model = make_reader(name).model
    gemms = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "qa_outputs"
    }
    count = insert_quantizers(model, RECIPES["linear"])
    enabled = enabled_quantizers(model)
    assert enabled.keys() == {
        f"{path}.{side}_quantizer" for path in gemms for side in ("input", "weight")
    }
    assert count == 2 * GEMMS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_is_found(name: str) -> None:
    """The head is the GEMM with two outputs, whatever the encoder."""
    assert find_head(make_reader(name).model) == ["qa_outputs"]


def test_scales() -> None:
    """One scale per tensor for inputs, one per output channel for weights, 8 bits."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    model = make_reader("bert").model
    insert_quantizers(model, RECIPES["linear"])
    for path, quantizer in enabled_quantizers(model).items():
        assert quantizer.num_bits == 8
        if path.endswith("weight_quantizer"):
            assert quantizer.axis == 0
        else:
            assert quantizer.axis is None
            assert isinstance(quantizer._calibrator, HistogramCalibrator)


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """ModelOpt's report of every quantizer stays out of the build's output."""
    insert_quantizers(make_reader("bert").model, RECIPES["linear"])
    assert capfd.readouterr().out == ""


def test_model_without_gemms() -> None:
    """A model with nothing to quantize is refused, not served as INT8."""
    import torch

    with pytest.raises(BuildError, match="found no GEMM to quantize"):
        insert_quantizers(
            torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4)),
            RECIPES["linear"],
        )
