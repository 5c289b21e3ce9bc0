"""One export stands for all: what is projected equals what would be exported."""

from __future__ import annotations

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
        ({TensorClass.FFN_IN_INPUT, TensorClass.FFN_RESIDUAL}, 18),
        ({TensorClass.FFN_RESIDUAL}, 20),
        ({TensorClass.FFN_IN_INPUT}, 20),
        # Three pairs hang on one: those of Q, K and V.
        ({TensorClass.QKV_INPUT, TensorClass.ATTENTION_RESIDUAL}, 18),
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
        match=r"at 39 of the 40 .*full.*missing: .*1.*p_bmm_quantizer; not",
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
