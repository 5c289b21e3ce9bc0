"""Each pass on a small graph by hand, and all of them on a real Q/DQ export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from int8qa.build.graph import clean_graph
from int8qa.contract import ATTENTION_MASK
from int8qa.errors import ExportError
from tests.build.tiny import (
    CalibratedReader,
    Graphs,
    make_reader,
    random_feed,
    run_onnx,
)

FLOAT = TensorProto.FLOAT


def build(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    *,
    inputs: dict[str, int] | None = None,
    outputs: Sequence[str] = ("y",),
    rank: int = 2,
) -> onnx.ModelProto:
    """A model of ``nodes``; inputs by name and type, outputs float."""
    shape = [f"d{i}" for i in range(rank)]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind in (inputs or {"x": FLOAT}).items()
        ],
        [helper.make_tensor_value_info(name, FLOAT, [None, None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def clean_and_compare(
    model: onnx.ModelProto, feed: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """Clean ``model`` and hold every output to the raw model's, bit by bit."""
    expected = run_onnx(model, feed)
    cleaned = clean_graph(model)
    found = run_onnx(cleaned, feed)
    for left, right in zip(expected, found, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(right, left)
    return cleaned


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def quantize_model(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    axis: int | None,
    *,
    transposed: bool = False,
) -> onnx.ModelProto:
    """One GEMM on a quantized constant, which may be transposed."""
    attributes = {} if axis is None else {"axis": axis}
    product = "wt" if transposed else "wd"
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], **attributes),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], **attributes),
        helper.make_node("MatMul", ["x", product], ["y"]),
    ]
    if transposed:
        nodes.insert(2, helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]))
    return build(nodes, {"w": weight, "s": scale, "z": zero_point})


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def test_constants_become_initializers(x: np.ndarray) -> None:
    """A Constant node goes, its value stays."""
    value = np.float32([1, 2, 3, 4])
    model = build(
        [
            helper.make_node(
                "Constant", [], ["c"], value=numpy_helper.from_array(value)
            ),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ],
        {},
    )
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned) == ["Add"]
    np.testing.assert_array_equal(initializers(cleaned)["c"], value)


def test_cast_of_a_constant_is_folded(x: np.ndarray) -> None:
    """A constant is cast at build time; int64 to float here."""
    model = build(
        [
            helper.make_node("Cast", ["c"], ["cf"], to=FLOAT),
            helper.make_node("Add", ["x", "cf"], ["y"]),
        ],
        {"c": np.array([1, 2, 3, 4])},
    )
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned) == ["Add"]
    assert initializers(cleaned)["cf"].dtype == np.float32
    assert "c" not in initializers(cleaned)


def test_identity_casts_go(x: np.ndarray) -> None:
    """Casts of float to float go, also in a chain and on an inner tensor."""
    model = build(
        [
            helper.make_node("Cast", ["x"], ["a"], to=FLOAT),
            helper.make_node("Cast", ["a"], ["b"], to=FLOAT),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("Cast", ["c"], ["d"], to=FLOAT),
            helper.make_node("Neg", ["d"], ["y"]),
        ],
        {},
    )
    assert kinds(clean_and_compare(model, {"x": x})) == ["Relu", "Neg"]


def test_real_casts_stay() -> None:
    """A cast that changes the type is work, not debris."""
    model = build(
        [
            helper.make_node("Cast", ["x"], ["a"], to=FLOAT),
            helper.make_node("Relu", ["a"], ["y"]),
        ],
        {},
        inputs={"x": TensorProto.INT32},
    )
    cleaned = clean_and_compare(model, {"x": np.int32([[1, -2]])})
    assert kinds(cleaned) == ["Cast", "Relu"]


