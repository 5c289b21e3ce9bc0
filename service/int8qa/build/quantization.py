"""Recipes: which tensors of an encoder become INT8, and on what grid.

In: a float torch reader and a recipe. Out: the same reader with ModelOpt's quantizers
at every tensor that could be quantized, those of the recipe switched on, none
calibrated yet. Recipes speak of tensor classes (sites.py) or of quantizer names.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import heapq
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from int8qa.build.cpu import has_vnni
from int8qa.build.sites import Site, TensorClass
from int8qa.errors import BuildError, RecipeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe; a later rule overrules an earlier one."""

    enable: bool
    tensor_class: TensorClass | None = None
    """Matches every site of this class."""
    pattern: str | None = None
    """Matches quantizer names, as a shell pattern."""
    per_channel: bool | None = None
    """Weights only: one scale per output channel, or one per tensor. None: as the
    recipe says for all."""
    optional: bool = False
    """Whether a model without such tensors is no error."""

    @property
    def subject(self) -> str:
        """What the rule names, for messages."""
        return str(self.tensor_class or self.pattern)

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of ``site``."""
        if self.tensor_class is not None:
            return site.tensor_class is self.tensor_class
        return fnmatch.fnmatchcase(site.name, self.pattern or "")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Tensors that are quantized to symmetric INT8; all others stay in float."""

    name: str
    rules: tuple[Rule, ...]
    per_channel: bool = True
    """Weights: one scale per output channel (else one per tensor)."""
    share_qkv: bool = False
    """One scale for query, key and value, and one for their three weights if these
    have one per tensor: what a fused QKV GEMM needs."""
    unsigned_softmax: bool = True
    """Softmax outputs, which are never negative, on 0 … 255 instead of -127 … 127:
    half the step. For engines that have unsigned INT8; TensorRT has not."""

    def choose(self, sites: Sequence[Site]) -> Plan:
        """The sites this recipe quantizes.

        Raises:
            RecipeError: a rule names tensors that this model does not have, or gives
                an axis to an activation, or the recipe quantizes no GEMM at all.
        """
        grids: dict[str, bool] = {}
        for rule in self.rules:
            matched = [site for site in sites if rule.matches(site)]
            if not matched and not rule.optional:
                raise RecipeError(_explain_unmatched(self, rule, sites))
            if rule.per_channel is not None:
                _check_axis(self, rule, matched)
            for site in matched:
                if not rule.enable:
                    grids.pop(site.name, None)
                    continue
                own = rule.per_channel
                grids[site.name] = site.is_weight and (
                    self.per_channel if own is None else own
                )
        plan = Plan(
            self.name,
            tuple(site for site in sites if site.name in grids),
            grids,
            share_qkv=self.share_qkv,
            unsigned_softmax=self.unsigned_softmax,
        )
        if not any(site.is_weight and site.macs_per_token for site in plan.sites):
            raise RecipeError(
                f"the recipe {self.name} quantizes no GEMM weight of this model, so "
                f"nothing would run in INT8; enable a class such as qkv_weight "
                f"together with qkv_input"
            )
        return plan


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe applied to one model."""

    recipe: str
    sites: tuple[Site, ...]
    """Those that are quantized."""
    per_channel: Mapping[str, bool]
    """By site name."""
    share_qkv: bool = False
    unsigned_softmax: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the quantized sites."""
        return frozenset(site.name for site in self.sites)

    @property
    def unsigned(self) -> frozenset[str]:
        """Names of the sites on an unsigned grid."""
        return frozenset(
            site.name
            for site in self.sites
            if self.unsigned_softmax and site.tensor_class is TensorClass.SOFTMAX
        )

    @property
    def activations(self) -> list[Site]:
        """Sites whose range has to be calibrated."""
        return [site for site in self.sites if not site.is_weight]

    @property
    def quantized_gemms(self) -> int:
        """GEMMs with a weight that run in INT8: both operands are quantized."""
        names = self.names
        return sum(
            site.macs_per_token > 0
            and f"{site.name.rpartition('.')[0]}.input_quantizer" in names
            for site in self.sites
        )

    @property
    def quantized_attentions(self) -> int:
        """Attentions with both GEMMs in INT8: all four operands are quantized."""
        operands = Counter(
            site.layer for site in self.sites if site.tensor_class in _ATTENTION_CLASSES
        )
        return sum(n == len(_ATTENTION_CLASSES) for n in operands.values())

    def describe_grid(self, site: Site) -> str:
        """For people: ``float``, ``INT8``, ``UINT8`` or ``INT8 per channel``."""
        if site.name not in self.names:
            return "float"
        if site.name in self.unsigned:
            return "UINT8"
        return "INT8 per channel" if self.per_channel[site.name] else "INT8"

    def without(self, names: frozenset[str]) -> Plan:
        """The same plan with some sites left in float."""
        kept = tuple(site for site in self.sites if site.name not in names)
        return replace(self, sites=kept)


