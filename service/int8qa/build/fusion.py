"""Where a Q/DQ pair keeps TensorRT from fusing, found in the graph alone.

In: a graph as TensorRT would get it (half_graph.py), or any ONNX graph with Q/DQ. Out:
findings, each with node, rule and the rule's source. A graph without findings can still
be slow: TensorRT decides by timing. One with findings runs kernels nobody wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from int8qa.build.fusion_rules import (
    HALF_HEAD_SIZES,
    INT8_HEAD_SIZES,
    MAX_INT8_ATTENTION_TOKENS,
    RULES,
    Rule,
)
from int8qa.build.graph import DEQUANTIZE, QUANTIZE

if TYPE_CHECKING:
    import onnx

_MOVES = frozenset({"Transpose", "Reshape"})
_ATTENTION_NODES = 32
"""Nodes looked at before a softmax; one that is no attention's has no product there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a graph departs from a rule."""

    rule: Rule
    node: str
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.node}: {self.rule.name}: {self.detail}. Rule: {self.rule.advice} "
            f"[{self.rule.source}]"
        )


def lint_graph(
    model: onnx.ModelProto, *, max_tokens: int | None = None
) -> list[Finding]:
    """Every place where a Q/DQ pair, or what stands beside it, blocks a fusion.

    Args:
        model: with initializers in it, in topological order.
        max_tokens: longest window the engine takes; None leaves lengths unjudged.

    Returns:
        Findings in the order of the nodes; empty for a graph that keeps all rules.
    """
    linter = _Linter(model, max_tokens)
    found = [finding for node in model.graph.node for finding in linter.inspect(node)]
    return list(dict.fromkeys(found))


