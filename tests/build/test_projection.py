"""One export stands for all: what is projected equals what would be exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from int8qa.build.calibration import (
    Calibrator,
    Ranges,
    choose_ranges,
    set_ranges,
)
from int8qa.build.export import export_onnx
from int8qa.build.graph import clean_graph
from int8qa.build.projection import QuantizedGraph, module_name, site_name
from int8qa.build.quantization import RECIPES, Plan, switch_quantizers
from int8qa.build.sites import TensorClass
from int8qa.contract import ATTENTION_MASK
from int8qa.errors import ExportError
from int8qa.reader.windows import Window
from tests.build.tiny import (
    ARCHITECTURES,
    CalibratedReader,
    calibrate_reader,
    random_feed,
    run_onnx,
)

Calibrated = Callable[[str], CalibratedReader]
SHARED = {
    TensorClass.QKV_INPUT,
    TensorClass.ATTENTION_RESIDUAL,
    TensorClass.FFN_IN_INPUT,
    TensorClass.FFN_RESIDUAL,
}
"""Classes whose sites read one tensor with others."""


def open_graph(source: CalibratedReader) -> QuantizedGraph:
    return QuantizedGraph(onnx.load_from_string(source.exported), source.plan)


def run(source: CalibratedReader, model: onnx.ModelProto) -> list[Any]:
    """Logits of the real tokens."""
    feed = random_feed(source.reader, [24, 17], 24)
    real = feed[ATTENTION_MASK] == 1
    return [logits[real] for logits in run_onnx(model, feed)]


def differs(left: list[Any], right: list[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_projection_equals_a_direct_export(
    calibrated: Calibrated, windows: list[Window], name: str
) -> None:
    """``full`` projected to ``linear`` is the export of ``linear``, node for node."""
    source = calibrated(name)
    direct = calibrate_reader(name, windows, "linear")
    wanted = clean_graph(onnx.load_from_string(direct.exported))
    found = open_graph(source).project(direct.plan, direct.ranges)
    assert sorted(n.op_type for n in found.graph.node) == sorted(
        n.op_type for n in wanted.graph.node
    )
    assert differs(run(source, found), run(source, wanted)) <= 1e-5


def test_other_ranges(windows: list[Window]) -> None:
    """Other ranges on an old export give what exporting with them would."""
    source = calibrate_reader("bert", windows, "full")
    reader, plan = source.reader, source.plan
    graph = open_graph(source)
    calibrator = Calibrator("percentile", 99.0)
    ranges = choose_ranges(reader.model, plan, source.histograms, calibrator)
    found = graph.project(plan, ranges)
    set_ranges(reader.model, ranges)
    wanted = clean_graph(export_onnx(reader.wrapped, reader.inputs))
    assert len(found.graph.node) == len(wanted.graph.node)
    assert differs(run(source, found), run(source, wanted)) <= 1e-5
    assert differs(run(source, graph.project(plan, source.ranges)), run(source, found))


def test_weights_per_tensor(calibrated: Calibrated) -> None:
    """A per-channel export becomes a per-tensor one by a range that is one number."""
    source = calibrated("bert")
    ranges: Ranges = {n: float(np.max(np.asarray(a))) for n, a in source.ranges.items()}
    found = open_graph(source).project(source.plan, ranges)
    scales = {
        t.name: tuple(t.dims)
        for t in found.graph.initializer
        if t.name.endswith("weight_quantizer.scale")
    }
    assert len(scales) == 12
    assert set(scales.values()) == {()}
    per_channel = open_graph(source).project(source.plan, source.ranges)
    assert differs(run(source, found), run(source, per_channel)) > 0


def test_everything_out_is_the_float_graph(calibrated: Calibrated) -> None:
    """Without any site every pair goes, also those in a row."""
    source = calibrated("bert")
    nothing = source.plan.without(source.plan.names)
    found = open_graph(source).project(nothing, {})
    kinds = {node.op_type for node in found.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    switch_quantizers(source.reader.model, nothing)
    try:
        wanted = export_onnx(source.reader.wrapped, source.reader.inputs)
    finally:
        switch_quantizers(source.reader.model, source.plan)
    assert differs(run(source, found), run(source, clean_graph(wanted))) <= 1e-5


@pytest.mark.parametrize(
    ("gone", "pairs"),
    [
        # Both of a row, its first, its last: GEMM and residual of the FFN.
        ({TensorClass.FFN_IN_INPUT, TensorClass.FFN_RESIDUAL}, 14),
        ({TensorClass.FFN_RESIDUAL}, 16),
        ({TensorClass.FFN_IN_INPUT}, 16),
        # Three pairs hang on one: those of Q, K and V.
        ({TensorClass.QKV_INPUT, TensorClass.ATTENTION_RESIDUAL}, 14),
    ],
    ids=lambda value: (
        "+".join(sorted(map(str, value))) if isinstance(value, set) else ""
    ),
)
def test_chains_of_pairs(
    calibrated: Calibrated, gone: set[TensorClass], pairs: int
) -> None:
    """Out of pairs in a row any can go; the rest reads what the first one read."""
    source = calibrated("bert")
    names = {s.name for s in source.plan.sites if s.tensor_class in gone}
    plan = source.plan.without(frozenset(names))
    model = open_graph(source).project(plan, source.ranges)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == pairs
    switch_quantizers(source.reader.model, plan)
    try:
        exported = export_onnx(source.reader.wrapped, source.reader.inputs)
    finally:
        switch_quantizers(source.reader.model, source.plan)
    assert differs(run(source, model), run(source, clean_graph(exported))) <= 1e-5


def grid(model: onnx.ModelProto, site: str) -> tuple[Any, Any]:
    """Scale and zero point of a site's pair, which both its nodes read."""
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    pair = [
        node
        for node in model.graph.node
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}
        and site_name(node) == site
    ]
    assert {node.op_type for node in pair} == {"QuantizeLinear", "DequantizeLinear"}
    ((scale, zero_point),) = {tuple(node.input[1:]) for node in pair}
    return values[scale], values[zero_point]


