"""What recipes choose in every architecture, and what is refused, and how."""

from __future__ import annotations

import dataclasses

import pytest

from int8qa.build.quantization import (
    RECIPES,
    Plan,
    Recipe,
    Rule,
    insert_quantizers,
    join_plans,
    quantizers_by_name,
    quantizers_off,
    switch_quantizers,
)
from int8qa.build.sites import Site, TensorClass
from int8qa.errors import BuildError, RecipeError
from tests.build.tiny import ARCHITECTURES, insert_and_find, make_reader

# Per layer Q, K, V, attention output and two of the feed-forward; ELECTRA projects its
# embeddings too.
GEMMS = {"bert": 12, "roberta": 12, "distilbert": 12, "electra": 13}
SITES = [
    Site("a.input_quantizer", TensorClass.QKV_INPUT, 0, 0),
    Site("a.weight_quantizer", TensorClass.QKV_WEIGHT, 0, -1, 64),
    Site("b.weight_quantizer", TensorClass.FFN_IN_WEIGHT, 0, -2, 64),
    Site("c.weight_quantizer", TensorClass.EMBEDDING_WEIGHT, None, -3),
]
ON = Rule(enable=True, pattern="*")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_recipe(name: str) -> None:
    """Inputs and weights of every GEMM but the head's, and nothing else."""
    import torch

    reader, sites = insert_and_find(name)
    gemms = {
        path
        for path, module in reader.model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "qa_outputs"
    }
    plan = RECIPES["linear"].choose(sites)
    assert plan.names == {
        f"{path}.{side}_quantizer" for path in gemms for side in ("input", "weight")
    }
    assert len(gemms) == GEMMS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_recipe(name: str) -> None:
    """Besides, the four operands of attention and each residual add's other branch."""
    _, sites = insert_and_find(name)
    linear, gemms, full = (RECIPES[r].choose(sites) for r in RECIPES)
    assert linear.names < gemms.names < full.names
    assert {s.tensor_class for s in full.sites if s.name not in gemms.names} == {
        TensorClass.ATTENTION_RESIDUAL,
        TensorClass.FFN_RESIDUAL,
    }
    added = [s.tensor_class for s in full.sites if s.name not in linear.names]
    assert sorted(added) == sorted(
        2
        * [
            TensorClass.QUERY,
            TensorClass.KEY,
            TensorClass.VALUE,
            TensorClass.SOFTMAX,
            TensorClass.ATTENTION_RESIDUAL,
            TensorClass.FFN_RESIDUAL,
        ]
    )


def test_both_addends() -> None:
    """A recipe of one's own adds what ``full`` leaves to fuse with its GEMM."""
    sites = insert_and_find("bert")[1]
    addends = (TensorClass.ATTENTION_OUTPUT, TensorClass.FFN_OUTPUT)
    rules = tuple(Rule(enable=True, tensor_class=one) for one in addends)
    both = Recipe("both", (*RECIPES["full"].rules, *rules)).choose(sites)
    full = RECIPES["full"].choose(sites)
    added = [s.tensor_class for s in both.sites if s.name not in full.names]
    assert (len(full.sites), len(both.sites)) == (36, 40)
    assert sorted(added) == sorted(2 * addends)


@pytest.mark.parametrize("unsigned", [True, False])
def test_unsigned_softmax(unsigned: bool) -> None:
    """The recipe decides for softmax outputs; nothing else is ever unsigned."""
    reader, sites = insert_and_find("bert")
    rules = (Rule(enable=True, pattern="*"),)
    recipe = Recipe("all", rules, unsigned_softmax=unsigned)
    plan = recipe.choose(sites)
    probabilities = {s.name for s in sites if s.tensor_class is TensorClass.SOFTMAX}
    assert len(probabilities) == 2
    assert plan.unsigned == (probabilities if unsigned else set())
    kind = "UINT8" if unsigned else "INT8"
    for site in sites:
        if site.is_weight:
            assert plan.describe_grid(site) == "INT8 per channel"
        else:
            expected = kind if site.name in probabilities else "INT8"
            assert plan.describe_grid(site) == expected
    switch_quantizers(reader.model, plan)
    on = {n for n, q in quantizers_by_name(reader.model).items() if q.unsigned}
    assert on == plan.unsigned
    # What is not quantized is on no grid.
    assert not plan.without(frozenset(probabilities)).unsigned
    smaller = plan.without(frozenset(sorted(probabilities)[:1]))
    assert smaller.unsigned == plan.unsigned & smaller.names


