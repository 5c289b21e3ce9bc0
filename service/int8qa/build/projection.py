"""One exported graph, every quantization of it.

In: an ONNX graph exported with all sites of a plan quantized. Out: the graph of any
smaller plan, with any ranges: Q/DQ pairs taken out, scales set, then cleaned. Trying a
calibrator, a recipe or a layer in float so costs no further export, which takes longer
than all the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.build.calibration import Ranges
from int8qa.build.graph import DEQUANTIZE, QUANTIZE, clean_graph, rename_inputs
from int8qa.build.quantization import Plan
from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx

INT8_MAX = 127.0
"""A symmetric grid uses -127 … 127, so that no value has a partner beyond it."""
UINT8_MAX = 255.0
"""Of a grid for values that are never negative; its zero point is 0 too."""


class QuantizedGraph:
    """An export with Q/DQ pairs, each known by the quantizer it came from."""

    def __init__(self, exported: onnx.ModelProto, plan: Plan) -> None:
        self._bytes = exported.SerializeToString()
        self.plan = plan
        found = {
            name
            for node in exported.graph.node
            if node.op_type == QUANTIZE and (name := site_name(node)) is not None
        }
        self.missing = sorted(plan.names - found)
        """Sites of the plan that have no Q/DQ pair in the export."""
        if self.missing or found - plan.names:
            raise ExportError(
                f"the exported graph has Q/DQ pairs at {len(found)} of the "
                f"{len(plan.names)} tensors that the recipe {plan.recipe} names; "
                f"missing: {', '.join(self.missing[:3]) or 'none'}; not asked for: "
                f"{', '.join(sorted(found - plan.names)[:3]) or 'none'}"
            )

    def project(self, plan: Plan, ranges: Ranges) -> onnx.ModelProto:
        """The cleaned graph in which exactly the sites of ``plan`` are quantized.

        Args:
            plan: a part of the plan the graph was exported with.
            ranges: ``amax`` of each of its sites.
        """
        import onnx

        model = onnx.load_from_string(self._bytes)
        values = _Values(model)
        bypassed: dict[str, str] = {}
        for node in model.graph.node:
            name = site_name(node)
            if name is None:
                continue
            if name not in plan.names:
                if node.op_type in {QUANTIZE, DEQUANTIZE}:
                    # Nodes are in topological order, so a chain of pairs that all
                    # go leads back to the tensor before the first.
                    read = node.input[0]
                    bypassed[node.output[0]] = bypassed.get(read, read)
            elif node.op_type in {QUANTIZE, DEQUANTIZE}:
                unsigned = name in plan.unsigned
                _set_grid(node, ranges[name], values, name, unsigned=unsigned)
        for node in model.graph.node:
            rename_inputs(node, bypassed)
        return clean_graph(model)


class _Values:
    """Adds initializers, one per name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._names: set[str] = set()

    def put(self, name: str, array: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        if name not in self._names:
            self._graph.initializer.append(numpy_helper.from_array(array, name))
            self._names.add(name)
        return name


def make_scale(amax: Any, *, unsigned: bool) -> np.ndarray[Any, Any]:
    """The step of a grid that reaches ``amax``, float32 of its shape."""
    most = UINT8_MAX if unsigned else INT8_MAX
    return np.asarray(amax, np.float32) / np.float32(most)


def _set_grid(
    node: onnx.NodeProto, amax: Any, values: _Values, site: str, *, unsigned: bool
) -> None:
    """Scale and zero point of one Q or DQ node: per tensor, or along axis 0."""
    from onnx import helper

    scale = make_scale(amax, unsigned=unsigned)
    per_channel = scale.ndim > 0
    scale = scale.reshape(-1)
    del node.attribute[:]
    if per_channel:
        node.attribute.append(helper.make_attribute("axis", 0))
    else:
        scale = scale.reshape(())
    node.input[1] = values.put(f"{site}.scale", scale)
    zero = np.zeros(scale.shape, np.uint8 if unsigned else np.int8)
    node.input[2] = values.put(f"{site}.zero_point", zero)


def site_name(node: onnx.NodeProto) -> str | None:
    """The quantizer a node came from, as the model names it; None for others.

    The exporter names nodes by their module, ``/model/bert/encoder/layer.0/…``, and
    counts the runs of one that runs again, as in ALBERT: ``input_quantizer_1``.
    """
    found = _QUANTIZER.fullmatch(module_name(node) or "")
    return None if found is None else found[1]


def module_name(node: onnx.NodeProto) -> str | None:
    """The module of the reader's model that a node came from; None outside of it.

    As the exporter names it: a number is added for each further run of the module.
    """
    parts = node.name.split("/")
    return ".".join(parts[2:-1]) if len(parts) >= 4 else None


_QUANTIZER = re.compile(r"(.*_quantizer)(?:_\d+)?")
