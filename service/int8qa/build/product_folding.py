"""Products with constants that stand in TensorRT's way, moved into GEMMs.

In: a cleaned graph, float or with Q/DQ pairs. Out: the same function, changed in place:
the scaling of scores and the smoothing of contexts are part of weights, biases and
scales. Exact but for the last bit of a constant. What cannot be moved stays, and
fusion.py tells of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.build.graph import DEQUANTIZE, QUANTIZE

if TYPE_CHECKING:
    import onnx

_MOVES = frozenset({"Transpose", "Reshape"})


def fold_products(model: onnx.ModelProto) -> None:
    """Move what can be moved; initializers that are read no more stay behind."""
    folding = _Folding(model)
    folding.fold_score_scales()
    folding.fold_context_smoothing()
    folding.drop_bypassed()


@dataclass(frozen=True, slots=True)
class _GemmPath:
    """A GEMM on the way back from a tensor."""

    bias_add: onnx.NodeProto
    bias: int
    """Which input of the Add is the bias."""
    gemm: onnx.NodeProto
    weight: onnx.NodeProto | None
    """Its DequantizeLinear; None for a float weight."""
    pairs: list[onnx.NodeProto]
    """Q/DQ nodes between the Add and the tensor."""


class _Folding:
    """Products with constants, moved into the constants of the GEMM before them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self._graph = model.graph
        self._values: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
        }
        self._producers = {
            name: node for node in model.graph.node for name in node.output
        }
        self._readers: dict[str, int] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers[name] = self._readers.get(name, 0) + 1
        for value in model.graph.output:
            self._readers[value.name] = self._readers.get(value.name, 0) + 1
        self._bypassed: dict[str, str] = {}

    def fold_score_scales(self) -> None:
        """softmax(f Q K' + mask) becomes softmax((f Q) K' + mask), f inside Q's GEMM.

        TensorRT's fused attention wants Q or K scaled before the first product, for
        its numbers as for its speed. A quantized Q has its own scale multiplied too,
        so that its integers stay what they were.

        Source: TensorRT documentation 11, Fused Attention, Note.
        """
        for node in list(self._graph.node):
            product = self._product(node)
            if node.op_type not in {"Mul", "Div"} or product is None:
                continue
            name, factor = product
            scores = self._producers.get(name)
            if (
                factor.size != 1
                or scores is None
                or scores.op_type != "MatMul"
                or self._readers[name] != 1
                or any(read in self._values for read in scores.input)
            ):
                continue
            scale = factor.reshape(())
            path = self._find_gemm(scores.input[0], through_pairs=True)
            if path is not None:
                self._scale_gemm(path, scale)
                self._bypassed[node.output[0]] = name

    def fold_context_smoothing(self) -> None:
        """(P V) * s, channel by channel, becomes P (V * s), s inside V's GEMM.

        SmoothQuant divides the input of the attention output GEMM by channel. Left
        there, the product stands between the second attention product and its
        quantizer. Only where V is float: a quantized V has one scale for all channels.
        """
        for node in list(self._graph.node):
            product = self._product(node)
            if node.op_type != "Mul" or product is None:
                continue
            name, factor = product
            if factor.ndim != 1 or factor.size == 1 or self._readers[name] != 1:
                continue
            context = self._step_back(name)
            if (
                context is None
                or context.op_type != "MatMul"
                or any(read in self._values for read in context.input)
            ):
                continue
            path = self._find_gemm(context.input[1], through_pairs=False)
            if path is not None and self._channels(path) == factor.size:
                self._scale_gemm(path, factor)
                self._bypassed[node.output[0]] = name

    def drop_bypassed(self) -> None:
        """Take out the products that were folded."""
        dead = [n for n in self._graph.node if n.output[0] in self._bypassed]
        for node in dead:
            self._graph.node.remove(node)
        for node in self._graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = self._bypassed.get(name, name)

    def _product(self, node: onnx.NodeProto) -> tuple[str, np.ndarray[Any, Any]] | None:
        """The variable and the constant factor of a Mul, or of a Div by a constant."""
        if node.op_type == "Mul":
            for index in (0, 1):
                if node.input[index] in self._values:
                    return node.input[1 - index], self._values[node.input[index]]
        elif node.op_type == "Div" and node.input[1] in self._values:
            return node.input[0], 1.0 / self._values[node.input[1]]
        return None

    def _step_back(self, name: str) -> onnx.NodeProto | None:
        """The node that made ``name``, behind what only moves values."""
        node = self._producers.get(name)
        while (
            node is not None
            and node.op_type in _MOVES
            and self._readers[node.input[0]] == 1
        ):
            node = self._producers.get(node.input[0])
        return node

    def _find_gemm(self, name: str, *, through_pairs: bool) -> _GemmPath | None:
        """The GEMM with bias that made ``name``, if nobody else reads it on the way."""
        if self._readers[name] != 1:
            return None
        node = self._step_back(name)
        pairs: list[onnx.NodeProto] = []
        while through_pairs and node is not None and node.op_type == DEQUANTIZE:
            pair = self._find_pair(node)
            if pair is None:
                return None
            pairs += pair
            node = self._step_back(pair[1].input[0])
        if node is None or node.op_type != "Add" or self._readers[node.output[0]] != 1:
            return None
        bias = next((i for i in (0, 1) if node.input[i] in self._values), None)
        gemm = None if bias is None else self._producers.get(node.input[1 - bias])
        if bias is None or gemm is None or gemm.op_type != "MatMul":
            return None
        weight = self._producers.get(gemm.input[1])
        folds = gemm.input[1] in self._values or self._is_own_weight(weight)
        if self._readers[gemm.output[0]] != 1 or not folds:
            return None
        return _GemmPath(node, bias, gemm, weight, pairs)

    def _find_pair(
        self, dequantize: onnx.NodeProto
    ) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """The pair that ends in ``dequantize``, if it has one reader all along."""
        quantize = self._producers.get(dequantize.input[0])
        if (
            quantize is None
            or quantize.op_type != QUANTIZE
            or any(self._readers[n.output[0]] != 1 for n in (quantize, dequantize))
            or any(read not in self._values for read in quantize.input[1:])
        ):
            return None
        return dequantize, quantize

    def _is_own_weight(self, node: onnx.NodeProto | None) -> bool:
        """Whether ``node`` dequantizes a constant for one GEMM alone."""
        return (
            node is not None
            and node.op_type == DEQUANTIZE
            and all(read in self._values for read in node.input)
            and self._readers[node.output[0]] == 1
        )

    def _channels(self, path: _GemmPath) -> int:
        """Output channels whose scale can be changed one by one; 0 if they cannot."""
        if path.weight is None:
            return int(self._values[path.gemm.input[1]].shape[-1])
        axis = next((a.i for a in path.weight.attribute if a.name == "axis"), 1)
        scale = self._values[path.weight.input[1]]
        return int(scale.size) if scale.ndim == 1 and axis % 2 == 1 else 0

    def _scale_gemm(self, path: _GemmPath, factor: np.ndarray[Any, Any]) -> None:
        self._scale_input(path.bias_add, path.bias, factor)
        if path.weight is None:
            self._scale_input(path.gemm, 1, factor)
        else:
            self._scale_input(path.weight, 1, factor)
        for node in path.pairs:
            self._scale_input(node, 1, factor)

    def _scale_input(
        self, node: onnx.NodeProto, index: int, factor: np.ndarray[Any, Any]
    ) -> None:
        """Give ``node`` a constant of its own, ``factor`` times what it read."""
        from onnx import numpy_helper

        value = self._values[node.input[index]]
        name = f"{node.output[0]}.scaled_{index}"
        scaled = (value * factor).astype(value.dtype).reshape(value.shape)
        self._values[name] = scaled
        self._graph.initializer.append(numpy_helper.from_array(scaled, name))
        node.input[index] = name