def test_unsigned_is_the_default() -> None:
    """Recipes that say nothing have it, the built-in ones too."""
    assert Recipe("x", (ON,)).unsigned_softmax
    assert all(recipe.unsigned_softmax for recipe in RECIPES.values())
    assert RECIPES["linear"].choose(SITES).unsigned == set()


def test_joined_plans_and_the_sign() -> None:
    """One recipe that wants signed probabilities has them in the common export."""
    sites = insert_and_find("bert")[1]
    full = RECIPES["full"].choose(sites)
    signed = dataclasses.replace(full, unsigned_softmax=False)
    assert join_plans([full, full]).unsigned == full.unsigned
    assert not join_plans([full, signed]).unsigned


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_switching(recipe: str) -> None:
    """What the plan names is on, in 8 bits, on its grid; all else is off."""
    from int8qa.build.histogram import ActivationHistogram

    reader, sites = insert_and_find("bert")
    plan = RECIPES[recipe].choose(sites)
    quantizers = quantizers_by_name(reader.model)
    assert not any(quantizer.is_enabled for quantizer in quantizers.values())
    switch_quantizers(reader.model, plan)
    for name, quantizer in quantizers.items():
        assert quantizer.is_enabled == (name in plan.names)
        assert quantizer.num_bits == 8
        assert quantizer.unsigned == (name in plan.unsigned)
        if name.endswith("weight_quantizer"):
            assert quantizer.axis == 0
        else:
            assert quantizer.axis is None
            assert isinstance(quantizer._calibrator, ActivationHistogram)


def test_switching_again() -> None:
    """A second plan leaves nothing of the first, its grids included."""
    reader, sites = insert_and_find("bert")
    switch_quantizers(reader.model, RECIPES["full"].choose(sites))
    rules = RECIPES["full"].rules
    other = Recipe("a", rules, per_channel=False, unsigned_softmax=False).choose(sites)
    switch_quantizers(reader.model, other)
    quantizers = quantizers_by_name(reader.model)
    assert {n for n, q in quantizers.items() if q.is_enabled} == other.names
    assert {quantizers[n].axis for n in other.names} == {None}
    assert {quantizers[n].unsigned for n in other.names} == {False}
    linear = RECIPES["linear"].choose(sites)
    switch_quantizers(reader.model, linear)
    assert {n for n, q in quantizers.items() if q.is_enabled} == linear.names


def test_quantizers_off() -> None:
    """Within, the model is in float; afterwards just those are on that were."""
    reader, sites = insert_and_find("bert")
    plan = RECIPES["linear"].choose(sites)
    switch_quantizers(reader.model, plan)
    quantizers = quantizers_by_name(reader.model)
    with quantizers_off(reader.model):
        assert not any(q.is_enabled for q in quantizers.values())
    assert {n for n, q in quantizers.items() if q.is_enabled} == plan.names


def test_grids() -> None:
    """Per channel is for weights, by the recipe, or else by the last rule that says."""

    def grids(recipe: Recipe) -> dict[str, bool]:
        found = recipe.choose(SITES).per_channel
        return {name[0]: on for name, on in found.items() if "weight" in name}

    assert grids(Recipe("x", (ON,))) == {"a": True, "b": True, "c": True}
    assert Recipe("x", (ON,)).choose(SITES).per_channel["a.input_quantizer"] is False
    assert not any(grids(Recipe("x", (ON,), per_channel=False)).values())
    rule = Rule(enable=True, tensor_class=TensorClass.QKV_WEIGHT, per_channel=False)
    assert grids(Recipe("x", (ON, rule))) == {"a": False, "b": True, "c": True}
    other = dataclasses.replace(rule, per_channel=True)
    assert grids(Recipe("x", (ON, other), per_channel=False)) == {
        "a": True,
        "b": False,
        "c": False,
    }
    # A rule that says nothing of grids leaves the recipe's, not an earlier rule's.
    assert grids(Recipe("x", (rule, ON))) == {"a": True, "b": True, "c": True}


