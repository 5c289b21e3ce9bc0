"""Readers as large as people have them, built ahead of time: no GPU, all of the way."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from int8qa.build.attention import register_attention
from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.build.engines.tensorrt import build_plan
from int8qa.build.engines.tensorrt_census import check_network
from int8qa.build.engines.tensorrt_options import Flavour, PlanOptions, Profile
from int8qa.build.export import model_inputs
from int8qa.contract import Precision
from int8qa.reader.windows import Window
from tests.build.half import TENSORRT_RTX, project_half
from tests.build.tiny import TinyReader, calibrate_made

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason=TENSORRT_RTX
)
SHORT = [Profile((1, 1), (8, 128), (8, 128))]


def load_demo() -> object:
    """The checkpoint int8qa comes with: 6 layers of 384 channels."""
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_pretrained(
        demo_checkpoint_directory(), attn_implementation=register_attention()
    ).float()


def make_base() -> object:
    """BERT-base with random weights: 12 layers of 768 channels."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(7)
    config = BertConfig()
    config._attn_implementation = register_attention()
    return BertForQuestionAnswering(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "recipe", "layers", "channels", "capabilities"),
    [
        (load_demo, "full", 6, 384, ("sm75", "sm80", "sm86", "sm89", "sm120")),
        (make_base, "linear", 12, 768, ("sm89",)),
    ],
)
def test_reader_is_built(
    windows: list[Window],
    tmp_path: Path,
    make: object,
    recipe: str,
    layers: int,
    channels: int,
    capabilities: tuple[str, ...],
) -> None:
    """Strongly typed, every GEMM of the recipe in INT8, no other but those left out.

    Six GEMMs a layer have weights; ``full`` has attention's two besides. The span head
    stays in float16. Weights in INT8 take a byte, the embeddings two.
    """
    assert callable(make)
    reader = TinyReader(
        "bert", make().eval(), model_inputs(takes_token_types=True), pad_token_id=0
    )
    embeddings = reader.model.bert.embeddings.word_embeddings.weight.numel()
    model = project_half(calibrate_made(reader, windows[:1], recipe), recipe)
    plan = build_plan(
        model, tmp_path, SHORT, PlanOptions(Flavour.RTX, capabilities), lambda *_: None
    )
    census = plan.census
    quantized = layers * {"linear": 6, "full": 8}[recipe]
    check_network(census, Precision.INT8, quantized_gemms=quantized)
    assert census.strongly_typed
    assert dict(census.gemms) == {"int8": quantized, "half": 8 * layers + 1 - quantized}
    assert set(census.softmaxes) == set(census.normalizations) == {"half"}
    assert set(census.inputs.values()) == {"INT32 (-1, -1)"}
    weights = 12 * layers * channels**2
    at_least = weights + 2 * embeddings
    assert at_least < plan.size_bytes < 1.1 * at_least + 8_000_000
    assert plan.profiles == tuple(SHORT)
