"""Passes over an exported graph that every engine profits from.

In: an ONNX model as the exporter wrote it. Out: the same function in fewer nodes:
constants as initializers, INT8 weights stored as INT8 [K, N] behind one
DequantizeLinear, one Q/DQ pair per tensor and scale. Nothing here changes a result
by more than the rounding it names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx

QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"


def clean_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run all passes and check the result.

    Raises:
        ExportError: the cleaned graph is not valid ONNX.
    """
    graph = _Graph(model)
    graph.lift_constants()
    graph.fold_casts()
    graph.drop_identities()
    graph.fold_quantized_weights()
    graph.fold_transposed_weights()
    graph.fold_requantization()
    graph.fold_repeated_transposes()
    graph.merge_equal_nodes()
    graph.drop_unused()
    check_graph(model, "cleaned")
    return model


def check_graph(model: onnx.ModelProto, kind: str) -> None:
    """Hold a rewritten graph to ONNX's own rules.

    Args:
        model: as it was rewritten.
        kind: what to call it in the error.

    Raises:
        ExportError: it is not valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the {kind} graph is not valid ONNX: {error}") from error


class _Graph:
    """A graph under rewriting: initializers by name, nodes in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        self._read_initializers()

    def _read_initializers(self) -> None:
        from onnx import numpy_helper

        for tensor in self.graph.initializer:
            self.values[tensor.name] = numpy_helper.to_array(tensor)

    def _set_value(self, name: str, array: np.ndarray[Any, Any]) -> None:
        from onnx import numpy_helper

        self.values[name] = array
        self.graph.initializer.append(numpy_helper.from_array(array, name))

    def _remove(self, dead: list[onnx.NodeProto]) -> None:
        for node in dead:
            self.graph.node.remove(node)

    def lift_constants(self) -> None:
        """Constant nodes become initializers."""
        from onnx import numpy_helper

        dead = []
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                array = numpy_helper.to_array(node.attribute[0].t)
                self._set_value(node.output[0], array)
                dead.append(node)
        self._remove(dead)

    def fold_casts(self) -> None:
        """Cast of a constant: ModelOpt writes each zero point that way."""
        from onnx import helper

        dead = []
        for node in self.graph.node:
            if node.op_type == "Cast" and node.input[0] in self.values:
                dtype = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
                self._set_value(
                    node.output[0], self.values[node.input[0]].astype(dtype)
                )
                dead.append(node)
        self._remove(dead)

    def drop_identities(self) -> None:
        """Identity, and Cast to the type a tensor already has.

        One such Cast stands before each Q/DQ. Engines that run part of the graph in
        float16 take it at its word, and then refuse the MatMul of float16 by float32
        behind it. Identities stand for equal initializers, and hide that they are.
        """
        import onnx

        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*inferred.value_info, *inferred.input)
        }
        outputs = {value.name for value in self.graph.output}
        renames: dict[str, str] = {}
        dead = []
        for node in self.graph.node:
            rename_inputs(node, renames)
            idle = node.op_type == "Identity" or (
                node.op_type == "Cast"
                and types.get(node.input[0]) == node.attribute[0].i
            )
            if idle and node.output[0] not in outputs:
                renames[node.output[0]] = node.input[0]
                dead.append(node)
        self._remove(dead)

    def fold_quantized_weights(self) -> None:
        """QuantizeLinear of a constant becomes an INT8 constant.

        Rounds half to even and saturates, as ONNX defines QuantizeLinear, so the
        DequantizeLinear behind it yields the very same values from a quarter of the
        bytes. Source: ONNX operator specification, QuantizeLinear-13.
        """
        dead = []
        for node in self.graph.node:
            if (
                node.op_type != QUANTIZE
                or len(node.input) != 3
                or any(name not in self.values for name in node.input)
            ):
                continue
            weight = self.values[node.input[0]]
            scale = self.values[node.input[1]]
            zero_point = self.values[node.input[2]]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [1] * weight.ndim
            if scale.size > 1:
                shape[axis] = -1
            limits = np.iinfo(zero_point.dtype)
            quantized = np.rint(weight / scale.reshape(shape)) + zero_point.astype(
                np.float32
            ).reshape(shape)
            self._set_value(
                node.output[0],
                np.clip(quantized, limits.min, limits.max).astype(zero_point.dtype),
            )
            dead.append(node)
        self._remove(dead)

    def fold_transposed_weights(self) -> None:
        """Move Transpose(DequantizeLinear(W)) into W, for constant 2-d W."""
        from onnx import helper

        producers = {node.output[0]: node for node in self.graph.node}
        uses = Counter(name for node in self.graph.node for name in node.input)
        uses.update(value.name for value in self.graph.output)
        dead = []
        for node in self.graph.node:
            order = [list(a.ints) for a in node.attribute if a.name == "perm"]
            if node.op_type != "Transpose" or order not in ([], [[1, 0]]):
                continue
            source = producers.get(node.input[0])
            if (
                source is None
                or source.op_type != DEQUANTIZE
                or source.input[0] not in self.values
                or self.values[source.input[0]].ndim != 2
                or uses[source.output[0]] != 1
            ):
                continue
            name = f"{source.input[0]}_transposed"
            self._set_value(name, np.ascontiguousarray(self.values[source.input[0]].T))
            source.input[0] = name
            axis = next((a.i for a in source.attribute if a.name == "axis"), 1)
            del source.attribute[:]
            source.attribute.append(helper.make_attribute("axis", 1 - axis % 2))
            source.output[0] = node.output[0]
            dead.append(node)
        self._remove(dead)

    def fold_requantization(self) -> None:
        """QuantizeLinear of what was just dequantized from the same grid.

        A quantizer on a LayerNorm's output and the same one on the GEMM that reads it
        write Q, DQ, Q, DQ; the second pair changes nothing, and hides from engines
        that GEMM and residual add read one INT8 tensor. Exact: an integer times its
        scale, divided by that scale, is at most one rounding away from the integer.
        """
        producers = {node.output[0]: node for node in self.graph.node}
        outputs = {value.name for value in self.graph.output}
        renames: dict[str, str] = {}
        dead = []
        for node in self.graph.node:
            rename_inputs(node, renames)
            source = producers.get(node.input[0]) if node.input else None
            if (
                node.op_type == QUANTIZE
                and source is not None
                and source.op_type == DEQUANTIZE
                and node.output[0] not in outputs
                and self._grid(node) is not None
                and self._grid(node) == self._grid(source)
            ):
                renames[node.output[0]] = source.input[0]
                dead.append(node)
        self._remove(dead)

    def _grid(self, node: onnx.NodeProto) -> tuple[Any, ...] | None:
        """One scale and zero point, by value; None where they are more, or unknown."""
        if len(node.input) != 3 or any(n not in self.values for n in node.input[1:]):
            return None
        scale, zero_point = (self.values[name] for name in node.input[1:])
        if scale.size != 1:
            return None
        return scale.item(), scale.dtype.str, zero_point.item(), zero_point.dtype.str

    def fold_repeated_transposes(self) -> None:
        """Transpose of a Transpose becomes one.

        The exporter does so itself, but not across a Q/DQ pair that goes later: the
        key's, between the split into heads and the turn for the score GEMM.
        """
        perms: dict[str, tuple[str, list[int]]] = {}
        for node in self.graph.node:
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
            if node.op_type != "Transpose" or not order:
                continue
            if node.input[0] in perms:
                source, first = perms[node.input[0]]
                order = [first[axis] for axis in order]
                node.input[0] = source
                node.attribute[0].ints[:] = order
            perms[node.output[0]] = (node.input[0], order)

    def merge_equal_nodes(self) -> None:
        """One node for equal work: the Q/DQ pairs of Q, K and V read one tensor.

        Runs until nothing changes, because a merged QuantizeLinear makes its
        DequantizeLinears equal.
        """
        outputs = {value.name for value in self.graph.output}
        aliases = self._equal_constants()
        while True:
            seen: dict[tuple[Any, ...], onnx.NodeProto] = {}
            renames: dict[str, str] = {}
            dead = []
            for node in self.graph.node:
                rename_inputs(node, aliases)
                if len(node.output) != 1 or node.output[0] in outputs:
                    continue
                key = (
                    node.op_type,
                    tuple(node.input),
                    tuple(a.SerializeToString() for a in node.attribute),
                )
                if key in seen:
                    renames[node.output[0]] = seen[key].output[0]
                    dead.append(node)
                else:
                    seen[key] = node
            if not dead:
                return
            self._remove(dead)
            aliases = renames

    def _equal_constants(self) -> dict[str, str]:
        """Names of small constants that repeat, each to the first of its kind."""
        first: dict[tuple[Any, ...], str] = {}
        aliases: dict[str, str] = {}
        for name, array in self.values.items():
            if array.nbytes > 1 << 16:
                continue
            key = (array.dtype.str, array.shape, array.tobytes())
            if key in first:
                aliases[name] = first[key]
            else:
                first[key] = name
        return aliases

    def drop_unused(self) -> None:
        """Nodes and initializers that no output needs."""
        needed = {value.name for value in self.graph.output}
        dead = []
        for node in reversed(self.graph.node):
            if any(name in needed for name in node.output):
                needed.update(node.input)
            else:
                dead.append(node)
        self._remove(dead)
        kept: dict[str, Any] = {}
        for tensor in self.graph.initializer:
            if tensor.name in needed:
                kept[tensor.name] = tensor
        tensors = list(kept.values())
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)


def rename_inputs(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let ``node`` read other tensors, those that ``names`` has another name for."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