def test_later_rules_win() -> None:
    """Off after on is off, on after off is on."""
    off = Rule(enable=False, tensor_class=TensorClass.FFN_IN_WEIGHT)
    assert "b.weight_quantizer" not in Recipe("x", (ON, off)).choose(SITES).names
    assert "b.weight_quantizer" in Recipe("x", (off, ON)).choose(SITES).names


def test_plan() -> None:
    """A plan keeps the order of sites, tells activations, and can be cut down."""
    plan = Recipe("x", (ON,), share_qkv=True).choose(SITES)
    assert plan.sites == tuple(SITES)
    assert plan.activations == SITES[:1]
    smaller = plan.without(frozenset({"a.input_quantizer", "b.weight_quantizer"}))
    assert smaller.sites == (SITES[1], SITES[3])
    assert smaller.activations == []
    assert (smaller.recipe, smaller.share_qkv) == ("x", True)
    assert isinstance(smaller, Plan)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (ON, Rule(enable=True, tensor_class=TensorClass.CONTEXT)),
            r"the recipe x names the tensor class context, .* it has embedding_weight,",
        ),
        (
            (ON, Rule(enable=False, pattern="b.wieght*")),
            r"'b\.wieght\*', which matches none of this model's 4 quantizers; the "  # noqa: ISC004
            r"nearest are called b\.weight_quantizer, .*--explain",
        ),
        (
            (ON, Rule(enable=True, pattern="a.*", per_channel=True)),
            r"axis to 'a\.\*', which matches 1 activations \(a\.input_quantizer\)",
        ),
        ((), r"the recipe x quantizes no GEMM weight"),
        ((Rule(enable=True, pattern="*.input_*"),), r"quantizes no GEMM weight"),
        # An embedding table is a weight, but not of a GEMM.
        ((Rule(enable=True, pattern="c.*"),), r"quantizes no GEMM weight"),
        ((ON, Rule(enable=False, pattern="*")), r"quantizes no GEMM weight"),
    ],
)
def test_recipe_that_does_not_fit(rules: tuple[Rule, ...], message: str) -> None:
    """What a recipe asks for and the model has not is told, with what it has."""
    with pytest.raises(RecipeError, match=message):
        Recipe("x", rules).choose(SITES)


def test_optional_rules_need_no_match() -> None:
    """Tensors that only some architectures have are asked for without demand."""
    rule = Rule(enable=True, tensor_class=TensorClass.PROJECTION_INPUT, optional=True)
    assert Recipe("x", (ON, rule)).choose(SITES).sites == tuple(SITES)


def test_full_needs_attention_that_lets_quantizers_in() -> None:
    """Without attention operands ``full`` says so, and what to use instead."""
    assert RECIPES["linear"].choose(SITES).names
    with pytest.raises(
        RecipeError,
        match=r"full quantizes the attention GEMMs \(query\), but this model's "
        r"attention lets no quantizer in.*Use the recipe linear",
    ):
        RECIPES["full"].choose(SITES)


def test_gemms_without_attention_is_linear() -> None:
    """Attention that lets no quantizer in stays in float."""
    linear, gemms = (RECIPES[name].choose(SITES) for name in ("linear", "gemms"))
    assert gemms.names == linear.names


def test_patterns_are_case_sensitive() -> None:
    """Names are compared as they are: LayerNorm is not layernorm."""
    rule = Rule(enable=True, pattern="A.*")
    assert not rule.matches(SITES[0])
    assert Rule(enable=True, pattern="a.*").matches(SITES[0])


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """ModelOpt's report of every quantizer stays out of the build's output."""
    reader = make_reader("bert")
    count = insert_quantizers(reader.model)
    assert count == len(quantizers_by_name(reader.model)) > 60
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_model_without_gemms() -> None:
    """A model with nothing to quantize is refused, not served as INT8."""
    import torch

    for layers in (
        (torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4)),
        (torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)),
    ):
        with pytest.raises(BuildError, match=r"no nn\.Linear layers but its head"):
            insert_quantizers(torch.nn.Sequential(*layers))
