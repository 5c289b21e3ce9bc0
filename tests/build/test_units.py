"""Units part a plan so that every GEMM keeps its input and its weight together."""

from __future__ import annotations

from collections import Counter

import pytest

from int8qa.build.quantization import RECIPES, Plan, Recipe, Rule
from int8qa.build.sites import Site, TensorClass
from int8qa.build.units import (
    KERNELS,
    class_units,
    kernel_units,
    layer_units,
    split_units,
)
from tests.build.tiny import ARCHITECTURES, insert_and_find

EVERY = [(name, recipe) for name in ARCHITECTURES for recipe in RECIPES]
GEMM_KERNELS = {"qkv", "attention_output", "ffn_in", "ffn_out"}
FLOAT_KERNELS = {"scores", "context", "attention_add", "ffn_add"}
HIDDEN = 32
BOTH = Recipe(
    "both",
    (
        *RECIPES["full"].rules,
        Rule(enable=True, tensor_class=TensorClass.ATTENTION_OUTPUT),
        Rule(enable=True, tensor_class=TensorClass.FFN_OUTPUT),
    ),
)
"""Both addends of every residual add."""


@pytest.fixture(scope="module")
def sites() -> dict[str, list[Site]]:
    return {name: insert_and_find(name)[1] for name in ARCHITECTURES}


def is_whole(plan: Plan) -> bool:
    """Whether every weight is quantized together with what it is multiplied by."""
    return all(
        f"{name.rpartition('.')[0]}.input_quantizer" in plan.names
        for name in plan.names
        if name.endswith("weight_quantizer")
    )


def test_every_class_has_a_kernel() -> None:
    """A tensor class without a kernel would break the first plan that names it."""
    assert KERNELS.keys() == set(TensorClass)


@pytest.mark.parametrize(("name", "recipe"), EVERY)
def test_units_are_a_partition(
    sites: dict[str, list[Site]], name: str, recipe: str
) -> None:
    """Each site is in one unit of layer and kernel, in one kernel, in one class."""
    plan = RECIPES[recipe].choose(sites[name])
    for units in (split_units(plan), kernel_units(plan), class_units(plan)):
        assert sorted(site for unit in units for site in unit.sites) == sorted(
            plan.names
        )
        assert sum(unit.macs_per_token for unit in units) == sum(
            site.macs_per_token for site in plan.sites
        )
        assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize(("name", "recipe"), EVERY)
def test_only_and_all_but(sites: dict[str, list[Site]], name: str, recipe: str) -> None:
    """The two halves make up the plan, and no GEMM is torn apart by either."""
    plan = RECIPES[recipe].choose(sites[name])
    for unit in [*split_units(plan), *kernel_units(plan), *layer_units(plan)]:
        only, all_but = unit.only(plan), unit.all_but(plan)
        assert only.names == unit.sites
        assert all_but.names == plan.names - unit.sites
        assert is_whole(only)
        assert is_whole(all_but)
        assert only.quantized_gemms + all_but.quantized_gemms == plan.quantized_gemms


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operands_are_one_unit(sites: dict[str, list[Site]], name: str) -> None:
    """What one GEMM or one add reads goes together, as far as a recipe has it."""
    classes = {site.name: site.tensor_class for site in sites[name]}
    units = split_units(BOTH.choose(sites[name]))
    found = {unit.kernel: {classes[site] for site in unit.sites} for unit in units}
    for kernel, operands in {
        "scores": {TensorClass.QUERY, TensorClass.KEY},
        "context": {TensorClass.SOFTMAX, TensorClass.VALUE},
        "attention_add": {
            TensorClass.ATTENTION_OUTPUT,
            TensorClass.ATTENTION_RESIDUAL,
        },
        "ffn_add": {TensorClass.FFN_OUTPUT, TensorClass.FFN_RESIDUAL},
        "attention_output": {TensorClass.CONTEXT, TensorClass.ATTENTION_OUTPUT_WEIGHT},
    }.items():
        assert found[kernel] == operands
    units = split_units(RECIPES["full"].choose(sites[name]))
    found = {unit.kernel: {classes[site] for site in unit.sites} for unit in units}
    assert found["attention_add"] == {TensorClass.ATTENTION_RESIDUAL}
    assert found["ffn_add"] == {TensorClass.FFN_RESIDUAL}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_of_a_layer(sites: dict[str, list[Site]], name: str) -> None:
    """Linear has four kernels a layer, full another four; both layers alike."""
    outside = {"projection"} if name == "electra" else set()
    for recipe, kernels in (
        ("linear", GEMM_KERNELS),
        ("full", GEMM_KERNELS | FLOAT_KERNELS),
    ):
        plan = RECIPES[recipe].choose(sites[name])
        found = {(unit.layer, unit.kernel) for unit in split_units(plan)}
        assert found == {(n, kernel) for n in (0, 1) for kernel in kernels} | {
            (None, kernel) for kernel in outside
        }
        assert {unit.kernel for unit in kernel_units(plan)} == kernels | outside


