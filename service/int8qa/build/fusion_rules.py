"""What a Q/DQ graph keeps to so that TensorRT can fuse it, and who says so.

In: nothing. Out: rules by name, each with advice and source, and the shapes TensorRT
has attention kernels for. Data alone; fusion.py holds graphs to it.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_INT8_ATTENTION_TOKENS = 512
INT8_HEAD_SIZES = (16, 32, 64)
HALF_HEAD_SIZES = range(16, 257, 8)
"""Source of the three: rule ``attention-shape``."""

_GUIDE = "TensorRT documentation 11, Explicit Quantization, "
_PLACEMENT = _GUIDE + "Q/DQ Layer-Placement Recommendations"
_ATTENTION = "TensorRT developer guide 10, MHA fusion; TensorRT issues 2981, 4167"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a graph should keep to, and who says so."""

    name: str
    advice: str
    source: str
    blocks: bool = True
    """False: costs time or accuracy, but stands in the way of no fusion."""


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "one-sided-gemm",
            "quantize both inputs of a GEMM or neither; with one it runs in float, and "
            "the pair costs a kernel",
            _PLACEMENT
            + ", Quantize all inputs of weighted operations; Model-Optimizer "
            "issue 159",
        ),
        Rule(
            "pair-before-bias",
            "no pair between a GEMM and its bias: product, bias and activation leave "
            "in one kernel only if nothing stands between them",
            _PLACEMENT + ", By default, do not quantize the outputs of weighted "
            "operations; TensorRT issue 3147",
        ),
        Rule(
            "pair-before-activation",
            "no pair between a GEMM and its GELU, for the same reason",
            _PLACEMENT + ", By default, do not quantize the outputs of weighted "
            "operations",
        ),
        Rule(
            "pairs-on-both-addends",
            "in a residual add quantize the residual alone: a second pair keeps the "
            "GEMM and the add apart",
            _PLACEMENT + ", Quantize the residual input in skip-connections",
        ),
        Rule(
            "half-quantized-attention",
            "quantize query, key, value, softmax and the context, or none of them: a "
            "part of them gives neither the INT8 kernel nor the float one",
            _ATTENTION + "; TensorRT issues 4073, 4058",
        ),
        Rule(
            "product-behind-attention",
            "nothing but moves between the second attention product and its quantizer: "
            "leave `context` out of smoothing, or its value in float, where the "
            "product folds into the value GEMM",
            _ATTENTION,
        ),
        Rule(
            "scale-behind-scores",
            "scale the query before the first attention product, not the scores "
            "behind it",
            "TensorRT documentation 11, Fused Attention, Note",
        ),
        Rule(
            "attention-debris",
            "no guards against NaN between scores and context: Where, IsNaN and their "
            "like are no part of the attention TensorRT knows",
            "TensorRT documentation 11, Fused Attention; docs/decisions/0002",
        ),
        Rule(
            "attention-shape",
            "INT8 attention has kernels for heads of 16, 32 and 64 channels and up to "
            "512 tokens; float ones for heads of 16 to 256 channels, multiples of 8",
            _ATTENTION + "; TensorRT issue 3714",
        ),
        Rule(
            "unquantizable-operator",
            "only what commutes with a scale may stand between a DequantizeLinear and "
            "its GEMM: Transpose and Reshape do",
            _GUIDE + "Processing of Q/DQ Networks",
        ),
        Rule(
            "pair-without-taker",
            "no pair that only float operators read: it rounds, costs a kernel, and "
            "gains nothing",
            _GUIDE + "Processing of Q/DQ Networks; TensorRT issue 4073",
        ),
        Rule(
            "two-grids",
            "one scale for all readers of a tensor: with two, query, key and value "
            "GEMMs cannot be joined, and the tensor is quantized twice",
            _PLACEMENT + "; FasterTransformer 5.3, quant_utils.py, fuse_qkv",
        ),
        Rule(
            "unsigned-or-shifted",
            "signed INT8 with zero point 0: TensorRT has nothing else",
            "TensorRT 11.1, NvInfer.h, IQuantizeLayer",
        ),
        Rule(
            "activation-per-channel",
            "one scale per activation tensor; scales per channel are for weights",
            "TensorRT 11.1, NvInfer.h, IQuantizeLayer",
        ),
        Rule(
            "open-layernorm",
            "LayerNormalization as one operator (opset 17): taken apart it may "
            "overflow in float16",
            "TensorRT issues 2466, 2564; the builder's own warning",
            blocks=False,
        ),
    )
}