def join_plans(plans: Sequence[Plan]) -> Plan:
    """All that any of ``plans`` quantizes: what a graph is exported with."""
    names = {name: plan.per_channel[name] for plan in plans for name in plan.names}
    sites = {site.name: site for plan in plans for site in plan.sites}
    return Plan(
        "+".join(plan.recipe for plan in plans),
        tuple(sites.values()),
        names,
        share_qkv=len(plans) == 1 and plans[0].share_qkv,
        # A plan without softmax sites has no say in their grid.
        unsigned_softmax=all(
            plan.unsigned_softmax
            for plan in plans
            if any(site.tensor_class is TensorClass.SOFTMAX for site in plan.sites)
        ),
    )


_GEMM_CLASSES = (
    TensorClass.QKV_INPUT,
    TensorClass.QKV_WEIGHT,
    TensorClass.CONTEXT,
    TensorClass.ATTENTION_OUTPUT_WEIGHT,
    TensorClass.FFN_IN_INPUT,
    TensorClass.FFN_IN_WEIGHT,
    TensorClass.FFN_OUT_INPUT,
    TensorClass.FFN_OUT_WEIGHT,
)
_SOMETIMES = (
    TensorClass.PROJECTION_INPUT,
    TensorClass.PROJECTION_WEIGHT,
    TensorClass.OTHER_INPUT,
    TensorClass.OTHER_WEIGHT,
)
_ATTENTION_CLASSES = (
    TensorClass.QUERY,
    TensorClass.KEY,
    TensorClass.VALUE,
    TensorClass.SOFTMAX,
)
_RESIDUAL_CLASSES = (TensorClass.ATTENTION_RESIDUAL, TensorClass.FFN_RESIDUAL)
_LINEAR_RULES = (
    *(Rule(enable=True, tensor_class=c, optional=True) for c in _GEMM_CLASSES),
    *(Rule(enable=True, tensor_class=c, optional=True) for c in _SOMETIMES),
)

RECIPES: dict[str, Recipe] = {
    # The GEMMs that have weights.
    "linear": Recipe("linear", _LINEAR_RULES),
    # Every GEMM, attention's own as well, as FasterTransformer's mode 1. A model whose
    # attention lets no quantizer in keeps it in float.
    "gemms": Recipe(
        "gemms",
        (
            *_LINEAR_RULES,
            *(
                Rule(enable=True, tensor_class=c, optional=True)
                for c in _ATTENTION_CLASSES
            ),
        ),
    ),
    # Also the residual branches, as FasterTransformer 3.0's mode 2; the other addend
    # stays in float, where it fuses with its GEMM.
    "full": Recipe(
        "full",
        (
            *_LINEAR_RULES,
            *(
                Rule(enable=True, tensor_class=c)
                for c in (*_ATTENTION_CLASSES, *_RESIDUAL_CLASSES)
            ),
        ),
    ),
}
"""By name, each with all that the one before it quantizes. docs/quantization.md has the
table of tensors, and FasterTransformer's modes beside them."""