def test_work_of_a_unit(sites: dict[str, list[Site]]) -> None:
    """Multiply-accumulates per token are those of its weight GEMMs."""
    plan = RECIPES["full"].choose(sites["bert"])
    macs = {unit.name: unit.macs_per_token for unit in split_units(plan)}
    square = HIDDEN * HIDDEN
    assert macs["layer 1 qkv"] == 3 * square
    assert macs["layer 1 attention_output"] == square
    assert macs["layer 1 ffn_in"] == macs["layer 1 ffn_out"] == 2 * square
    assert {macs[f"layer 1 {kernel}"] for kernel in FLOAT_KERNELS} == {0}


def test_kernels_and_layers(sites: dict[str, list[Site]]) -> None:
    """A kernel's unit spans the layers, a layer's unit the kernels; names say so."""
    plan = RECIPES["full"].choose(sites["electra"])
    split = split_units(plan)
    for unit in kernel_units(plan):
        assert unit.name == f"all {unit.kernel}"
        assert unit.layer is None
        assert unit.sites == frozenset().union(
            *(part.sites for part in split if part.kernel == unit.kernel)
        )
    layers = layer_units(plan)
    assert [(unit.name, unit.layer, unit.kernel) for unit in layers] == [
        ("layer 0", 0, None),
        ("layer 1", 1, None),
    ]
    for unit in layers:
        parts = [part for part in split if part.layer == unit.layer]
        assert unit.sites == frozenset().union(*(part.sites for part in parts))
        assert unit.macs_per_token == sum(part.macs_per_token for part in parts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes(sites: dict[str, list[Site]], name: str) -> None:
    """A class's unit spans the layers, and holds nothing of another class."""
    plan = RECIPES["full"].choose(sites[name])
    units = class_units(plan)
    classes = list(dict.fromkeys(site.tensor_class for site in plan.sites))
    assert [unit.tensor_class for unit in units] == [str(one) for one in classes]
    assert "every softmax" in [unit.name for unit in units]
    for unit, tensor_class in zip(units, classes, strict=True):
        assert unit.name == f"every {tensor_class}"
        assert (unit.layer, unit.kernel) == (None, None)
        assert unit.sites == {
            site.name for site in plan.sites if site.tensor_class is tensor_class
        }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_class_takes_its_gemms_to_float(
    sites: dict[str, list[Site]], name: str
) -> None:
    """Alone neither operand makes a GEMM INT8; without one of them it is float."""
    plan = RECIPES["linear"].choose(sites[name])
    assert plan.quantized_gemms > 0
    for unit in class_units(plan):
        assert unit.only(plan).names == unit.sites
        assert unit.all_but(plan).names == plan.names - unit.sites
        assert unit.only(plan).quantized_gemms == 0
        # Linear has nothing but operands of GEMMs, and each GEMM two of its own.
        left = plan.quantized_gemms - len(unit.sites)
        assert unit.all_but(plan).quantized_gemms == left


def test_groups(sites: dict[str, list[Site]]) -> None:
    """Units are compared with their like alone, also where they stand in no layer."""
    # ELECTRA has a GEMM outside of the layers.
    plan = RECIPES["full"].choose(sites["electra"])
    for units, group in (
        (split_units(plan), "kernel"),
        (kernel_units(plan), "kernel of all layers"),
        (class_units(plan), "tensor class"),
        (layer_units(plan), "layer"),
    ):
        assert {unit.group for unit in units} == {group}
    assert "projection" in {unit.name for unit in split_units(plan)}


def test_names_and_order() -> None:
    """What stands outside of the layers is called by its kernel alone."""
    sites = (
        Site("e.weight_quantizer", TensorClass.EMBEDDING_WEIGHT, None, -1),
        Site("b.input_quantizer", TensorClass.FFN_IN_INPUT, 10, 0),
        Site("b.weight_quantizer", TensorClass.FFN_IN_WEIGHT, 10, -2, 64),
        Site("a.input_quantizer", TensorClass.FFN_IN_INPUT, 9, 1),
        Site("c.input_quantizer", TensorClass.CLASSIFIER_INPUT, None, 2),
        Site("c.weight_quantizer", TensorClass.CLASSIFIER_WEIGHT, None, -3, 8),
    )
    plan = Plan("own", sites, dict.fromkeys((site.name for site in sites), False))
    assert [unit.name for unit in split_units(plan)] == [
        "embedding",
        "layer 10 ffn_in",
        "layer 9 ffn_in",
        "classifier",
    ]
    assert [unit.name for unit in layer_units(plan)] == ["layer 9", "layer 10"]
    assert [unit.name for unit in class_units(plan)] == [
        "every embedding_weight",
        "every ffn_in_input",
        "every ffn_in_weight",
        "every classifier_input",
        "every classifier_weight",
    ]
    assert Counter(unit.name for unit in kernel_units(plan)) == Counter(
        ["all embedding", "all ffn_in", "all classifier"]
    )
