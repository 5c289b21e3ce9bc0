"""Graphs for TensorRT's tests: half graphs of tiny readers, and damage done to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from int8qa.build import pipeline, plans
from int8qa.build.engines.tensorrt import BuiltPlan
from int8qa.build.engines.tensorrt_census import NetworkCensus
from int8qa.build.engines.tensorrt_lock import EngineLock
from int8qa.build.engines.tensorrt_options import PlanOptions
from int8qa.build.graph import clean_graph
from int8qa.build.half_graph import make_half_graph
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import RECIPES, Plan
from tests.build.tiny import CalibratedReader

TENSORRT_RTX = (
    "TensorRT-RTX is not here: pip install tensorrt-rtx (Linux, no GPU needed)"
)


def sign(plan: Plan) -> Plan:
    """The plan with softmax on the signed grid, as TensorRT needs it."""
    return dataclasses.replace(plan, unsigned_softmax=False)


def project(source: CalibratedReader, recipe: str, **changes: Any) -> onnx.ModelProto:
    """The float32 Q/DQ graph of a built-in recipe, with signed softmax."""
    exported = QuantizedGraph(onnx.load_from_string(source.exported), source.plan)
    chosen = dataclasses.replace(RECIPES[recipe], unsigned_softmax=False, **changes)
    plan = chosen.choose(source.sites)
    return exported.project(plan, {name: source.ranges[name] for name in plan.names})


def project_half(source: CalibratedReader, recipe: str) -> onnx.ModelProto:
    """What TensorRT gets."""
    return make_half_graph(project(source, recipe))


def float_graph(raw: bytes) -> onnx.ModelProto:
    """The cleaned float32 graph."""
    return clean_graph(onnx.load_from_string(raw))


def find_node(model: onnx.ModelProto, op_type: str, part: str) -> onnx.NodeProto:
    """The first node of a type whose name holds ``part``."""
    return next(n for n in model.graph.node if n.op_type == op_type and part in n.name)


def insert_pair(model: onnx.ModelProto, tensor: str, name: str) -> None:
    """Put a Q/DQ pair behind ``tensor``, for all its readers."""
    scale = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    nodes = list(model.graph.node)
    place = next(i for i, n in enumerate(nodes) if tensor in n.output) + 1
    for node in nodes:
        for index, read in enumerate(node.input):
            if read == tensor:
                node.input[index] = f"{name}.out"
    pair = [
        helper.make_node(
            "QuantizeLinear", [tensor, *scale.input[1:]], [f"{name}.int8"], name=name
        ),
        helper.make_node(
            "DequantizeLinear",
            [f"{name}.int8", *scale.input[1:]],
            [f"{name}.out"],
            name=f"{name}.back",
        ),
    ]
    for offset, node in enumerate(pair):
        model.graph.node.insert(place + offset, node)


def remove_pair(model: onnx.ModelProto, part: str) -> None:
    """Take out the first Q/DQ pair whose name holds ``part``."""
    quantize = find_node(model, "QuantizeLinear", part)
    back = next(n for n in model.graph.node if quantize.output[0] in n.input)
    for node in model.graph.node:
        for index, read in enumerate(node.input):
            if read == back.output[0]:
                node.input[index] = quantize.input[0]
    model.graph.node.remove(quantize)
    model.graph.node.remove(back)


def install_builder(
    monkeypatch: pytest.MonkeyPatch, quantized_gemms: int = 16
) -> list[PlanOptions]:
    """Put a builder in TensorRT's place whose plans are the ONNX graphs it is given.

    Args:
        monkeypatch: puts everything back.
        quantized_gemms: that its networks have, if there is a quantizer in them.

    Returns:
        What it was told, filled as it builds.
    """
    told: list[PlanOptions] = []
    lock = EngineLock("tensorrt", "10.13.3.9", None, ("sm89",), gpu="NVIDIA L4")

    def build(
        model: Any, directory: Path, profiles: Any, options: PlanOptions, on_step: Any
    ) -> BuiltPlan:
        told.append(options)
        on_step("Tactics", 1, 2)
        path = directory / "model.plan"
        path.write_bytes(model.SerializeToString())
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        census = NetworkCensus(
            library="10.13.3.9",
            layers=99,
            strongly_typed=True,
            gemms={"int8": quantized_gemms if quantized else 0, "half": 1},
            softmaxes={},
            normalizations={},
            other_gemms=(),
            inputs={"input_ids": "INT32 (-1, -1)"},
            outputs={"start_logits": "FLOAT (-1, -1)", "end_logits": "FLOAT (-1, -1)"},
        )
        size = path.stat().st_size
        return BuiltPlan(path, size, 60.04, tuple(profiles), None, census)

    monkeypatch.setattr(plans, "build_plan", build)
    monkeypatch.setattr(plans, "read_builder_lock", lambda options: lock)
    monkeypatch.setattr(pipeline, "check_builder", lambda options: None)
    return told
