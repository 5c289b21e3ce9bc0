"""Good graphs pass the linter; each kind of damage is found, at its node, by its rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from int8qa.build.fusion import Finding, lint_graph
from int8qa.build.fusion_rules import RULES
from int8qa.build.half_graph import make_half_graph
from tests.build.half import find_node, insert_pair, project, project_half, remove_pair
from tests.build.tiny import CalibratedReader, Graphs

Calibrated = Callable[[str], CalibratedReader]
ATTENTION = "/model/bert/encoder/layer.0/attention"


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule.name for finding in findings]


@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_good_graphs(calibrated: Calibrated, name: str, recipe: str) -> None:
    """What the build gives to TensorRT keeps all rules, in every architecture."""
    assert lint_graph(project_half(calibrated(name), recipe), max_tokens=384) == []


def test_good_float_graph(graphs: Graphs) -> None:
    """A graph without Q/DQ has nothing to find either."""
    half = make_half_graph(onnx.load_from_string(graphs.float_clean))
    assert lint_graph(half, max_tokens=512) == []


def test_pair_before_bias(calibrated: Calibrated) -> None:
    """Bad graph 1: the output of a GEMM quantized before its bias is added."""
    model = project_half(calibrated("bert"), "linear")
    gemm = find_node(model, "MatMul", "layer.1/intermediate/dense")
    insert_pair(model, gemm.output[0], "bad_pair")
    (finding,) = lint_graph(model)
    assert finding.rule is RULES["pair-before-bias"]
    assert finding.node == "bad_pair"
    assert "layer.1/intermediate/dense/MatMul" in finding.detail
    assert "TensorRT issue 3147" in str(finding)


def test_half_quantized_attention(calibrated: Calibrated) -> None:
    """Bad graph 2: softmax left in float between INT8 operands."""
    model = project_half(calibrated("bert"), "full")
    remove_pair(model, "layer.0/attention/self/p_bmm_quantizer")
    found = lint_graph(model)
    assert rules(found) == ["one-sided-gemm", "half-quantized-attention"] or rules(
        found
    ) == ["half-quantized-attention", "one-sided-gemm"]
    attention = next(f for f in found if f.rule.name == "half-quantized-attention")
    assert attention.node == f"{ATTENTION}/self/Softmax"
    assert attention.detail == "softmax in float, the rest in INT8"


def test_pairs_on_both_addends(calibrated: Calibrated) -> None:
    """Bad graph 3: the GEMM's output quantized before the residual add."""
    model = project_half(calibrated("bert"), "full")
    bias = find_node(model, "Add", "layer.0/output/dense")
    insert_pair(model, bias.output[0], "bad_pair")
    (finding,) = lint_graph(model)
    assert finding.rule is RULES["pairs-on-both-addends"]
    assert finding.node == "/model/bert/encoder/layer.0/output/Add"


def test_context_in_float(calibrated: Calibrated) -> None:
    """INT8 attention whose result leaves in float is no INT8 attention."""
    model = project_half(calibrated("bert"), "full")
    remove_pair(model, "layer.1/attention/output/dense/input_quantizer")
    found = {f.rule.name: f for f in lint_graph(model)}
    assert set(found) == {"half-quantized-attention", "one-sided-gemm"}
    assert found["half-quantized-attention"].detail.startswith("context in float")


def test_product_behind_attention(calibrated: Calibrated) -> None:
    """SmoothQuant's product between the second attention product and its quantizer."""
    model = project_half(calibrated("bert"), "full")
    quantize = find_node(model, "QuantizeLinear", "layer.0/attention/output/dense")
    place = list(model.graph.node).index(quantize)
    factor = numpy_helper.from_array(np.full(32, 2, np.float16), "factor")
    model.graph.initializer.append(factor)
    product = helper.make_node(
        "Mul", [quantize.input[0], "factor"], ["smoothed"], name="smoothing"
    )
    quantize.input[0] = "smoothed"
    model.graph.node.insert(place, product)
    (finding,) = lint_graph(model)
    assert (finding.rule.name, finding.node) == (
        "product-behind-attention",
        "smoothing",
    )


def test_scores_scaled_too_late(calibrated: Calibrated) -> None:
    """The graph for CPUs scales scores; TensorRT wants the query scaled."""
    found = lint_graph(project(calibrated("bert"), "linear"))
    assert rules(found) == ["scale-behind-scores"] * 2
    assert found[0].node == f"{ATTENTION}/self/Mul"


def test_guard_in_attention(calibrated: Calibrated) -> None:
    """What other exporters leave between scores and softmax is debris."""
    model = project_half(calibrated("bert"), "linear")
    softmax = find_node(model, "Softmax", "layer.0")
    place = list(model.graph.node).index(softmax)
    node = helper.make_node("Relu", [softmax.input[0]], ["guarded"], name="guard")
    softmax.input[0] = "guarded"
    model.graph.node.insert(place, node)
    (finding,) = lint_graph(model)
    assert (finding.rule.name, finding.node) == ("attention-debris", "guard")


