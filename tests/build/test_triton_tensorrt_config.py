"""``config.pbtxt`` of TensorRT plans: golden files, round trip, shapes and profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format

from int8qa.build.engines.tensorrt_options import Flavour, Profile, choose_profiles
from int8qa.build.export import model_inputs
from int8qa.build.triton_config import parse_config
from int8qa.build.triton_tensorrt_config import (
    BATCH_SIZES,
    rtx_model_config,
    tensorrt_model_config,
)
from int8qa.contract import Precision
from int8qa.errors import RepositoryError

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt"
BUCKETS = tuple(range(32, 385, 32))
INPUTS = model_inputs(takes_token_types=True)
PROFILES = choose_profiles(
    Flavour.TENSORRT, sequence_buckets=BUCKETS, batch_sizes=BATCH_SIZES
)


def write_tensorrt(
    *, buckets: tuple[int, ...] = BUCKETS, cuda_graphs: bool = True
) -> str:
    return tensorrt_model_config(
        Precision.INT8,
        inputs=INPUTS,
        sequence_buckets=buckets,
        batch_sizes=BATCH_SIZES,
        profiles=PROFILES,
        cuda_graphs=cuda_graphs,
    )


def write_rtx() -> str:
    return rtx_model_config(
        Precision.INT8, inputs=INPUTS, sequence_buckets=BUCKETS, batch_sizes=BATCH_SIZES
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("tensorrt", write_tensorrt(buckets=(96, 384))), ("tensorrt-rtx", write_rtx())],
)
def test_golden_files(name: str, text: str) -> None:
    """Triton's parser reads back the message, and it is the one on file."""
    assert text_format.MessageToString(parse_config(text)) == text
    assert (GOLDEN / f"{name}.pbtxt").read_text(encoding="utf-8") == text


def test_profiles_and_instances() -> None:
    """Every instance has a context of every profile, by its number in the engine."""
    config = parse_config(write_tensorrt())
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    (group,) = config.instance_group
    assert list(group.profile) == ["0", "1", "2"]
    assert group.kind == group.KIND_GPU
    strategy = config.parameters["execution_context_allocation_strategy"]
    assert strategy.string_value == "ON_PROFILE_CHANGE"
    assert all(profile.most[0] == config.max_batch_size for profile in PROFILES)


def test_queue() -> None:
    """Zero queue delay, and no policy: decision 0021 has what one costs."""
    for text in (write_tensorrt(), write_rtx()):
        config = parse_config(text)
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.max_queue_delay_microseconds == 0
        assert not config.dynamic_batching.HasField("default_queue_policy")


def test_cuda_graphs() -> None:
    """One graph for each small batch of each bucket, with a shape for every input."""
    cuda = parse_config(write_tensorrt()).optimization.cuda
    assert cuda.graphs
    shapes = {
        (spec.batch_size, tuple(spec.input[name].dim[0] for name in INPUTS))
        for spec in cuda.graph_spec
    }
    assert shapes == {(b, (s,) * 3) for b in (1, 2, 4) for s in BUCKETS}
    assert not any(spec.HasField("graph_lower_bound") for spec in cuda.graph_spec)
    off = parse_config(write_tensorrt(cuda_graphs=False)).optimization.cuda
    assert not off.graphs
    assert not off.graph_spec


def test_warm_up() -> None:
    """Every bucket is warmed up, singly, in graph sizes and at the largest batch."""
    samples = parse_config(write_tensorrt()).model_warmup
    assert {(w.batch_size, w.inputs["input_ids"].dims[0]) for w in samples} == {
        (b, s) for b in (1, 2, 4, 32) for s in BUCKETS
    }
    assert all(w.inputs[name].zero_data for w in samples for name in INPUTS)


def test_shape_outside_of_profiles() -> None:
    """A shape that no profile takes would fail at run time; it is refused here."""
    with pytest.raises(
        RepositoryError, match="no profile of the engine takes 2 windows"
    ):
        tensorrt_model_config(
            Precision.FP16,
            inputs=INPUTS,
            sequence_buckets=(32,),
            batch_sizes=(1, 2),
            profiles=[Profile((1, 1), (1, 32), (1, 32))],
        )


def test_refused_values() -> None:
    """What Triton's protobuf does not take never reaches a file."""
    with pytest.raises(RepositoryError, match="Triton's protobuf refused"):
        rtx_model_config(
            Precision.INT8,
            inputs=INPUTS,
            sequence_buckets=(32,),
            batch_sizes=(2**40,),
        )


def test_rtx_parameters() -> None:
    """The Python-backend model finds its shapes; without token types it has two inputs."""
    config = parse_config(
        rtx_model_config(
            Precision.FP16,
            inputs=model_inputs(takes_token_types=False),
            sequence_buckets=BUCKETS,
            batch_sizes=BATCH_SIZES,
        )
    )
    assert config.backend == "python"
    assert [tensor.name for tensor in config.input] == ["input_ids", "attention_mask"]
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert json.loads(parameters["sequence_buckets"]) == list(BUCKETS)
    assert json.loads(parameters["batch_sizes"]) == list(BATCH_SIZES)
