"""A Q/DQ graph held, tensor by tensor, to the plan it should follow.

In: a cleaned graph, the plan and the ranges it was made with, and every site of the
model. Out: what is quantized in the graph, found by following its edges; or an error
that names the tensors at which graph and plan differ. Takes nothing from names but the
module of a MatMul, Gather, Softmax or LayerNormalization: pairs merge, and lose theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.build.calibration import Ranges
from int8qa.build.graph import DEQUANTIZE, QUANTIZE
from int8qa.build.projection import INT8_MAX, make_scale
from int8qa.build.quantization import Plan
from int8qa.build.sites import Site, TensorClass
from int8qa.build.wiring import Wiring
from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx

SCALE_TOLERANCE = 1e-6
"""Relative; scales are float32, whose last bit is 1.2e-7 of the value."""


@dataclass(frozen=True, slots=True)
class ClassCensus:
    """Tensors of one class, as the graph has them."""

    sites: int
    quantized: int
    """Sites that read a Q/DQ pair, or an INT8 constant."""
    per_channel: int
    """Of these, weights with one scale per output channel."""


@dataclass(frozen=True, slots=True)
class Census:
    """What a graph holds, counted; written into the manifest."""

    nodes: int
    matmuls: int
    quantized_matmuls: int
    """MatMuls whose two inputs come from a DequantizeLinear, at most transposed or
    reshaped on the way."""
    quantize_nodes: int
    dequantize_nodes: int
    by_class: Mapping[str, ClassCensus]


def take_census(
    model: onnx.ModelProto, plan: Plan, sites: Sequence[Site], ranges: Ranges
) -> Census:
    """Count what ``model`` quantizes, and hold it to ``plan``.

    Args:
        model: a cleaned graph (see graph.clean_graph).
        plan: what it should quantize.
        sites: all of the model, those of ``plan`` among them.
        ranges: ``amax`` of each site of ``plan``.

    Raises:
        ExportError: a tensor is quantized that should not be or the other way round,
            with another scale, zero point, axis or type, or is not to be found.
    """
    graph = Wiring(model, {site.name.rpartition(".")[0] for site in sites})
    inspector = _Inspector(graph, plan, ranges)
    counts: dict[str, list[int]] = {}
    for site in sites:
        count = counts.setdefault(str(site.tensor_class), [0, 0, 0])
        quantized, per_channel = inspector.inspect(site)
        for index, found in enumerate((True, quantized, per_channel)):
            count[index] += found
    faults = inspector.faults
    unknown = sorted(plan.names - {site.name for site in sites})
    faults += [f"{name} is no tensor of this model" for name in unknown]
    faults += [
        f"{node.name or node.output[0]} ({node.op_type}) belongs to no tensor of the "
        f"recipe"
        for node in model.graph.node
        if node.op_type in {QUANTIZE, DEQUANTIZE} and node.output[0] not in graph.seen
    ]
    if faults:
        shown = "; ".join(faults[:3])
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ExportError(
            f"the exported graph differs from the recipe {plan.recipe} at "
            f"{len(faults)} places: {shown}{more}. The exporter or ModelOpt wrote "
            f"another graph than asked for: report this model's architecture"
        )
    kinds = [node.op_type for node in model.graph.node]
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    return Census(
        nodes=len(kinds),
        matmuls=len(matmuls),
        quantized_matmuls=sum(
            all(graph.is_dequantized(name) for name in node.input) for node in matmuls
        ),
        quantize_nodes=kinds.count(QUANTIZE),
        dequantize_nodes=kinds.count(DEQUANTIZE),
        by_class={name: ClassCensus(*count) for name, count in sorted(counts.items())},
    )


class _Inspector:
    """Holds one site after the other to the plan, and collects what differs."""

    def __init__(self, graph: Wiring, plan: Plan, ranges: Ranges) -> None:
        self.faults: list[str] = []
        self._graph = graph
        self._plan = plan
        self._names = plan.names
        self._ranges = ranges

    def inspect(self, site: Site) -> tuple[bool, bool]:
        """Whether the graph quantizes ``site``, and whether per channel."""
        try:
            if site.is_weight:
                return self._inspect_weight(site)
            return self._inspect_activation(site), False
        except ExportError as error:
            self.faults.append(f"{site.place}: {error}")
            return False, False

    def _scale(self, name: str) -> np.ndarray[Any, Any]:
        unsigned = name in self._plan.unsigned
        return make_scale(self._ranges[name], unsigned=unsigned)

    def _inspect_weight(self, site: Site) -> tuple[bool, bool]:
        module = site.name.rpartition(".")[0]
        table = site.tensor_class is TensorClass.EMBEDDING_WEIGHT
        kind, index = ("Gather", 0) if table else ("MatMul", 1)
        found = {
            self._inspect_constant(site, node.input[index], out_axis=0 if table else 1)
            for node in self._nodes(module, kind)
        }
        if len(found) != 1:
            raise ExportError(f"the readers of {module} disagree: one is in float")
        return found.pop()

    def _inspect_constant(
        self, site: Site, name: str, *, out_axis: int
    ) -> tuple[bool, bool]:
        """Hold one constant to the plan.

        Args:
            site: whose weight it is.
            name: as its reader, a MatMul or a Gather, reads it.
            out_axis: axis of the output channels, as that reader sees the weight.
        """
        graph, planned = self._graph, site.name in self._names
        node = graph.producers.get(name)
        if node is not None and node.op_type == "Transpose":
            out_axis = 1 - out_axis
            name = node.input[0]
            node = graph.producers.get(name)
        quantized = node is not None and node.op_type == DEQUANTIZE
        if quantized is not planned:
            has, wants = ("INT8", "float") if quantized else ("float", "INT8")
            raise ExportError(f"{site.name} is {has}, the recipe has it in {wants}")
        if node is None or not quantized:
            if name not in graph.values:
                raise ExportError(f"{site.name} is no constant")
            return False, False
        graph.seen.add(node.output[0])
        if len(node.input) != 3 or any(n not in graph.values for n in node.input):
            raise ExportError(f"{site.name} is not stored as INT8 with its scale")
        weight, scale, zero_point = (graph.values[n] for n in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        _check_grid(site.name, weight, zero_point)
        self._check_scale(
            site.name, scale, axis % 2 == out_axis, weight.shape[out_axis]
        )
        return True, scale.ndim > 0

    def _check_scale(
        self, name: str, scale: np.ndarray[Any, Any], on_axis: bool, channels: int
    ) -> None:
        per_channel = scale.ndim > 0
        if per_channel != self._plan.per_channel[name]:
            has, wants = ("channel", "tensor") if per_channel else ("tensor", "channel")
            raise ExportError(
                f"{name} has a scale per {has}, the recipe one per {wants}"
            )
        if per_channel and not (on_axis and scale.shape == (channels,)):
            raise ExportError(
                f"{name} has {scale.size} scales, not one for each of its {channels} "
                f"output channels"
            )
        wanted = self._scale(name)
        if (
            scale.dtype != np.float32
            or scale.size != wanted.size
            or not np.allclose(
                scale.ravel(), wanted.ravel(), rtol=SCALE_TOLERANCE, atol=0.0
            )
        ):
            raise ExportError(f"{name} has other scales than amax / {INT8_MAX:g}")

    def _inspect_activation(self, site: Site) -> bool:
        path, _, kind = site.name.rpartition(".")
        traces = [self._graph.trace(name) for name in self._read_names(path, kind)]
        for trace in traces:
            before = f"{trace.source}.output_quantizer"
            wanted = [
                float(self._scale(name).item())
                for name in dict.fromkeys((before, site.name))
                if name in self._names
            ]
            if not _agree(_drop_repeats(trace.scales), _drop_repeats(wanted)):
                raise ExportError(
                    f"{site.name} passes Q/DQ pairs with scales "
                    f"{_list_scales(trace.scales)}; the recipe wants "
                    f"{_list_scales(wanted)}"
                )
            if trace.unsigned is not (site.name in self._plan.unsigned):
                has = "unsigned" if trace.unsigned else "signed"
                raise ExportError(
                    f"{site.name} is on a grid of {has} INT8, against the recipe"
                )
        return all(trace.scales for trace in traces)

    def _read_names(self, path: str, kind: str) -> list[str]:
        """Tensors that the readers of a site take in, by the kind of quantizer."""
        if kind == "output_quantizer":
            return self._find_addends(path)
        if kind != "input_quantizer":
            scores, contexts = self._find_attention(path)
            nodes = scores if kind[0] in "qk" else contexts
            return [node.input[0 if kind[0] in "qp" else 1] for node in nodes]
        norms = self._graph.by_module.get((path, "LayerNormalization"), [])
        nodes = norms or self._nodes(path, "MatMul")
        return [node.input[0] for node in nodes]

    def _nodes(self, module: str, kind: str) -> list[onnx.NodeProto]:
        found = self._graph.by_module.get((module, kind))
        if not found:
            raise ExportError(f"the graph has no {kind} of {module}")
        return found

    def _find_addends(self, module: str) -> list[str]:
        """What residual adds read of the output of ``module``."""
        found = [
            name
            for add in self._graph.residual_adds
            for name in add.input
            if self._graph.trace(name).source == module
        ]
        if not found:
            raise ExportError(f"no residual add reads the output of {module}")
        return found

    def _find_attention(
        self, module: str
    ) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """MatMuls that make scores, and those that read probabilities, by run."""
        matmuls = self._nodes(module, "MatMul")
        contexts = [
            n for n in matmuls if self._graph.trace(n.input[0]).operator == "Softmax"
        ]
        scores = [n for n in matmuls if n not in contexts]
        if len(contexts) != len(scores):
            raise ExportError(
                f"{module} has {len(matmuls)} MatMuls, {len(contexts)} of them behind "
                f"a softmax; wanted: every other one"
            )
        return scores, contexts


def _check_grid(
    name: str, weight: np.ndarray[Any, Any], zero_point: np.ndarray[Any, Any]
) -> None:
    """Whether a constant is symmetric INT8."""
    if weight.dtype != np.int8 or zero_point.dtype != np.int8 or zero_point.any():
        raise ExportError(
            f"{name} is {weight.dtype} with zero points of {zero_point.dtype}; wanted: "
            f"int8 with zero points of 0"
        )
    if weight.size and weight.min() < -INT8_MAX:
        raise ExportError(f"{name} holds {weight.min()}, beyond -{INT8_MAX:g}")


def _drop_repeats(scales: Sequence[float]) -> list[float]:
    """Neighbours of equal scale as one: quantizing again changes nothing."""
    return [s for i, s in enumerate(scales) if i == 0 or s != scales[i - 1]]


def _agree(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and np.allclose(
        found, wanted, rtol=SCALE_TOLERANCE, atol=0.0
    )


def _list_scales(scales: Sequence[float]) -> str:
    return ", ".join(f"{scale:.6g}" for scale in scales) or "none"
