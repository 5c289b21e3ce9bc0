"""What the census finds in good graphs, and that it finds every fault in bad ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from int8qa.build.calibration import (
    Calibrator,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.census import Census, take_census
from int8qa.build.export import export_onnx
from int8qa.build.graph import clean_graph
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    Recipe,
    Rule,
    switch_quantizers,
)
from int8qa.build.sites import TensorClass
from int8qa.build.smoothing import smooth_activations
from int8qa.errors import ExportError
from int8qa.reader.windows import Window
from tests.build.tiny import ARCHITECTURES, CalibratedReader, insert_and_find

Calibrated = Callable[[str], CalibratedReader]
BOTH = Recipe(
    "both",
    (
        *RECIPES["full"].rules,
        Rule(enable=True, tensor_class=TensorClass.ATTENTION_OUTPUT),
        Rule(enable=True, tensor_class=TensorClass.FFN_OUTPUT),
    ),
)
"""Both addends of every residual add."""


def project(source: CalibratedReader, plan: Plan) -> onnx.ModelProto:
    graph = QuantizedGraph(onnx.load_from_string(source.exported), source.plan)
    return graph.project(plan, source.ranges)


def count(source: CalibratedReader, model: onnx.ModelProto, plan: Plan) -> Census:
    return take_census(model, plan, source.sites, source.ranges)


@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_good_graphs(calibrated: Calibrated, name: str, recipe: str) -> None:
    """In every architecture the graph has just the tensors that the recipe names."""
    source = calibrated(name)
    plan = RECIPES[recipe].choose(source.sites)
    census = count(source, project(source, plan), plan)
    for tensor_class in {site.tensor_class for site in source.sites}:
        sites = [s for s in source.sites if s.tensor_class is tensor_class]
        planned = sum(s.name in plan.names for s in sites)
        found = census.by_class[str(tensor_class)]
        assert found.sites == len(sites)
        assert found.quantized == planned, tensor_class
        assert found.per_channel == (planned if tensor_class.is_weight else 0)
    gemms = 13 if name == "electra" else 12
    assert census.matmuls == gemms + 2 * 2 + 1
    assert census.quantized_matmuls == gemms + (0 if recipe == "linear" else 4)


def test_pairs_are_shared(calibrated: Calibrated) -> None:
    """Q, K, V and the residual read one pair; so do the FFN's GEMM and residual."""
    source = calibrated("bert")
    census = count(source, project(source, source.plan), source.plan)
    # Per layer: block input, query, key, value, softmax, context, FFN input, GELU.
    assert census.quantize_nodes == 2 * 8
    assert census.dequantize_nodes == 2 * 8 + 12


def test_residual_without_its_gemm(calibrated: Calibrated) -> None:
    """A pair on the residual branch alone is read by the GEMM beside it as well."""
    source = calibrated("bert")
    rule = Rule(enable=False, tensor_class=TensorClass.FFN_IN_INPUT)
    plan = Recipe("a", (*RECIPES["full"].rules, rule)).choose(source.sites)
    census = count(source, project(source, plan), plan)
    assert census.by_class["ffn_in_input"].quantized == 2
    assert census.quantize_nodes == 2 * 8


def test_per_tensor_weights(calibrated: Calibrated) -> None:
    """One scale per weight is counted as such, on the exporter's own graph too."""
    source = calibrated("bert")
    plan = Recipe("a", RECIPES["linear"].rules, per_channel=False).choose(source.sites)
    ranges = {
        name: float(np.max(np.asarray(amax))) for name, amax in source.ranges.items()
    }
    graph = QuantizedGraph(onnx.load_from_string(source.exported), source.plan)
    census = take_census(graph.project(plan, ranges), plan, source.sites, ranges)
    assert census.by_class["qkv_weight"].quantized == 6
    assert census.by_class["qkv_weight"].per_channel == 0


