"""A Q/DQ graph as its edges tell it: what reads which tensor through which pairs.

In: a cleaned graph, and the modules that its nodes may come from. Out: for any tensor
the node that made it and the scales of the Q/DQ pairs on the way. Knows no plan;
remembers which Q/DQ nodes it came by, so that a census can tell the others.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.build.graph import DEQUANTIZE, QUANTIZE
from int8qa.build.projection import module_name
from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Trace:
    """What lies between a reader of a tensor and the node that made it."""

    scales: tuple[float, ...]
    """Of the Q/DQ pairs, first the one next to the source."""
    source: str
    """Name of the module that made the tensor."""
    operator: str
    """Type of the node that made it; empty for a graph input."""
    unsigned: bool = False
    """Whether the pair next to the reader is one of UINT8."""


class Wiring:
    """Nodes by what they make and where they stand; remembers the Q/DQ nodes seen."""

    def __init__(self, model: onnx.ModelProto, modules: AbstractSet[str]) -> None:
        from onnx import numpy_helper

        self._modules = modules
        self.values: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
        }
        self.producers = {
            name: node for node in model.graph.node for name in node.output
        }
        self.by_module: dict[tuple[str, str], list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            key = (self._find_module(node), node.op_type)
            self.by_module.setdefault(key, []).append(node)
        self.seen: set[str] = set()
        self.residual_adds = self._find_residual_adds(model)

    def _find_module(self, node: onnx.NodeProto) -> str:
        """The module a node came from, in whichever of its runs."""
        name = module_name(node) or ""
        once = re.sub(r"_\d+$", "", name)
        return once if name not in self._modules and once in self._modules else name

    def _find_residual_adds(self, model: onnx.ModelProto) -> list[onnx.NodeProto]:
        """Adds whose sum a LayerNormalization reads."""
        found = {}
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                name = node.input[0]
                while (pair := self._pair_input(name)) is not None:
                    name = pair
                add = self.producers.get(name)
                if add is not None and add.op_type == "Add":
                    found[add.output[0]] = add
        return list(found.values())

    def _pair_input(self, name: str) -> str | None:
        """What the Q/DQ pair that makes ``name`` reads; None if no pair does."""
        dequantize = self.producers.get(name)
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            return None
        quantize = self.producers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != QUANTIZE:
            return None
        return str(quantize.input[0])

    def is_dequantized(self, name: str) -> bool:
        """Whether ``name`` is INT8, at most transposed or reshaped."""
        node = self.producers.get(name)
        while node is not None and node.op_type in {"Transpose", "Reshape"}:
            node = self.producers.get(node.input[0])
        return node is not None and node.op_type == DEQUANTIZE

    def trace(self, name: str) -> Trace:
        """Walk from ``name`` back to its source, through what moves or scales values.

        Raises:
            ExportError: a pair on the way is not symmetric INT8 with one scale.
        """
        scales: list[float] = []
        unsigned = False
        while True:
            node = self.producers.get(name)
            if node is None:
                return Trace(tuple(scales[::-1]), "", "", unsigned)
            if node.op_type == DEQUANTIZE:
                read = self._pair_input(name)
                if read is None:
                    break
                scales.append(self._check_pair(node))
                if len(scales) == 1:
                    unsigned = self.values[node.input[2]].dtype == np.uint8
                name = read
            elif node.op_type in {"Transpose", "Reshape"}:
                name = node.input[0]
            elif node.op_type == "Mul" and any(n in self.values for n in node.input):
                # The scaling of scores, or the smoothing of channels.
                name = next(n for n in node.input if n not in self.values)
            else:
                break
        source = self._find_module(node)
        return Trace(tuple(scales[::-1]), source, node.op_type, unsigned)

    def _check_pair(self, dequantize: onnx.NodeProto) -> float:
        quantize = self.producers[dequantize.input[0]]
        grids = [
            tuple(self.values[name] for name in node.input[1:])
            for node in (quantize, dequantize)
        ]
        where = dequantize.name or dequantize.output[0]
        for grid in grids:
            if len(grid) != 2 or any(part.size != 1 for part in grid):
                raise ExportError(f"{where} has not one scale and one zero point")
            if grid[1].dtype.name not in {"int8", "uint8"} or grid[1].item() != 0:
                raise ExportError(
                    f"{where} has zero point {grid[1].item()} ({grid[1].dtype}), not "
                    f"0 (int8, or uint8 for a softmax)"
                )
        if grids[0][1].dtype != grids[1][1].dtype:
            raise ExportError(
                f"{where} quantizes to {grids[0][1].dtype} and dequantizes from "
                f"{grids[1][1].dtype}"
            )
        if grids[0][0].item() != grids[1][0].item():
            raise ExportError(
                f"{where} quantizes by {grids[0][0].item()} and dequantizes by "
                f"{grids[1][0].item()}"
            )
        self.seen |= {quantize.output[0], dequantize.output[0]}
        return float(grids[0][0].item())
