"""The float16 graph computes what the float32 graph computes, in the types it states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from int8qa.build.half_graph import make_half_graph
from int8qa.build.product_folding import fold_products
from int8qa.build.quantization import RECIPES
from int8qa.contract import ATTENTION_MASK
from int8qa.errors import ExportError
from tests.build.half import find_node, float_graph, project
from tests.build.tiny import (
    ARCHITECTURES,
    CalibratedReader,
    Graphs,
    make_reader,
    random_feed,
    run_onnx,
)

Calibrated = Callable[[str], CalibratedReader]


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def types(model: onnx.ModelProto) -> set[int]:
    return {tensor.data_type for tensor in model.graph.initializer}


def deviation(
    source: CalibratedReader, left: onnx.ModelProto, right: onnx.ModelProto
) -> float:
    """RMS of the difference of the logits of real tokens, over their own.

    Not the largest: a value that float16 moves across the border of two INT8 codes
    jumps by a step, in a reader this narrow a visible one.
    """
    feed = random_feed(source.reader, [24, 17], 24)
    real = feed[ATTENTION_MASK] == 1
    pairs = list(zip(run_onnx(left, feed), run_onnx(right, feed), strict=True))
    wanted = np.concatenate([a[real] for a, _ in pairs])
    found = np.concatenate([b[real] for _, b in pairs])
    return float(np.sqrt(np.mean((wanted - found) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
def test_same_function(calibrated: Calibrated, name: str, recipe: str) -> None:
    """Of every architecture and recipe the logits stay, but for float16's rounding."""
    source = calibrated(name)
    whole = project(source, recipe)
    half = make_half_graph(whole)
    # Readers of random, wide weights: nothing in them averages rounding out.
    assert deviation(source, whole, half) < 0.15
    assert {value.type.tensor_type.elem_type for value in half.graph.input} == {
        TensorProto.INT32
    }
    assert {value.type.tensor_type.elem_type for value in half.graph.output} == {
        TensorProto.FLOAT
    }
    assert types(half) <= {
        TensorProto.FLOAT16,
        TensorProto.INT8,
        TensorProto.INT32,
        TensorProto.INT64,
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
def test_folding_alone(calibrated: Calibrated, name: str, recipe: str) -> None:
    """In float32, products inside constants give what they gave outside."""
    source = calibrated(name)
    whole = project(source, recipe)
    folded = onnx.ModelProto()
    folded.CopyFrom(whole)
    fold_products(folded)
    assert count(whole)["Mul"] - count(folded)["Mul"] == 2
    assert deviation(source, whole, folded) < 1e-3


def test_float_graph(graphs: Graphs) -> None:
    """The graph without Q/DQ is halved too, and its scores are scaled in the query."""
    whole = onnx.load_from_string(graphs.float_clean)
    half = make_half_graph(whole)
    feed = random_feed(make_reader("bert"), [24, 17], 24)
    for a, b in zip(run_onnx(whole, feed), run_onnx(half, feed), strict=True):
        assert np.abs(a - b).max() < 0.02 * np.abs(a).max()
    assert count(whole)["Mul"] - count(half)["Mul"] == 2
    assert TensorProto.FLOAT not in types(half)
    assert len(half.SerializeToString()) < 0.51 * len(whole.SerializeToString())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_scaled_in_the_query(calibrated: Calibrated, name: str) -> None:
    """One product a layer goes, also past a quantized query, whose scale takes it."""
    for recipe in ("linear", "full"):
        whole = project(calibrated(name), recipe)
        half = make_half_graph(whole)
        assert count(whole)["Mul"] - count(half)["Mul"] == 2
        for softmax in (n for n in half.graph.node if n.op_type == "Softmax"):
            add = next(n for n in half.graph.node if softmax.input[0] in n.output)
            made = {
                n.op_type for n in half.graph.node if set(n.output) & set(add.input)
            }
            assert "MatMul" in made


def smooth_contexts(model: onnx.ModelProto, factor: np.ndarray) -> None:
    """A product by channel behind every attention, as SmoothQuant leaves it."""
    model.graph.initializer.append(numpy_helper.from_array(factor, "smoothing"))
    for layer in range(2):
        part = f"layer.{layer}/attention/output/dense"
        read = find_node(model, "QuantizeLinear", part).input[0]
        reader = find_node(model, "QuantizeLinear", part)
        product = helper.make_node(
            "Mul", [read, "smoothing"], [f"{read}.smooth"], name=f"smooth_{layer}"
        )
        place = list(model.graph.node).index(reader)
        reader.input[0] = product.output[0]
        model.graph.node.insert(place, product)


def test_smoothing_folds_into_a_float_value(calibrated: Calibrated) -> None:
    """A float value's GEMM takes the product by channel; an INT8 value's cannot."""
    source = calibrated("bert")
    factor = np.linspace(0.5, 2.0, 32, dtype=np.float32)
    for recipe, stays in (("linear", 0), ("full", 2)):
        whole = project(source, recipe)
        smooth_contexts(whole, factor)
        folded = onnx.ModelProto()
        folded.CopyFrom(whole)
        fold_products(folded)
        assert sum(n.name.startswith("smooth_") for n in folded.graph.node) == stays
        assert deviation(source, whole, folded) < 1e-3


def test_original_is_untouched(calibrated: Calibrated) -> None:
    """The graph given stays as it was: it still has to become an OpenVINO engine."""
    whole = project(calibrated("bert"), "linear")
    before = whole.SerializeToString(deterministic=True)
    make_half_graph(whole)
    assert whole.SerializeToString(deterministic=True) == before


def test_unsigned_softmax_is_refused(calibrated: Calibrated) -> None:
    """A graph for engines with unsigned INT8 is refused, with what to write instead."""
    source = calibrated("bert")
    model = project(source, "full")
    quantize = find_node(model, "QuantizeLinear", "p_bmm_quantizer")
    zero = numpy_helper.from_array(np.uint8(0), "unsigned_zero")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        if quantize.output[0] in (*node.input, *node.output):
            node.input[2] = "unsigned_zero"
    with pytest.raises(ExportError, match="`unsigned_softmax: false`"):
        make_half_graph(model)
    assert RECIPES["full"].unsigned_softmax, "built-in recipes are for CPUs"


def test_weight_beyond_float16(graphs: Graphs) -> None:
    """A weight that float16 cannot hold is named, not turned into infinity."""
    model = onnx.load_from_string(graphs.float_clean)
    tensor = next(t for t in model.graph.initializer if "word_embeddings" in t.name)
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = 1e6
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(ExportError, match=r"word_embeddings.* holds 1e\+06"):
        make_half_graph(model)


def test_vanishing_scale(calibrated: Calibrated) -> None:
    """A scale that float16 rounds to 0 is kept positive: TensorRT refuses 0."""
    model = project(calibrated("bert"), "linear")
    weight = find_node(model, "DequantizeLinear", "weight_quantizer")
    scale = next(t for t in model.graph.initializer if t.name == weight.input[1])
    tiny = np.full(scale.dims, 1e-12, np.float32)
    scale.CopyFrom(numpy_helper.from_array(tiny, scale.name))
    half = make_half_graph(model)
    names = {n.input[1] for n in half.graph.node if "uantizeLinear" in n.op_type}
    scales = [
        numpy_helper.to_array(t) for t in half.graph.initializer if t.name in names
    ]
    assert len(scales) == len(names)
    assert all((array > 0).all() for array in scales)


def test_operator_of_another_meaning(graphs: Graphs) -> None:
    """An operator that opset 19 redefines is refused by name."""
    model = onnx.load_from_string(graphs.float_clean)
    name = model.graph.output[0].name
    last = next(n for n in model.graph.node if name in n.output)
    last.output[0] = "before"
    model.graph.node.append(
        helper.make_node("ReduceMax", ["before"], [name], axes=[1], keepdims=1)
    )
    with pytest.raises(ExportError, match="ReduceMax another meaning"):
        make_half_graph(model)


def test_float_graph_helper(graphs: Graphs) -> None:
    """The raw export halves as well as the cleaned one, once cleaned."""
    left = make_half_graph(float_graph(graphs.float_raw))
    right = make_half_graph(onnx.load_from_string(graphs.float_clean))
    assert count(left) == count(right)
