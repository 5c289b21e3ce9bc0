"""Recipes from files: what they mean, and what each fault in them is told like."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8qa.build.quantization import RECIPES, Recipe, Rule
from int8qa.build.recipe_file import MAX_RECIPE_BYTES, load_recipe
from int8qa.build.sites import Site, TensorClass
from int8qa.errors import RecipeError

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/recipes/gentle.yaml"


def write(directory: Path, text: str) -> str:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def layer_sites(layers: int) -> list[Site]:
    """A few sites of an encoder, named as BERT's."""
    sites = []
    for layer in range(layers):
        path = f"bert.encoder.layer.{layer}"
        for name, tensor_class in (
            ("attention.self.query.input", TensorClass.QKV_INPUT),
            ("attention.self.query.weight", TensorClass.QKV_WEIGHT),
            ("output.dense.input", TensorClass.FFN_OUT_INPUT),
            ("output.dense.weight", TensorClass.FFN_OUT_WEIGHT),
        ):
            macs = 1024 if tensor_class.is_weight else 0
            quantizer = f"{path}.{name}_quantizer"
            sites.append(Site(quantizer, tensor_class, layer, len(sites), macs))
    return sites


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_built_in(name: str) -> None:
    """A built-in's name needs no file."""
    assert load_recipe(name) is RECIPES[name]


def test_example() -> None:
    """The shipped example is a recipe, and does on six layers what it says."""
    recipe = load_recipe(str(EXAMPLE))
    assert recipe.name == "gentle"
    plan = recipe.choose(layer_sites(6))
    assert {(site.layer, site.tensor_class) for site in plan.sites} == {
        (layer, kind)
        for layer in range(5)
        for kind in (TensorClass.QKV_INPUT, TensorClass.QKV_WEIGHT)
    }
    assert all(plan.per_channel[s.name] == s.is_weight for s in plan.sites)


def test_example_on_a_smaller_model() -> None:
    """A pattern without a match is named, with near names and where to find all."""
    with pytest.raises(
        RecipeError,
        match=r"gentle names the pattern '\*\.layer\.5\.\*', which matches none of this "
        r"model's 8 quantizers; .*bert\.encoder\.layer\..*--explain",
    ):
        load_recipe(str(EXAMPLE)).choose(layer_sites(2))


def test_every_field(tmp_path: Path) -> None:
    """Each field of a file becomes the recipe's, the base's rules first."""
    path = write(
        tmp_path,
        """
        name: my-own-2
        base: full
        weights: per-tensor
        share_qkv: true
        unsigned_softmax: false
        rules:
          - class: softmax
            enable: false
          - quantizers: "*.layer.5.*"
          - {class: qkv_weight, axis: null, bits: 8}
          - {class: ffn_in_weight, axis: 0, enable: true}
        """,
    )
    assert load_recipe(path) == Recipe(
        "my-own-2",
        (
            *RECIPES["full"].rules,
            Rule(enable=False, tensor_class=TensorClass.SOFTMAX),
            Rule(enable=True, pattern="*.layer.5.*"),
            Rule(enable=True, tensor_class=TensorClass.QKV_WEIGHT, per_channel=False),
            Rule(enable=True, tensor_class=TensorClass.FFN_IN_WEIGHT, per_channel=True),
        ),
        per_channel=False,
        share_qkv=True,
        unsigned_softmax=False,
    )


def test_defaults(tmp_path: Path) -> None:
    """No base, per-channel weights, nothing shared, probabilities unsigned."""
    path = write(tmp_path, "name: a\nrules:\n- class: qkv_weight\n")
    rules = (Rule(enable=True, tensor_class=TensorClass.QKV_WEIGHT),)
    assert load_recipe(path) == Recipe("a", rules)
    assert load_recipe(path).unsigned_softmax


