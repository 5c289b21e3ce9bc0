"""The graph TensorRT gets: every type written down, float16 around the INT8.

In: a cleaned float32 graph, with or without Q/DQ pairs (see graph.py, projection.py).
Out: the same function with float16 weights, scales and activations, int32 inputs and
float32 logits, scores scaled and channels smoothed inside constants where that is
exact. Strong typing does the rest: what the graph says is what runs. Knows no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from int8qa.build.graph import DEQUANTIZE, QUANTIZE
from int8qa.build.product_folding import fold_products
from int8qa.errors import ExportError

if TYPE_CHECKING:
    import onnx

OPSET = 19
"""First opset whose QuantizeLinear and DequantizeLinear take float16 scales."""
IR_VERSION = 9
"""ONNX 1.14's, the release that brought opset 19."""
HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
"""Smallest positive float16. TensorRT refuses a scale of 0."""


def make_half_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in float16, its INT8 parts untouched.

    LayerNormalization keeps ONNX's ``stash_type`` of 1: mean and variance are computed
    in float32. Softmax is given float16 and reduces in float32 in TensorRT's kernels.
    A scale rounded to float16 moves a grid by at most 1/2048 of its step.

    Raises:
        ExportError: the graph has unsigned INT8, a weight beyond float16, or an
            operator whose meaning changed between its opset and the one needed.
    """
    import onnx

    half = onnx.ModelProto()
    half.CopyFrom(model)
    _refuse_unsigned(half)
    fold_products(half)
    _raise_opset(half)
    _halve_constants(half)
    _halve_casts(half)
    _widen_outputs(half)
    del half.graph.value_info[:]
    try:
        onnx.checker.check_model(half)
        # Strict: a Mul of float16 by float32 is found here, with its node's name.
        onnx.shape_inference.infer_shapes(half, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the float16 graph is not valid ONNX: {error}") from error
    return half


def _refuse_unsigned(model: onnx.ModelProto) -> None:
    """TensorRT quantizes to signed INT8 only. Source: NvInfer.h, IQuantizeLayer."""
    import onnx

    unsigned = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8
    }
    found = [
        node.name or node.output[0]
        for node in model.graph.node
        if node.op_type in {QUANTIZE, DEQUANTIZE} and unsigned & set(node.input)
    ]
    if found:
        raise ExportError(
            f"TensorRT has no unsigned INT8, and the graph has {len(found)} such "
            f"nodes ({found[0]}): build with a recipe that says "
            f"`unsigned_softmax: false`"
        )


def _raise_opset(model: onnx.ModelProto) -> None:
    """Declare opset 19, if every operator but Q and DQ means there what it meant."""
    from onnx import defs

    domain = next(entry for entry in model.opset_import if not entry.domain)
    changed = sorted(
        {
            node.op_type
            for node in model.graph.node
            if node.op_type not in _COMPATIBLE
            and defs.get_schema(node.op_type, domain.version).since_version
            != defs.get_schema(node.op_type, OPSET).since_version
        }
    )
    if changed:
        raise ExportError(
            f"opset {OPSET} gives {', '.join(changed)} another meaning than opset "
            f"{domain.version}, with which the graph was exported; export with opset "
            f"17, or report this architecture"
        )
    domain.version = max(domain.version, OPSET)
    model.ir_version = max(model.ir_version, IR_VERSION)


_COMPATIBLE = frozenset(
    # Revised between opsets 17 and 19 for new types and optional attributes alone;
    # Split reads its sizes from its second input, as before.
    {QUANTIZE, DEQUANTIZE, "Cast", "Identity", "Reshape", "Shape", "Split", "Equal"}
)


def _halve_constants(model: onnx.ModelProto) -> None:
    """Float32 initializers become float16; unused ones go."""
    import onnx
    from onnx import numpy_helper

    used = {name for node in model.graph.node for name in node.input}
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in {QUANTIZE, DEQUANTIZE}
    }
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name not in used:
            continue
        if tensor.data_type != onnx.TensorProto.FLOAT:
            kept.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        largest = float(np.abs(array).max(initial=0.0))
        if not largest <= HALF_MAX:
            raise ExportError(
                f"{tensor.name} holds {largest:g}, beyond float16's {HALF_MAX:g}: this "
                f"checkpoint cannot run in FP16, nor in INT8 with FP16 around it"
            )
        if tensor.name in scales:
            array = np.maximum(array, np.float32(HALF_TINY))
        kept.append(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _halve_casts(model: onnx.ModelProto) -> None:
    """Casts of integers to float32 give float16."""
    import onnx

    for node in model.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT:
            node.attribute[0].i = onnx.TensorProto.FLOAT16


def _widen_outputs(model: onnx.ModelProto) -> None:
    """Logits leave in float32, as the contract has them."""
    import onnx
    from onnx import helper

    for value in model.graph.output:
        half = f"{value.name}.half"
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == value.name:
                        names[index] = half
        model.graph.node.append(
            helper.make_node(
                "Cast", [half], [value.name], name=value.name, to=onnx.TensorProto.FLOAT
            )
        )