def build_own(
    name: str, windows: list[Window], recipe: Recipe
) -> tuple[CalibratedReader, onnx.ModelProto]:
    """An architecture calibrated and exported by any recipe, and its graph."""
    reader, sites = insert_and_find(name)
    plan = recipe.choose(sites)
    switch_quantizers(reader.model, plan)
    histograms = collect_histograms(reader.wrapped, windows, plan, reader.inputs)
    ranges = choose_ranges(reader.model, plan, histograms, Calibrator("max"))
    set_ranges(reader.model, ranges)
    exported = export_onnx(reader.wrapped, reader.inputs).SerializeToString()
    source = CalibratedReader(reader, sites, plan, histograms, ranges, exported)
    return source, project(source, plan)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_addends(name: str, windows: list[Window]) -> None:
    """A recipe of one's own can have both addends of the residual adds in INT8."""
    source, model = build_own(name, windows, BOTH)
    census = count(source, model, source.plan)
    for tensor_class in ("attention", "ffn"):
        for side in ("output", "residual"):
            assert census.by_class[f"{tensor_class}_{side}"].quantized == 2
    gemms = 13 if name == "electra" else 12
    # ELECTRA's projection reads one more, and writes what layer 0 reads.
    assert census.quantize_nodes == 2 * 10 + gemms - 12
    assert census.dequantize_nodes == census.quantize_nodes + gemms


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_quantized(name: str, windows: list[Window]) -> None:
    """A recipe that names all there is, embeddings and head too, is found in full."""
    recipe = Recipe("all", (Rule(enable=True, pattern="*"),))
    source, model = build_own(name, windows, recipe)
    sites, census = source.sites, count(source, model, source.plan)
    assert census.quantized_matmuls == census.matmuls
    for site in sites:
        found = census.by_class[str(site.tensor_class)]
        assert found.quantized == found.sites, site.place
        assert found.per_channel == (found.sites if site.is_weight else 0)


@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
def test_smoothed_graph(recipe: str, windows: list[Window]) -> None:
    """The smoothing product between a LayerNorm and its GEMM's pair is looked through."""
    reader, sites = insert_and_find("bert")
    for name, module in reader.model.named_modules():
        if name.endswith("LayerNorm"):
            module.weight.data[3] *= 40.0
    plan = RECIPES[recipe].choose(sites)
    switch_quantizers(reader.model, plan)
    alphas = smooth_activations(reader.wrapped, windows, plan, reader.inputs)
    assert any(alphas.values())
    histograms = collect_histograms(reader.wrapped, windows, plan, reader.inputs)
    ranges = choose_ranges(reader.model, plan, histograms, Calibrator("max"))
    set_ranges(reader.model, ranges)
    exported = export_onnx(reader.wrapped, reader.inputs)
    model = QuantizedGraph(exported, plan).project(plan, ranges)
    census = take_census(model, plan, sites, ranges)
    assert census.by_class["qkv_input"].quantized == 6
    residual = census.by_class["attention_residual"]
    assert residual.quantized == (2 if recipe == "full" else 0)


def test_direct_export(calibrated: Calibrated) -> None:
    """The exporter's own scales and types are ours, to the last bits of float32."""
    source = calibrated("roberta")
    cleaned = clean_graph(onnx.load_from_string(source.exported))
    projected = count(source, project(source, source.plan), source.plan)
    assert count(source, cleaned, source.plan) == projected


def _node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


def _find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name.endswith(name))