def choose_default(target: str) -> Recipe:
    """The recipe of a build that names none; see docs/decisions/0025.

    Attention stays in float where its softmax cannot be unsigned: with TensorRT, and on
    CPUs without VNNI.

    Args:
        target: the engine that serves.
    """
    return RECIPES["gemms" if target == "openvino" and has_vnni() else "linear"]


def _explain_unmatched(recipe: Recipe, rule: Rule, sites: Sequence[Site]) -> str:
    """Which rule, and what there is instead."""
    present = {site.tensor_class for site in sites}
    if rule.tensor_class in _ATTENTION_CLASSES and present.isdisjoint(
        _ATTENTION_CLASSES
    ):
        return (
            f"the recipe {recipe.name} quantizes the attention GEMMs ({rule.subject}), "
            f"but this model's attention lets no quantizer in: it does not use "
            f"transformers' attention interface. Use the recipe linear, or one of "
            f"your own without query, key, value and softmax"
        )
    if rule.tensor_class is not None:
        known = sorted(str(tensor_class) for tensor_class in present)
        return (
            f"the recipe {recipe.name} names the tensor class {rule.subject}, which "
            f"this model does not have; it has {', '.join(known)}"
        )
    near = heapq.nlargest(
        3,
        (site.name for site in sites),
        key=lambda name: sum(
            block.size
            for block in difflib.SequenceMatcher(
                None, rule.subject, name, autojunk=False
            ).get_matching_blocks()
        ),
    )
    return (
        f"the recipe {recipe.name} names the pattern {rule.subject!r}, which matches "
        f"none of this model's {len(sites)} quantizers; the nearest are called "
        f"{', '.join(near)} (`int8qa build --explain` lists them all; * stands for any "
        f"characters, dots included)"
    )


def _check_axis(recipe: Recipe, rule: Rule, matched: Sequence[Site]) -> None:
    """Refuse an axis for activations: engines have one scale per tensor there."""
    wrong = [site for site in matched if not site.is_weight]
    if wrong:
        raise RecipeError(
            f"the recipe {recipe.name} gives an axis to {rule.subject!r}, which "
            f"matches {len(wrong)} activations ({wrong[0].name}); an axis is for "
            f"weights. End the pattern in weight_quantizer, or remove the axis"
        )


def insert_quantizers(model: torch.nn.Module) -> int:
    """Put ModelOpt's quantizers into ``model``, in place, all switched off.

    Activations get a histogram collector, so that every calibrator can be derived
    from one pass.

    Returns:
        How many there are.

    Raises:
        BuildError: this model has no GEMM but its head.
    """
    import torch

    gemms = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if all(gemm.out_features == 2 for gemm in gemms):
        raise BuildError(
            "this model has no nn.Linear layers but its head, so there is nothing to "
            "quantize. Supported are BERT-family encoders"
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # ModelOpt prints what it inserts, and warns that it has not been tested with
        # this version of transformers; our parity checks are that test.
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        from int8qa.build.histogram import ActivationHistogram

        activation = {"num_bits": 8, "axis": None, "calibrator": ActivationHistogram}
        rules = [
            {"quantizer_name": "*", "cfg": activation, "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": 8, "axis": 0},
                "enable": False,
            },
        ]
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": None}, forward_loop=None)
    return len(quantizers_by_name(model))


def switch_quantizers(model: torch.nn.Module, plan: Plan) -> None:
    """Switch on what ``plan`` quantizes, and everything else off."""
    names = plan.names
    for name, quantizer in quantizers_by_name(model).items():
        if name in names:
            quantizer.enable()
            if name.endswith("weight_quantizer"):
                quantizer.axis = 0 if plan.per_channel[name] else None
            quantizer.unsigned = name in plan.unsigned
        else:
            quantizer.disable()


@contextlib.contextmanager
def quantizers_off(model: torch.nn.Module) -> Iterator[None]:
    """Run in float for a while."""
    active = [q for q in quantizers_by_name(model).values() if q.is_enabled]
    for quantizer in active:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in active:
            quantizer.enable()


def quantizers_by_name(model: torch.nn.Module) -> dict[str, Any]:
    """ModelOpt's quantizers in ``model``."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    }
