"""SmoothQuant: the same function, less INT8 error, one scale per shared tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from int8qa.build.calibration import Calibrator, calibrate
from int8qa.build.export import export_onnx, model_inputs, wrap_model
from int8qa.build.feed import window_feed
from int8qa.build.graph import clean_graph, take_census
from int8qa.build.quantization import RECIPES, insert_quantizers
from int8qa.build.smoothing import _search_scale, smooth_activations
from int8qa.errors import BuildError
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_windows

TOKENIZER = (
    Path(__file__).resolve().parents[2]
    / "service/int8qa/data/checkpoint/tokenizer.json"
)
INPUTS = model_inputs(takes_token_types=True)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """A few windows of unequal length."""
    tokenizer = ReaderTokenizer.from_file(TOKENIZER)
    texts = ["The kiln reached 1,240 degrees.", "Ana opened it on Sunday. " * 4]
    return [
        window
        for text in texts
        for window in split_windows(tokenizer, "Who opened the kiln?", text)
    ]


@pytest.fixture
def reader() -> torch.nn.Module:
    """A tiny BERT with one outlier channel in each LayerNorm's output."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    model = BertForQuestionAnswering._from_config(
        BertConfig(
            vocab_size=30522,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        attn_implementation="eager",
    ).eval()
    for name, module in model.named_modules():
        if "LayerNorm" in name:
            module.weight.data[3] *= 40.0
    insert_quantizers(model, RECIPES["linear"])
    return wrap_model(model)


def _logits(reader: torch.nn.Module, windows: list[Window]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                reader(*(torch.from_numpy(f[name].copy()) for name in INPUTS))[0][0]
                for f in (window_feed(window, INPUTS) for window in windows)
            ]
        )


def _set_quantization(reader: torch.nn.Module, enabled: bool) -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in reader.modules():
        if isinstance(module, TensorQuantizer) and not module._disabled:
            if enabled:
                module.enable_quant()
            else:
                module.disable_quant()


def test_smoothing_keeps_the_float_function(reader, windows) -> None:
    """Without quantization the smoothed model gives the same logits."""
    _set_quantization(reader, enabled=False)
    before = _logits(reader, windows)
    chosen = smooth_activations(reader, windows, INPUTS)
    assert any(chosen.values())
    # pre_quant_scale takes part in the forward pass only while quantizing.
    calibrate(reader, windows, Calibrator("max"), INPUTS)
    for module in reader.modules():
        if hasattr(module, "input_quantizer") and hasattr(module, "weight"):
            scale = getattr(module.input_quantizer, "_pre_quant_scale", None)
            if scale is not None:
                module.weight.data *= scale
    _set_quantization(reader, enabled=False)
    for module in reader.modules():
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None and hasattr(quantizer, "_pre_quant_scale"):
            del quantizer._pre_quant_scale
    torch.testing.assert_close(_logits(reader, windows), before, rtol=1e-3, atol=1e-4)


def test_smoothing_lowers_the_int8_error(reader, windows) -> None:
    """With an outlier channel, smoothed INT8 is nearer to float than plain INT8."""
    import copy

    plain = copy.deepcopy(reader)
    _set_quantization(reader, enabled=False)
    exact = _logits(reader, windows)
    _set_quantization(reader, enabled=True)
    smooth_activations(reader, windows, INPUTS)
    errors = []
    for model in (plain, reader):
        calibrate(model, windows, Calibrator("max"), INPUTS)
        errors.append(float((_logits(model, windows) - exact).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_query_key_and_value_share_one_scale_and_one_pair(reader, windows) -> None:
    """The cleaned graph has one product and one Q/DQ pair where three GEMMs read."""
    chosen = smooth_activations(reader, windows, INPUTS)
    by_layer = [
        {chosen[f"model.bert.encoder.layer.{n}.attention.self.{m}"] for m in kinds}
        for n in (0, 1)
        for kinds in [("query", "key", "value")]
    ]
    assert all(len(alphas) == 1 for alphas in by_layer)
    calibrate(reader, windows, Calibrator("max"), INPUTS)
    census = take_census(clean_graph(export_onnx(reader, INPUTS)))
    # Per layer: QKV, attention output, intermediate, output.
    assert census.quantize_nodes == 2 * 4
    assert census.quantized_matmuls == 2 * 6


def test_search_leaves_even_channels_alone_and_scales_uneven_ones() -> None:
    """A scale is chosen only where it lowers the error of the product."""
    torch.manual_seed(1)
    rows = torch.randn(200, 16)
    weight = torch.randn(8, 16)
    rows[:, 5] *= 100.0
    alpha, scale = _search_scale(rows, [weight], keep=1.0)
    assert alpha > 0
    assert scale is not None
    assert scale.argmax() == 5
    # Powers of two lose nothing in INT8: no scale can do better.
    alpha, scale = _search_scale(torch.eye(4), [torch.eye(4)], keep=1.0)
    assert (alpha, scale) == (0.0, None)


def test_smoothing_without_windows_is_an_error(reader) -> None:
    """No data, no ranges."""
    with pytest.raises(BuildError, match="at least one"):
        smooth_activations(reader, [], INPUTS)