def _put(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _value(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(
        next(t for t in model.graph.initializer if t.name == name)
    )


def _weight_pair(model: onnx.ModelProto, gemm: str) -> onnx.NodeProto:
    return _node(model, _find(model, f"{gemm}/MatMul").input[1])


def widen_scale(model: onnx.ModelProto) -> None:
    """The scale of the GELU output, a thousandth too wide."""
    dequantize = _node(model, _find(model, "layer.1/output/dense/MatMul").input[0])
    scale = _put(model, "wide", _value(model, dequantize.input[1]) * np.float32(1.001))
    dequantize.input[1] = _node(model, dequantize.input[0]).input[1] = scale


def widen_half_a_pair(model: onnx.ModelProto) -> None:
    """The scale of a DequantizeLinear alone."""
    dequantize = _node(model, _find(model, "layer.1/output/dense/MatMul").input[0])
    scale = _value(model, dequantize.input[1]) * np.float32(2)
    dequantize.input[1] = _put(model, "wide", scale)


def bypass_softmax(model: onnx.ModelProto) -> None:
    """The probabilities in float, as ModelOpt alone leaves them."""
    context = _find(model, "layer.0/attention/self/MatMul_1")
    quantize = _node(model, _node(model, context.input[0]).input[0])
    context.input[0] = quantize.input[0]


def bypass_residual(model: onnx.ModelProto) -> None:
    """A residual add that reads one addend in float."""
    add = _find(model, "layer.1/output/Add")
    norm = "layer.1/attention/output/LayerNorm/LayerNormalization"
    add.input[1] = _find(model, norm).output[0]


def turn_axis(model: onnx.ModelProto) -> None:
    """Scales of a square weight along its input channels."""
    dequantize = _weight_pair(model, "layer.0/attention/self/key")
    dequantize.attribute[0].i = 0


def exchange_scales(model: onnx.ModelProto) -> None:
    """The scales of the key's weight on the query's."""
    query = _weight_pair(model, "layer.0/attention/self/query")
    query.input[1] = _weight_pair(model, "layer.0/attention/self/key").input[1]


def shift_zero_point(model: onnx.ModelProto) -> None:
    """An asymmetric grid."""
    dequantize = _node(model, _find(model, "layer.1/output/dense/MatMul").input[0])
    zero_point = _put(model, "three", np.array(3, np.int8))
    dequantize.input[2] = _node(model, dequantize.input[0]).input[2] = zero_point


def _retype(model: onnx.ModelProto, reader: str, kind: Any) -> None:
    """The pair of the first input of ``reader`` on a grid of another type."""
    dequantize = _node(model, _find(model, reader).input[0])
    zero_point = _put(model, "other_zero", np.array(0, kind))
    dequantize.input[2] = _node(model, dequantize.input[0]).input[2] = zero_point


def unsign_gelu(model: onnx.ModelProto) -> None:
    """A pair of UINT8 where values are negative."""
    _retype(model, "layer.1/output/dense/MatMul", np.uint8)


def unsign_residual(model: onnx.ModelProto) -> None:
    """The same at a pair that the GEMM and the residual add share."""
    _retype(model, "layer.1/intermediate/dense/MatMul", np.uint8)


def sign_softmax(model: onnx.ModelProto) -> None:
    """A pair of INT8 at the probabilities, its scale as for UINT8."""
    _retype(model, "layer.0/attention/self/MatMul_1", np.int8)


def sign_softmax_and_scale(model: onnx.ModelProto) -> None:
    """The probabilities on INT8's whole grid, as if signed had been planned."""
    sign_softmax(model)
    context = _find(model, "layer.0/attention/self/MatMul_1")
    dequantize = _node(model, context.input[0])
    scale = _value(model, dequantize.input[1]) * np.float32(255 / 127)
    scale = np.float32(scale).reshape(())
    name = _put(model, "coarse", np.asarray(scale))
    dequantize.input[1] = _node(model, dequantize.input[0]).input[1] = name


def widen_zero_point(model: onnx.ModelProto) -> None:
    """A grid of 16 bits."""
    _retype(model, "layer.1/output/dense/MatMul", np.int16)


def retype_half_a_pair(model: onnx.ModelProto) -> None:
    """A UINT8 that is read as INT8: from 128 on it would turn negative."""
    context = _find(model, "layer.0/attention/self/MatMul_1")
    dequantize = _node(model, context.input[0])
    dequantize.input[2] = _put(model, "int8_zero", np.array(0, np.int8))


def float_weight(model: onnx.ModelProto) -> None:
    """A weight that stayed in float."""
    gemm = _find(model, "layer.1/intermediate/dense/MatMul")
    gemm.input[1] = _put(model, "float", np.ones((32, 64), np.float32))


def reach_beyond(model: onnx.ModelProto) -> None:
    """A weight that uses -128."""
    dequantize = _weight_pair(model, "layer.0/output/dense")
    weight = _value(model, dequantize.input[0]).copy()
    weight[3, 3] = -128
    dequantize.input[0] = _put(model, "beyond", weight)


def quantize_head(model: onnx.ModelProto) -> None:
    """A pair where the recipe has none."""
    head = _find(model, "qa_outputs/MatMul")
    grid = [_put(model, "s", np.float32(0.1)), _put(model, "z", np.int8(0))]
    index = list(model.graph.node).index(head)
    pair = [
        helper.make_node("QuantizeLinear", [head.input[0], *grid], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *grid], ["dq"]),
    ]
    head.input[0] = "dq"
    for offset, node in enumerate(pair):
        model.graph.node.insert(index + offset, node)


def quantize_mask(model: onnx.ModelProto) -> None:
    """A pair where no tensor of the model stands."""
    softmax = _find(model, "layer.0/attention/self/Softmax")
    grid = [_put(model, "s", np.float32(0.1)), _put(model, "z", np.int8(0))]
    index = list(model.graph.node).index(softmax)
    pair = [
        helper.make_node("QuantizeLinear", [softmax.input[0], *grid], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", *grid], ["dq"], name="DQ"),
    ]
    softmax.input[0] = "dq"
    for offset, node in enumerate(pair):
        model.graph.node.insert(index + offset, node)


def rename_gemm(model: onnx.ModelProto) -> None:
    """A MatMul that cannot be told from others."""
    _find(model, "layer.0/output/dense/MatMul").name = "MatMul"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (widen_scale, r"layer 1 ffn_out_input: .* scales [\d.]+; the recipe wants"),
        (widen_half_a_pair, r"layer 1 ffn_out_input: .* quantizes by .* dequantizes"),
        (bypass_softmax, r"layer 0 softmax: .* scales none; the recipe wants 0\.0"),
        (bypass_residual, r"layer 1 ffn_residual: .* scales none; the recipe wants"),
        (turn_axis, r"layer 0 qkv_weight: .*key.* not one for each of its 32 output"),
        (exchange_scales, r"layer 0 qkv_weight: .*query.* other scales than amax"),
        (shift_zero_point, r"layer 1 ffn_out_input: .* zero point 3 \(int8\)"),
        (unsign_gelu, r"layer 1 ffn_out_input: .* on a grid of unsigned INT8, ag"),
        (unsign_residual, r"at 2 places: .*layer 1 ffn_residual: .* of unsigned INT8"),
        (sign_softmax, r"at 1 places: layer 0 softmax: .* on a grid of signed INT8"),
        (sign_softmax_and_scale, r"at 1 places: layer 0 softmax: .* scales 0\.0"),
        (widen_zero_point, r"layer 1 ffn_out_input: .* zero point 0 \(int16\)"),
        (retype_half_a_pair, r"p_bmm.* quantizes to uint8 and dequantizes from int8"),
        (
            float_weight,
            r"layer 1 ffn_in_weight: .* is float, the recipe has it in INT8",
        ),
        (reach_beyond, r"layer 0 ffn_out_weight: .* holds -128, beyond -127"),
        (quantize_head, r"classifier_input: .* scales 0\.1; the recipe wants none"),
        (
            quantize_mask,
            r"differs from .* full at 2 places: Q \(QuantizeLinear\) belong",
        ),
        (rename_gemm, r"the graph has no MatMul of .*layer\.0\.output\.dense"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_graphs(calibrated: Calibrated, damage: Any, message: str) -> None:
    """One fault in a good graph is found, and named with layer and tensor class."""
    source = calibrated("bert")
    model = project(source, source.plan)
    damage(model)
    with pytest.raises(ExportError, match=message):
        count(source, model, source.plan)


@pytest.mark.parametrize("unsigned", [True, False])
def test_sign_of_the_probabilities(calibrated: Calibrated, unsigned: bool) -> None:
    """A graph with the probabilities on the other grid is not the recipe's."""
    source = calibrated("bert")
    own, other = (
        dataclasses.replace(source.plan, unsigned_softmax=value)
        for value in (unsigned, not unsigned)
    )
    model = project(source, own)
    census = count(source, model, own)
    assert census.by_class["softmax"].quantized == 2
    with pytest.raises(ExportError, match=r"at 2 places: layer 0 softmax: .*layer 1 s"):
        count(source, model, other)


@pytest.mark.parametrize(("graph", "plan"), [("full", "linear"), ("linear", "full")])
def test_other_recipe(calibrated: Calibrated, graph: str, plan: str) -> None:
    """A graph of one recipe is no graph of another."""
    source = calibrated("distilbert")
    model = project(source, RECIPES[graph].choose(source.sites))
    with pytest.raises(
        ExportError, match=rf"recipe {plan} at \d+ places: .*and \d+ more"
    ):
        count(source, model, RECIPES[plan].choose(source.sites))


def test_scales_per_tensor_where_channels_were_asked(calibrated: Calibrated) -> None:
    """The number of scales is held to the recipe as well."""
    source = calibrated("bert")
    rule = Rule(enable=True, tensor_class=TensorClass.QKV_WEIGHT, per_channel=False)
    other = Recipe("a", (*RECIPES["full"].rules, rule)).choose(source.sites)
    model = project(source, source.plan)
    with pytest.raises(ExportError, match="a scale per channel, the recipe one per te"):
        count(source, model, other)