def test_identity_cast_that_names_an_output_stays(x: np.ndarray) -> None:
    """A graph output keeps its name, even where only a Cast gives it."""
    model = build(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Cast", ["a"], ["y"], to=FLOAT),
        ],
        {},
    )
    cleaned = clean_and_compare(model, {"x": x})
    assert cleaned.graph.node[-1].output[0] == "y"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("zero", [0, 3, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_per_tensor_weight_folding(dtype: type, zero: int, sign: int) -> None:
    """The folded weight is QuantizeLinear's, ties and saturation included."""
    zero_point = np.array(zero * sign if dtype is np.int8 else zero, dtype)
    scale = np.float32(0.5)
    # Multiples of half a step are ties; 1e6 and -1e6 are far outside.
    weight = np.float32(
        [*(np.arange(-9, 10) * 0.25), 1e6, -1e6, 63.25, 63.75, -64.25, -63.75, 0.0]
    ).reshape(2, 13)
    model = quantize_model(weight, scale, zero_point, None)
    model.graph.output.append(
        helper.make_tensor_value_info(
            "wq", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None, None]
        )
    )
    feed = {"x": np.float32([[1, -1]])}
    oracle = run_onnx(model, feed)[1]
    del model.graph.output[1]
    cleaned = clean_and_compare(model, feed)
    assert kinds(cleaned) == ["DequantizeLinear", "MatMul"]
    folded = initializers(cleaned)["wq"]
    assert folded.dtype == dtype
    np.testing.assert_array_equal(folded, oracle)
    limits = np.iinfo(dtype)
    assert folded.max() == limits.max
    assert folded.min() == limits.min
    assert "w" not in initializers(cleaned)


@pytest.mark.parametrize("axis", [0, 1, -1, -2, None])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_per_channel_weight_folding(axis: int | None, transposed: bool) -> None:
    """Scales along either axis, and a Transpose behind them, fold to the same values."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(4, 4)).astype(np.float32)
    scale = np.float32([0.01, 0.02, 0.5, 0.001])
    zero_point = np.int8([0, -3, 7, -128])
    x = rng.normal(size=(2, 4)).astype(np.float32)
    model = quantize_model(weight, scale, zero_point, axis, transposed=transposed)
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned) == ["DequantizeLinear", "MatMul"]
    assert initializers(cleaned)[cleaned.graph.node[0].input[0]].dtype == np.int8


def test_transposed_weight_moves_its_axis() -> None:
    """An [N, K] weight with a scale per row becomes [K, N] with one per column."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    model = quantize_model(
        weight, np.float32([1, 2, 4]), np.zeros(3, np.int8), 0, transposed=True
    )
    cleaned = clean_and_compare(model, {"x": np.ones((2, 4), np.float32)})
    dequantize = cleaned.graph.node[0]
    assert [(a.name, a.i) for a in dequantize.attribute] == [("axis", 1)]
    stored = initializers(cleaned)[dequantize.input[0]]
    np.testing.assert_array_equal(
        stored, np.rint(weight / np.float32([[1], [2], [4]])).T
    )


def test_shared_dequantized_weight_is_not_transposed(x: np.ndarray) -> None:
    """A weight that is also read untransposed keeps its Transpose."""
    weight = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    model = quantize_model(weight, np.float32(0.01), np.int8(0), None, transposed=True)
    model.graph.node.append(helper.make_node("MatMul", ["x", "wd"], ["y2"]))
    model.graph.output.append(helper.make_tensor_value_info("y2", FLOAT, [None, None]))
    cleaned = clean_and_compare(model, {"x": x})
    assert Counter(kinds(cleaned))["Transpose"] == 1


def test_dequantized_weight_that_is_an_output_is_not_transposed(x: np.ndarray) -> None:
    """A graph output is a use too."""
    weight = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    model = quantize_model(weight, np.float32(0.01), np.int8(0), None, transposed=True)
    model.graph.output.append(helper.make_tensor_value_info("wd", FLOAT, [None, None]))
    cleaned = clean_and_compare(model, {"x": x})
    assert "Transpose" in kinds(cleaned)


def test_transpose_that_does_nothing_stays(x: np.ndarray) -> None:
    """Only the exchange of both axes moves into the weight."""
    weight = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    model = quantize_model(weight, np.float32(0.01), np.int8(0), None, transposed=True)
    model.graph.node[2].attribute[0].ints[:] = [0, 1]
    clean_and_compare(model, {"x": x})


def test_activation_quantizer_stays(x: np.ndarray) -> None:
    """QuantizeLinear of an input is work at run time."""
    model = build(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"s": np.float32(0.1), "z": np.int8(0)},
    )
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned) == ["QuantizeLinear", "DequantizeLinear"]