class _Linter:
    """One graph, walked by its edges."""

    def __init__(self, model: onnx.ModelProto, max_tokens: int | None) -> None:
        from onnx import numpy_helper

        self._max_tokens = max_tokens
        self._values: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
        }
        self._producers = {
            name: node for node in model.graph.node for name in node.output
        }
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def inspect(self, node: onnx.NodeProto) -> Iterator[Finding]:
        """What is wrong at ``node``."""
        if node.op_type == "MatMul":
            yield from self._inspect_gemm(node)
        elif node.op_type == "Softmax":
            yield from self._inspect_attention(node)
        elif node.op_type == QUANTIZE:
            yield from self._inspect_pair(node)
        elif node.op_type == "Add":
            yield from self._inspect_add(node)
        elif node.op_type == "ReduceMean":
            yield _find("open-layernorm", node, "a mean outside LayerNormalization")
        yield from self._inspect_tensor(node)

    def _inspect_gemm(self, node: onnx.NodeProto) -> Iterator[Finding]:
        sides = [self._is_dequantized(name) for name in node.input]
        if sides[0] is sides[1]:
            return
        index = sides.index(False)
        between = self._find_blocker(node.input[index])
        if between is not None:
            yield _find(
                "unquantizable-operator",
                between,
                f"a {between.op_type} keeps a DequantizeLinear from {_name(node)}",
            )
        else:
            missing = "weight" if node.input[index] in self._values else "input"
            yield _find(
                "one-sided-gemm", node, f"its {missing} {node.input[index]} is float"
            )

    def _find_blocker(self, name: str) -> onnx.NodeProto | None:
        """The one operator that stands between ``name`` and a DequantizeLinear."""
        node = self._producers.get(name)
        if node is None or node.op_type not in {"Mul", "Div", "Add", "Sub"}:
            return None
        variable = [n for n in node.input if n not in self._values]
        reads_pair = len(variable) == 1 and self._is_dequantized(variable[0])
        return node if reads_pair else None

    def _inspect_pair(self, node: onnx.NodeProto) -> Iterator[Finding]:
        scale = self._values.get(node.input[1])
        zero = self._values.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and (zero.dtype != np.int8 or zero.any()):
            yield _find(
                "unsigned-or-shifted",
                node,
                f"zero point {zero.ravel()[0]} of type {zero.dtype}",
            )
        if node.input[0] in self._values:
            return
        if scale is not None and scale.size > 1:
            yield _find("activation-per-channel", node, f"{scale.size} scales")
        source = self._step_back(node.input[0])
        takers = self._takers(node)
        if (
            source is not None
            and source.op_type == "MatMul"
            and self._is_linear(source)
        ):
            if any(taker.op_type == "Add" for taker in takers):
                yield _find("pair-before-bias", node, f"behind {_name(source)}")
        elif self._is_biased(source) and any(
            taker.op_type in {"Div", "Erf", "Gelu", "Relu", "Tanh", "Pow", "Mul"}
            for taker in takers
        ):
            yield _find("pair-before-activation", node, "behind a GEMM and its bias")
        elif takers and not any(t.op_type in {"MatMul", "Add"} for t in takers):
            kinds = ", ".join(sorted({t.op_type for t in takers}))
            if not any(self._find_gemm_behind(taker) for taker in takers):
                yield _find("pair-without-taker", node, f"read by {kinds} alone")

    def _find_gemm_behind(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` is what keeps a pair from a GEMM: told of elsewhere."""
        return node.op_type in {"Mul", "Div", "Sub"} and any(
            reader.op_type == "MatMul"
            for reader in self._readers.get(node.output[0], [])
        )

    def _inspect_tensor(self, node: onnx.NodeProto) -> Iterator[Finding]:
        for name in node.output:
            grids = {
                reader.input[1]: self._values.get(reader.input[1])
                for reader in self._readers.get(name, [])
                if reader.op_type == QUANTIZE and reader.input[0] == name
            }
            scales = {s.tobytes() for s in grids.values() if s is not None}
            if len(scales) > 1:
                yield _find("two-grids", node, f"{len(scales)} scales at its output")

    def _inspect_add(self, node: onnx.NodeProto) -> Iterator[Finding]:
        if all(self._pair_before(name) is not None for name in node.input):
            yield _find("pairs-on-both-addends", node, "both addends come from a pair")

    def _inspect_attention(self, node: onnx.NodeProto) -> Iterator[Finding]:
        scores, between = self._find_scores(node)
        context = self._find_context(node)
        if scores is None or context is None:
            return
        for other in between:
            if other.op_type in {"Mul", "Div"}:
                yield _find(
                    "scale-behind-scores",
                    other,
                    f"between {_name(scores)} and its softmax",
                )
            elif other.op_type not in _MOVES | {"Add", QUANTIZE, DEQUANTIZE}:
                yield _find("attention-debris", other, f"{other.op_type} in attention")
        behind, product = self._find_quantizer(context)
        parts = {
            "query": self._is_dequantized(scores.input[0]),
            "key": self._is_dequantized(scores.input[1]),
            "softmax": self._is_dequantized(context.input[0]),
            "value": self._is_dequantized(context.input[1]),
        }
        if any(parts.values()):
            parts["context"] = behind or product is not None
            missing = [name for name, quantized in parts.items() if not quantized]
            if missing:
                yield _find(
                    "half-quantized-attention",
                    node,
                    f"{', '.join(missing)} in float, the rest in INT8",
                )
            elif product is not None:
                yield _find(
                    "product-behind-attention",
                    product,
                    f"between {_name(context)} and its quantizer",
                )
        yield from self._inspect_shape(node, scores, quantized=any(parts.values()))

    def _inspect_shape(
        self, node: onnx.NodeProto, scores: onnx.NodeProto, *, quantized: bool
    ) -> Iterator[Finding]:
        size = self._find_head_size(scores)
        allowed: Sequence[int] = INT8_HEAD_SIZES if quantized else HALF_HEAD_SIZES
        if size is not None and size not in allowed:
            yield _find("attention-shape", node, f"heads of {size} channels")
        tokens = self._max_tokens
        if quantized and tokens is not None and tokens > MAX_INT8_ATTENTION_TOKENS:
            yield _find("attention-shape", node, f"windows of {tokens} tokens")

    def _find_scores(
        self, softmax: onnx.NodeProto
    ) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
        """The first attention product, and the operators from it to the softmax."""
        pending: list[tuple[str, list[onnx.NodeProto]]] = [(softmax.input[0], [])]
        for _ in range(_ATTENTION_NODES):
            if not pending:
                break
            name, between = pending.pop(0)
            node = self._producers.get(name)
            if node is None:
                continue
            if node.op_type == "MatMul":
                return node, between
            variables = [n for n in node.input if n not in self._values]
            pending += [(n, [*between, node]) for n in variables]
        return None, []

    def _find_context(self, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
        """The second attention product, behind a pair, a dropout or a guard."""
        name = softmax.output[0]
        for _ in range(8):
            readers = [
                n
                for n in self._readers.get(name, [])
                if n.op_type not in {"Shape", "IsNaN"}
            ]
            if not readers:
                return None
            if readers[0].op_type == "MatMul":
                return readers[0]
            name = readers[0].output[0]
        return None

    def _find_quantizer(
        self, context: onnx.NodeProto
    ) -> tuple[bool, onnx.NodeProto | None]:
        """Whether the context is quantized at once, and the product if there is one."""
        name = context.output[0]
        product: onnx.NodeProto | None = None
        for _ in range(6):
            readers = [n for n in self._readers.get(name, []) if n.op_type != "Shape"]
            if any(reader.op_type == QUANTIZE for reader in readers):
                return product is None, product
            if len(readers) != 1 or readers[0].op_type not in _MOVES | {"Mul", "Div"}:
                break
            if readers[0].op_type in {"Mul", "Div"}:
                product = readers[0]
            name = readers[0].output[0]
        return False, None

    def _find_head_size(self, scores: onnx.NodeProto) -> int | None:
        """Channels of one head: the constant that the split into heads ends in."""
        name = scores.input[0]
        for _ in range(8):
            node = self._producers.get(name)
            if node is None:
                return None
            if node.op_type == "Reshape":
                return self._last_constant(node.input[1])
            name = node.input[0]
        return None

    def _last_constant(self, name: str) -> int | None:
        shape = self._values.get(name)
        if shape is None:
            concat = self._producers.get(name)
            last = concat.input[-1] if concat is not None and concat.input else ""
            shape = self._values.get(last)
        if shape is None or not shape.size or int(shape.ravel()[-1]) < 1:
            return None
        return int(shape.ravel()[-1])

    def _step_back(self, name: str) -> onnx.NodeProto | None:
        node = self._producers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self._producers.get(node.input[0])
        return node

    def _is_dequantized(self, name: str) -> bool:
        node = self._step_back(name)
        return node is not None and node.op_type == DEQUANTIZE

    def _pair_before(self, name: str) -> onnx.NodeProto | None:
        """The QuantizeLinear of the pair that makes ``name``; None without a pair."""
        node = self._producers.get(name)
        if node is None or node.op_type != DEQUANTIZE:
            return None
        quantize = self._producers.get(node.input[0])
        return (
            quantize if quantize is not None and quantize.op_type == QUANTIZE else None
        )

    def _takers(self, quantize: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What reads the pair, behind moves; shapes do not count as reading."""
        pending = [quantize.output[0]]
        takers = []
        while pending:
            for node in self._readers.get(pending.pop(), []):
                if node.op_type in _MOVES | {DEQUANTIZE}:
                    pending.append(node.output[0])
                elif node.op_type != "Shape":
                    takers.append(node)
        return takers

    def _is_linear(self, node: onnx.NodeProto) -> bool:
        """Whether a MatMul has a weight, a constant or an INT8 one."""
        name = node.input[1]
        weight = self._step_back(name)
        return name in self._values or (
            weight is not None
            and weight.op_type == DEQUANTIZE
            and self._pair_before(weight.output[0]) is None
        )

    def _is_biased(self, node: onnx.NodeProto | None) -> bool:
        """Whether ``node`` adds a bias to a GEMM."""
        if node is None or node.op_type != "Add":
            return False
        made = [self._producers.get(n) for n in node.input if n not in self._values]
        return len(made) == 1 and made[0] is not None and made[0].op_type == "MatMul"


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _find(rule: str, node: onnx.NodeProto, detail: str) -> Finding:
    return Finding(RULES[rule], _name(node), detail)
