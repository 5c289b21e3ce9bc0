"""The parts of an encoder that move between INT8 and float together.

In: a plan. Out: units, each a GEMM or a residual add of one layer (or of all), with the
sites that decide what it runs in. A GEMM runs in INT8 only if its input and its weight
are quantized, so they are never moved apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from int8qa.build.quantization import Plan
from int8qa.build.sites import Site, TensorClass

KERNELS: dict[TensorClass, str] = {
    TensorClass.EMBEDDING_WEIGHT: "embedding",
    TensorClass.PROJECTION_INPUT: "projection",
    TensorClass.PROJECTION_WEIGHT: "projection",
    TensorClass.QKV_INPUT: "qkv",
    TensorClass.QKV_WEIGHT: "qkv",
    TensorClass.QUERY: "scores",
    TensorClass.KEY: "scores",
    TensorClass.SOFTMAX: "context",
    TensorClass.VALUE: "context",
    TensorClass.CONTEXT: "attention_output",
    TensorClass.ATTENTION_OUTPUT_WEIGHT: "attention_output",
    TensorClass.ATTENTION_OUTPUT: "attention_add",
    TensorClass.ATTENTION_RESIDUAL: "attention_add",
    TensorClass.LAYERNORM_INPUT: "layernorm",
    TensorClass.FFN_IN_INPUT: "ffn_in",
    TensorClass.FFN_IN_WEIGHT: "ffn_in",
    TensorClass.FFN_OUT_INPUT: "ffn_out",
    TensorClass.FFN_OUT_WEIGHT: "ffn_out",
    TensorClass.FFN_OUTPUT: "ffn_add",
    TensorClass.FFN_RESIDUAL: "ffn_add",
    TensorClass.CLASSIFIER_INPUT: "classifier",
    TensorClass.CLASSIFIER_WEIGHT: "classifier",
    TensorClass.OTHER_INPUT: "other",
    TensorClass.OTHER_WEIGHT: "other",
}
"""What reads a tensor of each class: a GEMM, or a residual add."""


UnitGroup = Literal["kernel", "kernel of all layers", "layer", "tensor class"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Sites that are quantized, or left in float, together."""

    name: str
    """``layer 3 ffn_out``, ``all ffn_out``, ``layer 3`` or ``every softmax``."""
    layer: int | None
    """None: of all layers."""
    kernel: str | None
    """None: of all kinds."""
    sites: frozenset[str]
    macs_per_token: int
    """Multiply-accumulates of its weight GEMMs."""
    group: UnitGroup
    """Which units it is to be compared with."""
    tensor_class: str | None = None
    """Of a unit that is one tensor class over all layers."""

    def only(self, plan: Plan) -> Plan:
        """``plan`` with nothing but this unit quantized."""
        return plan.without(plan.names - self.sites)

    def all_but(self, plan: Plan) -> Plan:
        """``plan`` with this unit left in float."""
        return plan.without(self.sites)


def split_units(plan: Plan) -> list[Unit]:
    """One unit per layer and kernel, in the order of the layers."""
    groups: dict[tuple[int | None, str], list[Site]] = {}
    for site in plan.sites:
        kernel = KERNELS[site.tensor_class]
        groups.setdefault((site.layer, kernel), []).append(site)
    return [
        _make_unit(
            kernel if layer is None else f"layer {layer} {kernel}",
            "kernel",
            sites,
            layer=layer,
            kernel=kernel,
        )
        for (layer, kernel), sites in groups.items()
    ]


def kernel_units(plan: Plan) -> list[Unit]:
    """One unit per kernel, over all layers."""
    groups: dict[str, list[Site]] = {}
    for site in plan.sites:
        groups.setdefault(KERNELS[site.tensor_class], []).append(site)
    return [
        _make_unit(f"all {kernel}", "kernel of all layers", sites, kernel=kernel)
        for kernel, sites in groups.items()
    ]


def class_units(plan: Plan) -> list[Unit]:
    """One unit per tensor class, over all layers.

    Of a GEMM this takes input and weight apart: it then runs in float, and what is
    seen is the error of the one tensor.
    """
    groups: dict[TensorClass, list[Site]] = {}
    for site in plan.sites:
        groups.setdefault(site.tensor_class, []).append(site)
    return [
        _make_unit(
            f"every {tensor_class}",
            "tensor class",
            sites,
            tensor_class=str(tensor_class),
        )
        for tensor_class, sites in groups.items()
    ]


def layer_units(plan: Plan) -> list[Unit]:
    """One unit per encoder layer."""
    groups: dict[int, list[Site]] = {}
    for site in plan.sites:
        if site.layer is not None:
            groups.setdefault(site.layer, []).append(site)
    return [
        _make_unit(f"layer {layer}", "layer", sites, layer=layer)
        for layer, sites in sorted(groups.items())
    ]


def _make_unit(
    name: str,
    group: UnitGroup,
    sites: Sequence[Site],
    *,
    layer: int | None = None,
    kernel: str | None = None,
    tensor_class: str | None = None,
) -> Unit:
    return Unit(
        name=name,
        layer=layer,
        kernel=kernel,
        sites=frozenset(site.name for site in sites),
        macs_per_token=sum(site.macs_per_token for site in sites),
        group=group,
        tensor_class=tensor_class,
    )