def test_later_rules_win(tmp_path: Path) -> None:
    """What a rule switches off, a later one can switch on again."""
    path = write(
        tmp_path,
        """
        name: a
        base: linear
        rules:
          - {quantizers: "*", enable: false}
          - {quantizers: "*.layer.1.output.dense.*"}
          - {class: ffn_out_weight, axis: null}
        """,
    )
    plan = load_recipe(path).choose(layer_sites(2))
    assert [(site.layer, str(site.tensor_class)) for site in plan.sites] == [
        (0, "ffn_out_weight"),
        (1, "ffn_out_input"),
        (1, "ffn_out_weight"),
    ]
    assert not any(plan.per_channel.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\nrules:\n- class: qkv_input\n- class: sofmax\n",
            (
                r"recipe\.yaml: rules\.1\.class \(line 4\) is 'sofmax': allowed: .*"
                r"qkv_weight.*\(did you mean softmax\?\)"
            ),
        ),
        (
            "name: a\nbase: lineer\n",
            (
                r"base \(line 2\) is 'lineer': allowed: linear, gemms, full "
                r"\(did you mean linear\?\)"
            ),
        ),
        (
            "name: a\nrule: []\n",
            (
                r"rule \(line 2\) is no field: allowed: name, base, .*"
                r"\(did you mean rules\?\)"
            ),
        ),
        (
            "name: a\nrules:\n- class: softmax\n  enabled: true\n",
            (
                r"rules\.0\.enabled \(line 4\) is no field: allowed: class, quantizers, "
                r"enable, axis, bits \(did you mean enable\?\)"
            ),
        ),
        ("base: linear\n", r"name is missing"),
        ("name: linear\nbase: full\n", r"name \(line 1\) is 'linear': .*built-in"),
        ("name: My Own\nbase: full\n", r"name \(line 1\) is 'My Own': .*lower-case"),
        ("name: 7\nbase: full\n", r"name \(line 1\) is 7: .*string"),
        ("name: a\n", r"the recipe: a recipe needs a base, rules, or both"),
        (
            "name: a\nbase: full\nweights: per-row\n",
            r"weights \(line 3\) is 'per-row': .*'per-channel' or 'per-tensor'",
        ),
        (
            "name: a\nbase: full\nshare_qkv: 1\n",
            r"share_qkv \(line 3\) is 1: .*boolean",
        ),
        (
            "name: a\nbase: full\nunsigned_softmax: int8\n",
            r"unsigned_softmax \(line 3\) is 'int8': .*boolean",
        ),
        (
            "name: a\nbase: full\nunsigned_softmx: true\n",
            r"unsigned_softmx \(line 3\) is no field: .*mean unsigned_softmax\?\)",
        ),
        ("name: a\nrules: softmax\n", r"rules \(line 2\) is 'softmax': .*list"),
        ("name: a\nrules:\n- softmax\n", r"rules\.0 \(line 3\) is 'softmax'"),
        (
            "name: a\nrules:\n- enable: false\n",
            r"rules\.0 \(line 3\): .*exactly one .* this has neither",
        ),
        (
            "name: a\nrules:\n- class: key\n  quantizers: '*'\n",
            r"rules\.0 \(line 3\): .*exactly one .* this has both",
        ),
        (
            "name: a\nrules:\n- class: qkv_weight\n  axis: 1\n",
            r"rules\.0\.axis \(line 4\) is 1: allowed: null .* or 0",
        ),
        (
            "name: a\nrules:\n- class: qkv_weight\n  axis: false\n",
            r"rules\.0\.axis \(line 4\) is False: .*integer",
        ),
        (
            "name: a\nrules:\n- class: softmax\n  axis: 0\n",
            r"rules\.0 \(line 3\): axis is for weights; softmax is an activation",
        ),
        (
            "name: a\nrules:\n- class: qkv_weight\n  axis: 0\n  enable: false\n",
            r"rules\.0 \(line 3\): axis says nothing where enable is false",
        ),
        (
            "name: a\nrules:\n- class: qkv_weight\n  bits: 4\n",
            r"rules\.0\.bits \(line 4\) is 4: allowed: 8, as the engines run INT8",
        ),
        (
            "name: a\nrules:\n- {class: a}\n- {class: b}\n- {class: c}\n- {class: d}\n",
            r"rules\.0\.class .*rules\.2\.class .*\(and 1 more\)",
        ),
        (
            "name: a\nrules:\n- class: key\n  class: query\n",
            r"rules\.0\.class stands there twice, in line 3 and in line 4",
        ),
        ("name: [a\nrules: b: c\n", r"is not YAML: line 2, column \d+: "),
        ("name: !!python/object/apply:os.getcwd []\n", r"is not YAML: line 1, column"),
        ("name: a\n---\nname: b\n", r"is not YAML: line 2"),
        ("name: 2024-99-99\n", r"holds what no recipe can hold"),
        ("", r"holds nothing; allowed: a mapping"),
        ("- a\n", r"holds a list; allowed: a mapping"),
        ("[" * 20_000, r"holds what no recipe can hold|is not YAML"),
    ],
)
def test_faults(tmp_path: Path, text: str, message: str) -> None:
    """Each fault is told with file, place, finding and what is allowed."""
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    """Aliases of aliases, a terabyte if written out, are told in one short line."""
    lines = ["name: a", "x0: &x0 [1]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 13)]
    path = write(tmp_path, "\n".join([*lines, "rules: *x12"]))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_size_limit(tmp_path: Path) -> None:
    """A file of 64 KiB is read; one byte more is not."""
    text = "name: a\nbase: full\n#"
    path = write(tmp_path, text + "x" * (MAX_RECIPE_BYTES - len(text)))
    assert load_recipe(path).name == "a"
    path = write(tmp_path, text + "x" * (MAX_RECIPE_BYTES + 1 - len(text)))
    with pytest.raises(RecipeError, match="more than 65536 bytes"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lineer", r"no recipe is called 'lineer': .*did you mean linear\?.*\.yaml"),
        ("recipe.json", r"no recipe is called 'recipe.json'"),
        ("nowhere/recipe.yml", r"no such recipe file: nowhere/recipe\.yml.*linear"),
    ],
)
def test_no_such_recipe(name: str, message: str) -> None:
    """Neither a built-in nor a file."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    """What cannot be read says why."""
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_axis_by_pattern(tmp_path: Path) -> None:
    """A pattern with an axis may match weights only."""
    text = (
        "name: a\nbase: linear\nrules:\n- quantizers: '*.layer.1.*{}'\n  axis: null\n"
    )
    sites = layer_sites(2)
    wrong = load_recipe(write(tmp_path, text.format("")))
    with pytest.raises(
        RecipeError, match=r"'\*\.layer\.1\.\*', which matches 2 activations"
    ):
        wrong.choose(sites)
    plan = load_recipe(write(tmp_path, text.format("weight_quantizer"))).choose(sites)
    weights = {s.layer: plan.per_channel[s.name] for s in sites if s.is_weight}
    assert weights == {0: True, 1: False}
