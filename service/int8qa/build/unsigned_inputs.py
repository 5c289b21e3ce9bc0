"""GEMM inputs moved from signed to unsigned INT8, for the instruction that CPUs have.

In: a cleaned graph with Q/DQ pairs. Out: the same function, for OpenVINO: where a pair
feeds nothing but GEMMs with constant weights, 128 steps are added to the tensor before
it is quantized to UINT8, and taken out again in the biases. The integers are those of
the signed grid plus 128; float arithmetic around them rounds its last bit otherwise.

``VPDPBUSD`` (AVX512-VNNI, AVX-VNNI) multiplies unsigned by signed bytes. Given signed
inputs oneDNN adds the 128 itself, to every byte that it loads, inside the kernel: 1.2
times the time (docs/decisions/0026). Source: oneDNN developer guide, Nuances of int8
computations; Intel 64 and IA-32 Software Developer's Manual, VPDPBUSD.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from int8qa.build.graph import DEQUANTIZE, QUANTIZE, check_graph

if TYPE_CHECKING:
    import onnx

SHIFT = 128
"""Steps from the lowest code of INT8 to the lowest of UINT8."""


def shift_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with UINT8 inputs of GEMMs, wherever that is exact.

    A pair that somebody else reads as well stays signed: a residual add, or one of
    attention's GEMMs, whose other operand is no constant.

    Raises:
        ExportError: the graph that results is not valid ONNX.
    """
    import onnx

    shifted = onnx.ModelProto()
    shifted.CopyFrom(model)
    shift = _Shift(shifted)
    for node in list(shifted.graph.node):
        if node.op_type == QUANTIZE:
            shift.try_pair(node)
    check_graph(shifted, "unsigned")
    return shifted


class _Shift:
    """A graph whose pairs are moved one by one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self._graph = model.graph
        self._values: dict[str, npt.NDArray[Any]] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
        }
        self._producers = {n: node for node in model.graph.node for n in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._outputs = {value.name for value in model.graph.output}

    def try_pair(self, quantize: onnx.NodeProto) -> None:
        """Move the pair that begins with ``quantize``, if GEMMs alone read it."""
        pair = self._readers[quantize.output[0]]
        grid = self._find_grid(quantize)
        if grid is None or len(pair) != 1 or pair[0].op_type != DEQUANTIZE:
            return
        dequantize = pair[0]
        name = dequantize.output[0]
        gemms = self._readers[name]
        sums = [
            total for g in gemms if (total := self._sum_weights(g, name)) is not None
        ]
        if name in self._outputs or not gemms or len(sums) < len(gemms):
            return
        offset = SHIFT * grid
        for gemm, total in zip(gemms, sums, strict=True):
            self._add_behind(gemm, (-offset * total).astype(np.float32))
        self._add_before(quantize, np.asarray(offset, np.float32))
        zero = self._name_constant(quantize, "zero", np.zeros((), np.uint8))
        for node in (quantize, dequantize):
            node.input[2] = zero

    def _find_grid(self, quantize: onnx.NodeProto) -> float | None:
        """The scale of a symmetric INT8 grid with one scale."""
        if len(quantize.input) != 3 or quantize.input[0] in self._values:
            return None
        scale, zero = (self._values.get(name) for name in quantize.input[1:])
        if scale is None or zero is None or scale.size != 1 or zero.dtype != np.int8:
            return None
        return float(scale.item()) if zero.item() == 0 else None

    def _sum_weights(
        self, gemm: onnx.NodeProto, name: str
    ) -> npt.NDArray[np.float64] | None:
        """Sums [N] over K of a GEMM's weights [K, N]; None if these are no constants.

        Args:
            gemm: a node that reads ``name``.
            name: its other operand.
        """
        if gemm.op_type != "MatMul" or gemm.input[0] != name:
            return None
        weight = self._producers.get(gemm.input[1])
        if (
            weight is None
            or weight.op_type != DEQUANTIZE
            or any(part not in self._values for part in weight.input)
        ):
            return None
        integers, scale = (self._values[part] for part in weight.input[:2])
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        zeros = [self._values[part] for part in weight.input[2:]]
        if integers.ndim != 2 or (scale.size > 1 and axis % 2 != 1):
            return None
        if any(zero.any() for zero in zeros):
            return None
        totals: npt.NDArray[np.float64] = integers.sum(axis=0, dtype=np.int64) * (
            scale.astype(np.float64).reshape(-1)
        )
        return totals

    def _add_behind(self, gemm: onnx.NodeProto, term: npt.NDArray[np.float32]) -> None:
        """Add ``term`` [N] to what ``gemm`` makes, in its bias if it has its own."""
        readers = self._readers[gemm.output[0]]
        own = gemm.output[0] not in self._outputs
        if own and len(readers) == 1 and readers[0].op_type == "Add":
            add = readers[0]
            for index, name in enumerate(add.input):
                bias = self._values.get(name)
                if bias is not None and bias.shape == term.shape:
                    moved = (bias.astype(np.float64) + term).astype(np.float32)
                    add.input[index] = self._name_constant(add, "bias", moved)
                    return
        made = gemm.output[0]
        gemm.output[0] = f"{made}.shifted"
        name = self._name_constant(gemm, "bias", term)
        self._insert_add(self._find_index(gemm) + 1, gemm.output[0], name, made)

    def _add_before(
        self, quantize: onnx.NodeProto, offset: npt.NDArray[np.float32]
    ) -> None:
        """Let ``quantize`` read its tensor with ``offset`` added."""
        made = f"{quantize.output[0]}.moved"
        name = self._name_constant(quantize, "offset", offset)
        self._insert_add(self._find_index(quantize), quantize.input[0], name, made)
        quantize.input[0] = made

    def _find_index(self, node: onnx.NodeProto) -> int:
        names = (other.output[0] for other in self._graph.node)
        return next(i for i, name in enumerate(names) if name == node.output[0])

    def _insert_add(self, index: int, one: str, other: str, made: str) -> None:
        from onnx import helper

        node = helper.make_node("Add", [one, other], [made], name=f"{made}.add")
        self._graph.node.insert(index, node)

    def _name_constant(
        self, node: onnx.NodeProto, what: str, value: npt.NDArray[Any]
    ) -> str:
        from onnx import numpy_helper

        name = f"{node.output[0]}.{what}"
        self._values[name] = value
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