def test_quantizer_without_zero_point_stays() -> None:
    """The two-input form is left to the engine, not guessed at."""
    model = build(
        [
            helper.make_node("QuantizeLinear", ["w", "s"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
            helper.make_node("Mul", ["x", "d"], ["y"]),
        ],
        {"w": np.float32([[1.0, 2.0]]), "s": np.float32(0.1)},
    )
    cleaned = clean_and_compare(model, {"x": np.float32([[1.0, 3.0]])})
    assert "QuantizeLinear" in kinds(cleaned)


def _three_readers(scales: Sequence[str]) -> onnx.ModelProto:
    """Three GEMMs on x, each behind a Q/DQ pair of its own, as ModelOpt writes them."""
    rng = np.random.default_rng(4)
    constants: dict[str, Any] = {"z": np.int8(0), "s0": np.float32(0.1)}
    constants |= {"s0_again": np.float32(0.1), "s1": np.float32(0.2)}
    nodes = []
    for i, scale in enumerate(scales):
        constants[f"w{i}"] = rng.normal(size=(4, 4)).astype(np.float32)
        nodes += [
            helper.make_node("QuantizeLinear", ["x", scale, "z"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", scale, "z"], [f"d{i}"]),
            helper.make_node("MatMul", [f"d{i}", f"w{i}"], [f"y{i}"]),
        ]
    return build(nodes, constants, outputs=[f"y{i}" for i in range(len(scales))])


def test_equal_pairs_merge(x: np.ndarray) -> None:
    """Q, K and V read one Q/DQ pair, also where their equal scales have other names."""
    model = _three_readers(["s0", "s0_again", "s0"])
    cleaned = clean_and_compare(model, {"x": x})
    assert Counter(kinds(cleaned)) == {
        "QuantizeLinear": 1,
        "DequantizeLinear": 1,
        "MatMul": 3,
    }


def test_pairs_of_other_scale_do_not_merge(x: np.ndarray) -> None:
    """A pair with another scale is another function."""
    cleaned = clean_and_compare(_three_readers(["s0", "s1", "s0"]), {"x": x})
    assert Counter(kinds(cleaned))["QuantizeLinear"] == 2


def test_equal_nodes_of_other_attributes_do_not_merge(x: np.ndarray) -> None:
    """The same operator on the same input, but with another attribute."""
    model = build(
        [
            helper.make_node("Softmax", ["x"], ["a"], axis=0),
            helper.make_node("Softmax", ["x"], ["b"], axis=1),
            helper.make_node("Sub", ["a", "b"], ["y"]),
        ],
        {},
    )
    assert Counter(kinds(clean_and_compare(model, {"x": x})))["Softmax"] == 2


def test_equal_outputs_both_stay(x: np.ndarray) -> None:
    """Two graph outputs of equal work keep both their names."""
    model = build(
        [
            helper.make_node("Relu", ["x"], ["y"]),
            helper.make_node("Relu", ["x"], ["y2"]),
        ],
        {},
        outputs=("y", "y2"),
    )
    clean_and_compare(model, {"x": x})


def test_unused_nodes_and_initializers_go(x: np.ndarray) -> None:
    """What no output needs goes, and with it what only that needed."""
    model = build(
        [
            helper.make_node("Add", ["x", "c"], ["a"]),
            helper.make_node("Neg", ["a"], ["b"]),
            helper.make_node("Relu", ["x"], ["y"]),
        ],
        {"c": np.float32([1, 1, 1, 1]), "d": np.float32([2])},
    )
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned) == ["Relu"]
    assert initializers(cleaned) == {}


def test_invalid_graph() -> None:
    """A graph ONNX does not know how to read ends in an ExportError."""
    model = build([helper.make_node("Relu", ["nowhere"], ["y"])], {})
    with pytest.raises(ExportError, match="not valid ONNX"):
        clean_graph(model)


def _requantize(
    scales: Sequence[str], *, zero_points: Sequence[str] = ()
) -> onnx.ModelProto:
    """Q/DQ pairs in a row on x, whose last feeds a GEMM and whose first a residual."""
    constants: dict[str, Any] = {
        "s0": np.float32(0.03),
        "s0_again": np.float32(0.03),
        "s1": np.float32(0.07),
        "z": np.int8(0),
        "z_again": np.int8(0),
        "z3": np.int8(3),
        "w": np.random.default_rng(6).normal(size=(4, 4)).astype(np.float32),
    }
    nodes = []
    read = "x"
    for i, scale in enumerate(scales):
        grid = [scale, zero_points[i] if zero_points else "z"]
        nodes += [
            helper.make_node("QuantizeLinear", [read, *grid], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", *grid], [f"d{i}"]),
        ]
        read = f"d{i}"
    nodes += [
        helper.make_node("MatMul", [read, "w"], ["product"]),
        helper.make_node("Add", ["product", "d0"], ["y"]),
    ]
    return build(nodes, constants)


@pytest.mark.parametrize(
    ("scales", "left"),
    [
        (["s0", "s0"], 1),
        (["s0", "s0_again"], 1),
        (["s0", "s0", "s0_again"], 1),
        (["s0", "s1"], 2),
        (["s0", "s1", "s1"], 2),
        (["s0", "s1", "s0"], 3),
    ],
)
def test_requantization_folds(scales: list[str], left: int) -> None:
    """Quantizing again on the same grid goes, bit by bit; on another it stays."""
    # Every value of the grid, halfway points and what saturates.
    x = (np.arange(-300, 300, dtype=np.float32) * np.float32(0.015)).reshape(-1, 4)
    cleaned = clean_and_compare(_requantize(scales), {"x": x})
    counts = Counter(kinds(cleaned))
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == left


@pytest.mark.parametrize(
    ("zero_points", "left"), [(["z", "z_again"], 1), (["z", "z3"], 2), (["z3"] * 2, 1)]
)
def test_requantization_with_other_zero_point_stays(
    zero_points: list[str], left: int
) -> None:
    """The zero point is part of the grid."""
    x = np.linspace(-5, 5, 400, dtype=np.float32).reshape(-1, 4)
    model = _requantize(["s0", "s0"], zero_points=zero_points)
    assert kinds(clean_and_compare(model, {"x": x})).count("QuantizeLinear") == left


def test_requantization_that_is_an_output_stays(x: np.ndarray) -> None:
    """A graph output keeps the node that gives it its name."""
    model = _requantize(["s0", "s0"])
    output = helper.make_tensor_value_info("q1", TensorProto.INT8, [None, None])
    model.graph.output.append(output)
    cleaned = clean_and_compare(model, {"x": x})
    assert kinds(cleaned).count("QuantizeLinear") == 2


def test_repeated_transposes_fold() -> None:
    """Two or three turns are one; a Transpose in between that others read stays."""
    model = build(
        [
            helper.make_node("Transpose", ["x"], ["a"], perm=[1, 2, 0]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
            helper.make_node("Transpose", ["b"], ["c"], perm=[2, 0, 1]),
            helper.make_node("Transpose", ["x"], ["d"]),
            helper.make_node("Transpose", ["d"], ["e"], perm=[0, 2, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
            helper.make_node("Neg", ["e"], ["y2"]),
            helper.make_node("Neg", ["a"], ["y3"]),
        ],
        {},
        outputs=("y", "y2", "y3"),
        rank=3,
    )
    for value in model.graph.output:
        value.type.tensor_type.shape.dim.add()
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    cleaned = clean_and_compare(model, {"x": x})
    # The one without a perm is left as it is.
    assert kinds(cleaned).count("Transpose") == 2 + 2


def test_every_grid_value_survives_requantization() -> None:
    """Why the fold is exact: q * s / s rounds to q for every q and any scale s."""
    rng = np.random.default_rng(8)
    scales = np.exp(rng.uniform(-60, 60, 2000)).astype(np.float32)[:, None]
    integers = np.arange(-128, 128, dtype=np.float32)[None, :]
    found = np.rint((integers * scales) / scales)
    np.testing.assert_array_equal(found, np.broadcast_to(integers, found.shape))


def test_full_graph_keeps_its_function(
    calibrated: Callable[[str], CalibratedReader],
) -> None:
    """All passes on a graph with pairs on residuals and attention change nothing."""
    source = calibrated("bert")
    raw = onnx.load_from_string(source.exported)
    expected = run_onnx(raw, feed := random_feed(source.reader, [24, 17], 24))
    cleaned = clean_graph(raw)
    real = feed[ATTENTION_MASK] == 1
    for left, right in zip(expected, run_onnx(cleaned, feed), strict=True):
        np.testing.assert_allclose(right[real], left[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_exported_graph_keeps_its_function(graphs: Graphs, kind: str) -> None:
    """The tiny BERT answers the same before and after all passes."""
    raw = onnx.load_from_string(getattr(graphs, f"{kind}_raw"))
    cleaned = onnx.load_from_string(getattr(graphs, f"{kind}_clean"))
    feed = random_feed(make_reader("bert"), [24, 17], 24)
    assert len(cleaned.graph.node) < len(raw.graph.node)
    for left, right in zip(run_onnx(raw, feed), run_onnx(cleaned, feed), strict=True):
        real = feed[ATTENTION_MASK] == 1
        np.testing.assert_allclose(right[real], left[real], atol=2e-5, rtol=0)


def test_exported_graph_is_clean(graphs: Graphs) -> None:
    """12 quantized GEMMs on 8 activation pairs; every weight stored as INT8."""
    cleaned = onnx.load_from_string(graphs.quantized_clean)
    counts = Counter(kinds(cleaned))
    constants = initializers(cleaned)
    producers = {node.output[0]: node for node in cleaned.graph.node}
    pairs = {n for n, node in producers.items() if node.op_type == "DequantizeLinear"}
    matmuls = [node for node in cleaned.graph.node if node.op_type == "MatMul"]
    # Per layer: Q, K, V, attention output, two of the feed-forward; and the scores
    # and the context of attention, and the head, in float.
    assert sum(pairs.issuperset(node.input) for node in matmuls) == 12
    assert len(matmuls) == 12 + 2 * 2 + 1
    # Q, K and V share one pair.
    assert counts["QuantizeLinear"] == 2 * 4
    assert counts["DequantizeLinear"] == 2 * 4 + 12
    assert counts["Constant"] == 0
    for node in cleaned.graph.node:
        source = producers.get(node.input[1]) if node.op_type == "MatMul" else None
        if source is not None and source.op_type == "DequantizeLinear":
            weight, scale = constants[source.input[0]], constants[source.input[1]]
            assert weight.dtype == np.int8
            assert scale.shape == (weight.shape[1],)
    assert len(graphs.quantized_clean) < len(graphs.float_clean)
