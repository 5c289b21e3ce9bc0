"""Every architecture has the same tensors, whatever its modules are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from int8qa.build.calibration import (
    Calibrator,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.census import take_census
from int8qa.build.export import export_onnx, model_inputs, wrap_model
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import (
    RECIPES,
    insert_quantizers,
    quantizers_by_name,
    switch_quantizers,
)
from int8qa.build.sites import Site, TensorClass, find_sites
from int8qa.errors import RecipeError
from int8qa.reader.windows import Window
from tests.build.tiny import (
    ARCHITECTURES,
    POSITIONS,
    VOCABULARY,
    insert_and_find,
    quantize_reader,
)

PER_LAYER = {
    TensorClass.QKV_INPUT: 3,
    TensorClass.QKV_WEIGHT: 3,
    TensorClass.QUERY: 1,
    TensorClass.KEY: 1,
    TensorClass.VALUE: 1,
    TensorClass.SOFTMAX: 1,
    TensorClass.CONTEXT: 1,
    TensorClass.ATTENTION_OUTPUT_WEIGHT: 1,
    TensorClass.ATTENTION_OUTPUT: 1,
    TensorClass.ATTENTION_RESIDUAL: 1,
    TensorClass.LAYERNORM_INPUT: 2,
    TensorClass.FFN_IN_INPUT: 1,
    TensorClass.FFN_IN_WEIGHT: 1,
    TensorClass.FFN_OUT_INPUT: 1,
    TensorClass.FFN_OUT_WEIGHT: 1,
    TensorClass.FFN_OUTPUT: 1,
    TensorClass.FFN_RESIDUAL: 1,
}
OUTSIDE = {
    "bert": {TensorClass.EMBEDDING_WEIGHT: 3},
    "roberta": {TensorClass.EMBEDDING_WEIGHT: 3},
    "distilbert": {TensorClass.EMBEDDING_WEIGHT: 2},
    "electra": {
        TensorClass.EMBEDDING_WEIGHT: 3,
        TensorClass.PROJECTION_INPUT: 1,
        TensorClass.PROJECTION_WEIGHT: 1,
    },
}
HEAD = {TensorClass.CLASSIFIER_INPUT: 1, TensorClass.CLASSIFIER_WEIGHT: 1}


@pytest.fixture(scope="module")
def sites() -> dict[str, list[Site]]:
    return {name: insert_and_find(name)[1] for name in ARCHITECTURES}


def pick(sites: list[Site], kind: TensorClass, layer: int | None) -> list[Site]:
    return [s for s in sites if s.tensor_class is kind and s.layer == layer]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes_of_a_layer(
    sites: dict[str, list[Site]], name: str, layer: int
) -> None:
    """Both layers of each architecture have every class, as often as BERT has."""
    found = Counter(s.tensor_class for s in sites[name] if s.layer == layer)
    assert found == PER_LAYER


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes_outside_of_layers(sites: dict[str, list[Site]], name: str) -> None:
    """Embeddings, ELECTRA's projection and the head belong to no layer."""
    found = Counter(s.tensor_class for s in sites[name] if s.layer is None)
    assert found == OUTSIDE[name] | HEAD


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_told_apart(sites: dict[str, list[Site]], name: str) -> None:
    """Sites share a number just where they read one tensor."""
    for layer in (0, 1):
        shared = [
            {s.tensor for kind in kinds for s in pick(sites[name], kind, layer)}
            for kinds in (
                (TensorClass.QKV_INPUT, TensorClass.ATTENTION_RESIDUAL),
                (TensorClass.FFN_IN_INPUT, TensorClass.FFN_RESIDUAL),
            )
        ]
        assert all(len(numbers) == 1 for numbers in shared)
    # What is left after the sharing: 4 sites are one tensor, and 2 are one.
    assert len({s.tensor for s in sites[name]}) == len(sites[name]) - 2 * (3 + 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_quantizers(name: str) -> None:
    """Each site is a quantizer of the model, once, in the order of its modules."""
    reader, sites = insert_and_find(name)
    names = [site.name for site in sites]
    order = [n for n in quantizers_by_name(reader.model) if n in set(names)]
    assert names == order


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gemm_work(sites: dict[str, list[Site]], name: str) -> None:
    """A weight knows the products it costs per token; a lookup costs none."""
    found = {s.tensor_class: s.macs_per_token for s in sites[name] if s.is_weight}
    expected = {
        TensorClass.EMBEDDING_WEIGHT: 0,
        TensorClass.QKV_WEIGHT: 32 * 32,
        TensorClass.ATTENTION_OUTPUT_WEIGHT: 32 * 32,
        TensorClass.FFN_IN_WEIGHT: 32 * 64,
        TensorClass.FFN_OUT_WEIGHT: 64 * 32,
        TensorClass.CLASSIFIER_WEIGHT: 32 * 2,
    }
    if name == "electra":
        expected[TensorClass.PROJECTION_WEIGHT] = 16 * 32
    assert found == expected
    assert not any(s.macs_per_token for s in sites[name] if not s.is_weight)


def test_projection_of_electra(sites: dict[str, list[Site]]) -> None:
    """Its output is the first block's residual, its input nobody else's."""
    (residual,) = pick(sites["electra"], TensorClass.ATTENTION_RESIDUAL, 0)
    assert residual.name == "electra.embeddings_project.output_quantizer"
    (read,) = pick(sites["electra"], TensorClass.PROJECTION_INPUT, None)
    assert [s for s in sites["electra"] if s.tensor == read.tensor] == [read]


@pytest.mark.parametrize(
    ("name", "last_residual"),
    [
        ("bert", "bert.encoder.layer.0.output.LayerNorm.output_quantizer"),
        ("distilbert", "distilbert.transformer.layer.0.output_layer_norm.output_q"),
    ],
)
def test_residual_is_the_layer_before(
    sites: dict[str, list[Site]], name: str, last_residual: str
) -> None:
    """Layer 1's attention residual is layer 0's last LayerNorm."""
    (residual,) = pick(sites[name], TensorClass.ATTENTION_RESIDUAL, 1)
    assert residual.name.startswith(last_residual)


def test_place() -> None:
    """For people: the layer where there is one, and the class."""
    assert Site("a", TensorClass.SOFTMAX, 3, 0).place == "layer 3 softmax"
    assert Site("a", TensorClass.CLASSIFIER_INPUT, None, 0).place == "classifier_input"


def test_quantizers_are_left_as_they_were() -> None:
    """Looking for sites changes no quantizer, also where some are on."""
    reader, plan = quantize_reader("bert", "linear")
    before = {n: q.is_enabled for n, q in quantizers_by_name(reader.model).items()}
    assert sum(before.values()) == len(plan.sites)
    find_sites(reader.wrapped, reader.inputs)
    after = {n: q.is_enabled for n, q in quantizers_by_name(reader.model).items()}
    assert after == before


def make_albert() -> Any:
    """One layer, run three times: ALBERT shares its weights."""
    import torch
    import transformers

    from int8qa.build.attention import register_attention

    torch.manual_seed(7)
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    config._attn_implementation = register_attention()
    return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


@pytest.mark.parametrize(("recipe", "matmuls"), [("linear", 6), ("gemms", 8)])
def test_repeated_modules(windows: list[Window], recipe: str, matmuls: int) -> None:
    """A layer that runs three times: all works but ``full``, which says why not.

    Its GEMMs are sites once each, their ranges cover all three runs, and the graph
    quantizes every run.
    """
    model = make_albert()
    insert_quantizers(model)
    inputs = model_inputs(takes_token_types=True)
    reader = wrap_model(model)
    sites = find_sites(reader, inputs)
    names = [site.name for site in sites]
    assert len(names) == len(set(names))
    with pytest.raises(RecipeError, match=r"class ffn_residual, which this model"):
        RECIPES["full"].choose(sites)
    plan = RECIPES[recipe].choose(sites)
    gemms = sum(site.is_weight for site in plan.sites)
    assert gemms == 1 + 6
    switch_quantizers(model, plan)
    histograms = collect_histograms(reader, windows, plan, inputs)
    query = next(s for s in plan.sites if s.name.endswith("query.input_quantizer"))
    counted = histograms.by_site[query.name]._calib_hist
    assert counted is not None
    assert counted.sum() == 3 * 32 * sum(len(window) for window in windows)
    ranges = choose_ranges(model, plan, histograms, Calibrator("max"))
    set_ranges(model, ranges)
    graph = QuantizedGraph(export_onnx(reader, inputs), plan).project(plan, ranges)
    census = take_census(graph, plan, sites, ranges)
    assert census.quantized_matmuls == 1 + 3 * matmuls