@pytest.mark.parametrize("exported_unsigned", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
def test_unsigned_softmax(
    calibrated: Calibrated, unsigned: bool, exported_unsigned: bool
) -> None:
    """Probabilities are UINT8 of amax / 255 or INT8 of amax / 127, whatever the export.

    Everything else is INT8, and the graph runs as torch's fake quantization does.
    """
    source = calibrated("bert")
    model = source.reader.model
    exported_plan, plan = (
        dataclasses.replace(source.plan, unsigned_softmax=value)
        for value in (exported_unsigned, unsigned)
    )
    feed = random_feed(source.reader, [24, 17], 24)
    real = feed[ATTENTION_MASK] == 1
    try:
        switch_quantizers(model, exported_plan)
        exported = export_onnx(source.reader.wrapped, source.reader.inputs)
        switch_quantizers(model, plan)
        fake = [logits[real] for logits in source.reader.run_torch(feed)]
    finally:
        switch_quantizers(model, source.plan)
    graph = QuantizedGraph(exported, exported_plan).project(plan, source.ranges)
    for site in plan.activations:
        if site.tensor_class in SHARED:
            continue  # pairs that merge keep the name of one
        scale, zero_point = grid(graph, site.name)
        softmax = unsigned and site.tensor_class is TensorClass.SOFTMAX
        assert zero_point.dtype == (np.uint8 if softmax else np.int8)
        assert zero_point.item() == 0
        steps = np.float32(255 if softmax else 127)
        assert scale == np.float32(source.ranges[site.name]) / steps
    assert differs(run(source, graph), fake) <= 1e-5


@pytest.mark.parametrize("unsigned", [True, False])
def test_fake_quantization_of_probabilities(
    calibrated: Calibrated, unsigned: bool
) -> None:
    """ModelOpt's quantizer of a softmax and the pair in ONNX Runtime: the same levels."""
    import torch

    source = calibrated("bert")
    plan = dataclasses.replace(source.plan, unsigned_softmax=unsigned)
    (site, *_) = [s for s in plan.sites if s.tensor_class is TensorClass.SOFTMAX]
    scale, zero_point = grid(open_graph(source).project(plan, source.ranges), site.name)
    # Half a step beside every middle between two levels, where rounding is settled,
    # up to twice the range, which is cut off.
    amax = np.float32(source.ranges[site.name])
    values = np.linspace(0.0, 2.0 * amax, 4001, dtype=np.float32)
    steps = values / scale
    values = values[np.abs(steps - np.floor(steps) - 0.5) > 1e-3]
    quantizer = source.reader.model.get_submodule(site.name)
    try:
        switch_quantizers(source.reader.model, plan)
        fake = quantizer(torch.from_numpy(values)).numpy()
    finally:
        switch_quantizers(source.reader.model, source.plan)
    kind = onnx.TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    pair = onnx.helper.make_graph(
        nodes,
        "pair",
        [onnx.helper.make_tensor_value_info("x", kind, values.shape)],
        [onnx.helper.make_tensor_value_info("y", kind, values.shape)],
        [
            onnx.numpy_helper.from_array(np.asarray(array), name)
            for name, array in (("s", scale), ("z", zero_point))
        ],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(pair, opset_imports=opset, ir_version=8)
    (found,) = run_onnx(model, {"x": values})
    np.testing.assert_allclose(found, fake, rtol=1e-6, atol=1e-9)
    assert len(np.unique(np.rint(found / scale))) == (256 if unsigned else 128)
    assert found.max() == pytest.approx(amax, rel=1e-6)


def test_projecting_leaves_the_export_alone(calibrated: Calibrated) -> None:
    """One graph gives any number of projections."""
    source = calibrated("electra")
    graph = open_graph(source)
    linear = RECIPES["linear"].choose(source.sites)
    first = graph.project(source.plan, source.ranges).SerializeToString()
    graph.project(linear, source.ranges)
    assert graph.project(source.plan, source.ranges).SerializeToString() == first


def test_missing_site(calibrated: Calibrated) -> None:
    """A tensor that the exporter left in float is named, and no graph is made."""
    source = calibrated("bert")
    exported = onnx.load_from_string(source.exported)
    for node in exported.graph.node:
        name = site_name(node)
        if name is not None and name.endswith("layer.1.attention.self.p_bmm_quantizer"):
            node.name = "lost"
    with pytest.raises(
        ExportError,
        match=r"at 35 of the 36 .*full.*missing: .*1.*p_bmm_quantizer; not",
    ):
        QuantizedGraph(exported, source.plan)


def test_unasked_site(calibrated: Calibrated) -> None:
    """A pair that the plan does not know is no good export either."""
    source = calibrated("bert")
    plan: Plan = RECIPES["linear"].choose(source.sites)
    with pytest.raises(ExportError, match=r"missing: none; not asked for: bert\."):
        QuantizedGraph(onnx.load_from_string(source.exported), plan)


@pytest.mark.parametrize(
    ("name", "module", "site"),
    [
        ("/model/a/layer.0/b/MatMul", "a.layer.0.b", None),
        ("/model/a/input_quantizer/Cast", "a.input_quantizer", "a.input_quantizer"),
        # The exporter counts the runs of a module that runs again.
        (
            "/model/a/q_bmm_quantizer_12/Cast",
            "a.q_bmm_quantizer_12",
            "a.q_bmm_quantizer",
        ),
        ("/model/a_quantizer_b/Cast", "a_quantizer_b", None),
        ("/model/Split", None, None),
        ("/Mul", None, None),
        ("", None, None),
    ],
)
def test_names(name: str, module: str | None, site: str | None) -> None:
    """Node names tell the module, and the quantizer where it is one."""
    node = onnx.NodeProto(name=name)
    assert (module_name(node), site_name(node)) == (module, site)
