"""The stock graph of ``bench peers``: of the libraries alone, and really INT8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.helper

from int8qa.bench.stock_model import export_stock_model
from int8qa.build.engines.openvino import StockOpenVinoEngine
from int8qa.build.export import wrap_model
from int8qa.build.feed import window_feed
from int8qa.build.graph import DEQUANTIZE, QUANTIZE
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.reader.windows import Window
from tests.build.tiny import TinyReader


def test_stock_graph(
    tiny_checkpoints: dict[str, Path],
    readers: dict[str, TinyReader],
    windows: list[Window],
    tmp_path: Path,
) -> None:
    """int64 inputs, ModelOpt's choice of tensors, nearly the reader's logits."""
    target = tmp_path / "stock.onnx"
    export_stock_model(str(tiny_checkpoints["bert"]), target)
    graph = onnx.load(target).graph
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    names = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)
    assert inputs == dict.fromkeys(names, onnx.TensorProto.INT64)
    types = Counter(node.op_type for node in graph.node)
    layers = readers["bert"].model.config.num_hidden_layers
    # Inputs and weights of all GEMMs, the head's too, and inputs of LayerNorms.
    gemms, norms = 6 * layers + 1, 2 * layers + 1
    assert types[QUANTIZE] == types[DEQUANTIZE] == 2 * gemms + norms

    feed = window_feed(windows[0], names)
    start, end = StockOpenVinoEngine(target).infer(feed)
    reader = wrap_model(readers["bert"].model)
    import torch

    with torch.no_grad():
        wanted = reader(*(torch.from_numpy(feed[name]) for name in names))
    for found, exact in zip((start, end), wanted, strict=True):
        assert found.shape == exact.shape
        assert found.dtype == np.float32
        assert np.corrcoef(found[0], exact[0].numpy())[0, 1] > 0.9
