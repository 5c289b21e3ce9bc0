"""Every architecture exports to a graph that answers as torch does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from int8qa.build.export import MASKED_SCORE, export_onnx, model_inputs
from int8qa.build.graph import clean_graph
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.errors import ExportError
from tests.build.tiny import (
    ARCHITECTURES,
    Graphs,
    TinyReader,
    make_reader,
    random_feed,
    run_onnx,
)

SHAPES = (([16], 16), ([9, 4], 9), ([31, 32, 1], 32), ([40], 64))
"""Lengths of the rows, and what they are padded to; the exporter saw 2 x 16 only."""


@pytest.fixture(scope="module")
def exported(readers: dict[str, TinyReader]) -> dict[str, onnx.ModelProto]:
    """The cleaned graph of each architecture."""
    return {
        name: clean_graph(export_onnx(reader.wrapped, reader.inputs))
        for name, reader in readers.items()
    }


def _real_tokens(logits: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


def test_input_names() -> None:
    """Token types are an input only of models that have them, and the last one."""
    assert model_inputs(takes_token_types=False) == (INPUT_IDS, ATTENTION_MASK)
    assert model_inputs(takes_token_types=True) == (
        INPUT_IDS,
        ATTENTION_MASK,
        TOKEN_TYPE_IDS,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_signature(
    exported: dict[str, onnx.ModelProto],
    readers: dict[str, TinyReader],
    name: str,
) -> None:
    """Inputs are int32 [B, S], outputs float32 [B, S], by the contract's names."""
    graph = exported[name].graph
    assert [value.name for value in graph.input] == list(readers[name].inputs)
    assert [value.name for value in graph.output] == ["start_logits", "end_logits"]
    types = {
        value.type.tensor_type.elem_type: [
            dim.dim_param for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*graph.input, *graph.output)
    }
    assert types == {
        onnx.TensorProto.INT32: ["B", "S"],
        onnx.TensorProto.FLOAT: ["B", "S"],
    }


@pytest.mark.parametrize("lengths_padded", SHAPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onnx_equals_torch(
    exported: dict[str, onnx.ModelProto],
    readers: dict[str, TinyReader],
    name: str,
    lengths_padded: tuple[list[int], int],
) -> None:
    """ONNX Runtime gives torch's logits at shapes and masks the exporter never saw."""
    lengths, padded = lengths_padded
    feed = random_feed(readers[name], lengths, padded)
    expected = readers[name].run_torch(feed)
    found = run_onnx(exported[name], feed)
    for left, right in zip(expected, found, strict=True):
        assert right.dtype == np.float32
        assert right.shape == (len(lengths), padded)
        for a, b in zip(
            _real_tokens(left, lengths), _real_tokens(right, lengths), strict=True
        ):
            np.testing.assert_allclose(b, a, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_is_masked(
    exported: dict[str, onnx.ModelProto],
    readers: dict[str, TinyReader],
    name: str,
) -> None:
    """Padding, and whatever tokens stand in it, leaves the real tokens' logits alone."""
    alone = random_feed(readers[name], [12], 12)
    padded = {
        key: np.concatenate([value, np.zeros((1, 20), np.int32)], axis=1)
        for key, value in alone.items()
    }
    padded[INPUT_IDS][0, 12:] = 2000
    expected = run_onnx(exported[name], alone)
    found = run_onnx(exported[name], padded)
    for left, right in zip(expected, found, strict=True):
        np.testing.assert_allclose(right[:, :12], left, atol=1e-4, rtol=0)
    unmasked = {**padded, ATTENTION_MASK: np.ones_like(padded[ATTENTION_MASK])}
    changed = run_onnx(exported[name], unmasked)
    assert np.abs(changed[0][:, :12] - expected[0]).max() > 1e-2


def test_mask_is_one_addition_per_layer(exported: dict[str, onnx.ModelProto]) -> None:
    """No trace of transformers' own mask code: no Where, IsNaN, If or Expand."""
    for model in exported.values():
        counts = Counter(node.op_type for node in model.graph.node)
        assert not counts.keys() & {"If", "IsNaN", "Loop"}
        assert counts["Softmax"] == 2
        assert counts["LayerNormalization"] >= 4


def test_masked_score_is_finite_in_half() -> None:
    """The score of padding is a float16 whose exponential is zero beside any other."""
    assert np.isfinite(np.float16(MASKED_SCORE))
    assert np.exp(np.float32(MASKED_SCORE)) == 0.0


def test_quantized_export_agrees_with_fake_quantization(graphs: Graphs) -> None:
    """The Q/DQ graph is another function than the float one, and a close one."""
    feed = random_feed(make_reader("bert"), [20, 31], 32)
    plain = run_onnx(onnx.load_from_string(graphs.float_clean), feed)[0]
    quantized = run_onnx(onnx.load_from_string(graphs.quantized_clean), feed)[0]
    deviation = np.abs(plain - quantized)[feed[ATTENTION_MASK] == 1].max()
    spread = plain.max() - plain.min()
    assert 0 < deviation < 0.5 * spread


def test_refused_model() -> None:
    """A model the exporter cannot trace ends in an ExportError of one line."""
    import torch

    class Broken(torch.nn.Module):
        def forward(self, ids, mask):
            raise RuntimeError("first line\nsecond line")

    with pytest.raises(ExportError, match=r"refused the model: .*first line") as caught:
        export_onnx(Broken(), (INPUT_IDS, ATTENTION_MASK))
    assert "\n" not in str(caught.value)