@pytest.mark.parametrize(
    ("side", "missing"), [("weight", "weight"), ("input", "input")]
)
def test_one_sided_gemm(calibrated: Calibrated, side: str, missing: str) -> None:
    """A GEMM with a pair on one side alone runs in float."""
    model = project_half(calibrated("bert"), "linear")
    part = "layer.0/output/dense"
    if side == "input":
        remove_pair(model, f"{part}/input_quantizer")
    else:
        gemm = find_node(model, "MatMul", part)
        array = np.ones((64, 32), np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, "plain"))
        gemm.input[1] = "plain"
    found = lint_graph(model)
    assert rules(found) == ["one-sided-gemm"]
    assert found[0].detail.startswith(f"its {missing} ")


def test_operator_between_pair_and_gemm(calibrated: Calibrated) -> None:
    """A product behind the DequantizeLinear keeps the INT8 from the GEMM."""
    model = project_half(calibrated("bert"), "linear")
    gemm = find_node(model, "MatMul", "layer.0/output/dense")
    place = list(model.graph.node).index(gemm)
    factor = numpy_helper.from_array(np.full(64, 2, np.float16), "factor")
    model.graph.initializer.append(factor)
    node = helper.make_node("Mul", [gemm.input[0], "factor"], ["late"], name="late")
    gemm.input[0] = "late"
    model.graph.node.insert(place, node)
    (finding,) = lint_graph(model)
    assert (finding.rule.name, finding.node) == ("unquantizable-operator", "late")


def test_pair_before_activation(calibrated: Calibrated) -> None:
    """Between a GEMM with its bias and GELU there is no place for a pair."""
    model = project_half(calibrated("bert"), "linear")
    bias = find_node(model, "Add", "layer.0/intermediate/dense")
    insert_pair(model, bias.output[0], "bad_pair")
    assert rules(lint_graph(model)) == ["pair-before-activation"]


def test_pair_that_only_float_reads(calibrated: Calibrated) -> None:
    """A LayerNorm's input quantized gains nothing."""
    model = project_half(calibrated("bert"), "linear")
    add = find_node(model, "Add", "layer.0/attention/output/Add")
    insert_pair(model, add.output[0], "bad_pair")
    (finding,) = lint_graph(model)
    assert finding.rule.name == "pair-without-taker"
    assert finding.detail == "read by LayerNormalization alone"


def test_two_grids(calibrated: Calibrated) -> None:
    """Query, key and value read one tensor: it has one scale."""
    model = project_half(calibrated("bert"), "linear")
    key = find_node(model, "MatMul", "layer.0/attention/self/key")
    back = next(n for n in model.graph.node if key.input[0] in n.output)
    quantize = next(n for n in model.graph.node if back.input[0] in n.output)
    scale = numpy_helper.from_array(np.float16(0.5), "other_scale")
    model.graph.initializer.append(scale)
    pair = [
        helper.make_node(
            "QuantizeLinear",
            [quantize.input[0], "other_scale", quantize.input[2]],
            ["k8"],
        ),
        helper.make_node(
            "DequantizeLinear", ["k8", "other_scale", back.input[2]], ["k"]
        ),
    ]
    place = list(model.graph.node).index(key)
    key.input[0] = "k"
    for node in reversed(pair):
        model.graph.node.insert(place, node)
    assert rules(lint_graph(model)) == ["two-grids"]


@pytest.mark.parametrize("zero", [np.uint8(0), np.int8(3)])
def test_unsigned_or_shifted(calibrated: Calibrated, zero: np.generic) -> None:
    """UINT8 and zero points other than 0 are found."""
    model = project(calibrated("bert"), "linear")
    quantize = find_node(model, "QuantizeLinear", "layer.0/attention/output")
    model.graph.initializer.append(numpy_helper.from_array(zero, "zero"))
    quantize.input[2] = "zero"
    found = [f for f in lint_graph(model) if f.rule.name != "scale-behind-scores"]
    assert rules(found) == ["unsigned-or-shifted"]
    assert str(zero.dtype) in found[0].detail


def test_activation_per_channel(calibrated: Calibrated) -> None:
    """Scales per channel are for weights."""
    model = project(calibrated("bert"), "linear")
    quantize = find_node(model, "QuantizeLinear", "layer.0/attention/output")
    scales = numpy_helper.from_array(np.ones(32, np.float32), "scales")
    model.graph.initializer.append(scales)
    quantize.input[1] = "scales"
    found = [f for f in lint_graph(model) if f.rule.name != "scale-behind-scores"]
    assert rules(found) == ["activation-per-channel"]


def test_attention_shape(calibrated: Calibrated) -> None:
    """Long windows have no INT8 attention kernel; float attention does not mind."""
    full = project_half(calibrated("bert"), "full")
    found = lint_graph(full, max_tokens=1024)
    assert rules(found) == ["attention-shape"] * 2
    assert found[0].detail == "windows of 1024 tokens"
    linear = project_half(calibrated("bert"), "linear")
    assert lint_graph(linear, max_tokens=1024) == []


def test_open_layernorm() -> None:
    """A LayerNorm taken apart is told of, as no obstacle to fusion."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], name="mean", axes=[-1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 1])],
    )
    (finding,) = lint_graph(helper.make_model(graph))
    assert (finding.rule.name, finding.rule.blocks) == ("open-layernorm", False)


def test_every_rule_has_a_source() -> None:
    """A rule nobody stands for is an opinion."""
    for rule in RULES.values():
        assert any(word in rule.source for word in ("TensorRT", "builder"))
        assert rule.advice
