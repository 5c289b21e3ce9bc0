"""Unsigned GEMM inputs: the same numbers, wherever GEMMs alone read a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from int8qa.build.graph import QUANTIZE
from int8qa.build.unsigned_inputs import shift_inputs
from tests.build.half import project
from tests.build.tiny import (
    ARCHITECTURES,
    CalibratedReader,
    make_reader,
    random_feed,
    run_onnx,
)

Calibrated = Callable[[str], CalibratedReader]

K, N = 24, 5
ZERO = np.int8(0)
SCALE = 0.0625  # a power of two: values that lie between two steps are met exactly
RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 128, (K, N), dtype=np.int8)
WEIGHT_SCALE = RNG.uniform(0.001, 0.01, N).astype(np.float32)
BIAS = RNG.normal(size=N).astype(np.float32)
# From far below the grid to far above it, half steps among them.
VALUES = np.linspace(-160, 160, 641)[RNG.permutation(641)][: 26 * K] * SCALE
FEED = {"x": VALUES.reshape(26, K).astype(np.float32)}


def make_graph(*tail: onnx.NodeProto, zero: Any = ZERO) -> onnx.ModelProto:
    """x, quantized and dequantized to xd; the weight wd; then what is given, to y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        *tail,
    ]
    constants = {
        "scale": np.float32(SCALE),
        "zero": zero,
        "w": WEIGHT,
        "ws": WEIGHT_SCALE,
        "wz": np.zeros(N, np.int8),
        "b": BIAS,
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "C"])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def list_unsigned(model: onnx.ModelProto) -> list[str]:
    """What the UINT8 pairs quantize."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == QUANTIZE and types[node.input[2]] == TensorProto.UINT8
    ]


GEMM = helper.make_node("MatMul", ["xd", "wd"], ["g"])


@pytest.mark.parametrize(
    "tail",
    [
        [GEMM, helper.make_node("Add", ["g", "b"], ["y"])],
        [GEMM, helper.make_node("Add", ["b", "g"], ["y"])],
        [helper.make_node("MatMul", ["xd", "wd"], ["y"])],
        [GEMM, helper.make_node("Relu", ["g"], ["y"])],
        [GEMM, helper.make_node("Add", ["g", "g"], ["y"])],
        [
            GEMM,
            helper.make_node("MatMul", ["xd", "wd"], ["h"]),
            helper.make_node("Add", ["g", "b"], ["gb"]),
            helper.make_node("Add", ["gb", "h"], ["y"]),
        ],
    ],
)
def test_same_numbers(tail: list[onnx.NodeProto]) -> None:
    """With a bias on either side, without one, read twice, and two GEMMs."""
    model = make_graph(*tail)
    before = model.SerializeToString()
    shifted = shift_inputs(model)
    assert model.SerializeToString() == before
    assert list_unsigned(shifted) == ["xq"]
    (expected,), (found,) = run_onnx(model, FEED), run_onnx(shifted, FEED)
    step = SCALE * WEIGHT_SCALE.min()
    scale = max(1.0, float(np.abs(expected).max()))
    # One integer otherwise would be a step times a weight; float32 errs by far less.
    np.testing.assert_allclose(found, expected, atol=min(0.2 * step, 2e-6 * scale))


@pytest.mark.parametrize(
    "tail",
    [
        [GEMM, helper.make_node("Identity", ["xd"], ["i"])],
        [helper.make_node("Transpose", ["xd"], ["t"]), GEMM],
        [helper.make_node("MatMul", ["x", "wd"], ["g"])],
    ],
)
def test_others_read_it_too(tail: list[onnx.NodeProto]) -> None:
    """What a residual add reads, or nobody, stays signed."""
    model = make_graph(*tail, helper.make_node("Add", ["g", "b"], ["y"]))
    assert shift_inputs(model) == model


def test_two_activations() -> None:
    """Attention's GEMMs have no constant operand to take the offset."""
    turned = helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0])
    model = make_graph(turned, helper.make_node("MatMul", ["xd", "t"], ["y"]))
    assert shift_inputs(model) == model


@pytest.mark.parametrize("zero", [np.uint8(0), np.int8(3)])
def test_other_grids(zero: Any) -> None:
    """Unsigned already, or not symmetric: left alone."""
    model = make_graph(GEMM, helper.make_node("Add", ["g", "b"], ["y"]), zero=zero)
    assert shift_inputs(model) == model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("recipe", "pairs"), [("gemms", 4), ("full", 2)])
def test_readers(calibrated: Calibrated, name: str, recipe: str, pairs: int) -> None:
    """Every GEMM with weights; in ``full`` but those whose input is a residual, too."""
    source = calibrated(name)
    model = project(source, recipe)
    shifted = shift_inputs(model)
    moved = set(list_unsigned(shifted)) - set(list_unsigned(model))
    assert len(moved) == 2 * pairs + (name == "electra")
    feed = random_feed(make_reader(name), [32, 20], 32, seed=3)
    for one, other in zip(run_onnx(model, feed), run_onnx(shifted, feed), strict=True):
        assert np.abs(one - other).max() < 0.1
