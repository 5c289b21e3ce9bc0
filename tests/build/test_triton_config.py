"""``config.pbtxt``: the golden files, the round trip, a model without token types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format

from int8qa.build.export import model_inputs
from int8qa.build.pipeline import BATCH_SIZES, MAX_BATCH_TOKENS
from int8qa.build.subject import BUCKET_STEP, MAX_WINDOW_TOKENS
from int8qa.build.triton_config import openvino_model_config, parse_config
from int8qa.contract import Precision
from int8qa.errors import RepositoryError

REPOSITORY = Path(__file__).parents[2] / "model_repository"
BUCKETS = tuple(range(BUCKET_STEP, MAX_WINDOW_TOKENS + 1, BUCKET_STEP))


def write_config(precision: Precision, *, takes_token_types: bool = True) -> str:
    """What the build writes for the demo checkpoint."""
    return openvino_model_config(
        precision,
        inputs=model_inputs(takes_token_types=takes_token_types),
        sequence_buckets=BUCKETS,
        batch_sizes=BATCH_SIZES,
        max_batch_tokens=MAX_BATCH_TOKENS,
    )


@pytest.mark.parametrize("precision", Precision)
def test_golden_files(precision: Precision) -> None:
    """The files in the repository are the build's; `int8qa build` writes them anew."""
    path = REPOSITORY / precision.model_name / "config.pbtxt"
    assert path.read_text(encoding="utf-8") == write_config(precision)


@pytest.mark.parametrize("precision", Precision)
def test_round_trip(precision: Precision) -> None:
    """Triton's protobuf reads back what was written, field by field."""
    text = write_config(precision)
    config = parse_config(text)
    assert text_format.MessageToString(config) == text
    assert config.name == f"qa_{precision}"
    assert config.backend == "python"
    assert config.max_batch_size == 8
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [
        ("input_ids", [-1]),
        ("attention_mask", [-1]),
        ("token_type_ids", [-1]),
    ]
    assert {tensor.data_type for tensor in config.input} == {8}  # TYPE_INT32
    assert [tensor.name for tensor in config.output] == ["start_logits", "end_logits"]
    assert {tensor.data_type for tensor in config.output} == {11}  # TYPE_FP32
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert json.loads(parameters["sequence_buckets"]) == list(range(16, 385, 16))
    assert json.loads(parameters["batch_sizes"]) == [1, 2, 4, 8]
    assert json.loads(parameters["max_batch_tokens"]) == 1024


def test_triton_neither_merges_nor_times_out() -> None:
    """Decision 0021 has what its dynamic batching and a queue policy cost on a CPU."""
    config = parse_config(write_config(Precision.INT8))
    assert not config.HasField("dynamic_batching")


def test_without_token_types() -> None:
    """A model without segment embeddings is not asked for them."""
    config = parse_config(write_config(Precision.INT8, takes_token_types=False))
    assert [tensor.name for tensor in config.input] == ["input_ids", "attention_mask"]


def test_refused_values() -> None:
    """What Triton's protobuf does not take never reaches a file."""
    with pytest.raises(RepositoryError, match="Triton's protobuf refused"):
        openvino_model_config(
            Precision.INT8,
            inputs=("input_ids",),
            sequence_buckets=(32,),
            batch_sizes=(2**40,),
            max_batch_tokens=1024,
        )


def test_no_config() -> None:
    """A text that is no ModelConfig is an error of ours."""
    with pytest.raises(RepositoryError, match="not a Triton model configuration"):
        parse_config("no_such_field: 1")
