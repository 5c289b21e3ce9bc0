"""``config.pbtxt`` of TensorRT engines, through Triton's own protobuf.

In: names, shapes and limits of one model. Out: text that Triton's parser reads back to
the same message. Two kinds: a plan in Triton's TensorRT backend, and a TensorRT-RTX
plan in its Python backend (engines/triton_tensorrt_rtx_model.py). What Triton does with
profiles and CUDA graphs is read from its backend's source: docs/decisions/0013.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from int8qa.build.engines.tensorrt_options import PLAN_FILENAME, Profile
from int8qa.build.triton_config import parse_config
from int8qa.contract import END_LOGITS, START_LOGITS, Precision
from int8qa.errors import RepositoryError

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_BATCH_TOKENS = 32 * 384
"""An A100 gains up to a batch of 32 at 384 tokens, says FasterTransformer's table."""
GRAPH_BATCH_SIZES = (1, 2, 4)
"""Batches small enough that launching kernels takes as long as running them."""


def tensorrt_model_config(
    precision: Precision,
    *,
    inputs: Sequence[str],
    sequence_buckets: Sequence[int],
    batch_sizes: Sequence[int],
    profiles: Sequence[Profile],
    instances: int = 1,
    cuda_graphs: bool = True,
) -> str:
    """The configuration of one plan in Triton's TensorRT backend.

    Args:
        precision: of the model.
        inputs: names of its int32 tensors [B, S].
        sequence_buckets: padded lengths that occur, in tokens.
        batch_sizes: batches that occur.
        profiles: of the engine, in its order; every instance has a context of each.
        instances: per GPU; a second one copies while the first computes, for the memory
            of its contexts.
        cuda_graphs: record the launches of small batches. Each graph takes memory, and
            Triton tries each of them in each profile: those that do not fit are logged
            as errors at load, and do no harm.

    Raises:
        RepositoryError: a shape lies outside of all profiles, or Triton's protobuf
            would not take the values.
    """
    shapes = [(b, s) for s in sequence_buckets for b in batch_sizes]
    lost = [s for s in shapes if not any(profile.covers(s) for profile in profiles)]
    if lost:
        raise RepositoryError(
            f"no profile of the engine takes {lost[0][0]} windows of {lost[0][1]} "
            f"tokens ({len(lost)} such shapes); choose profiles for these batch sizes"
        )
    batch = max(batch_sizes)
    small = [b for b in GRAPH_BATCH_SIZES if b in batch_sizes]
    cuda: dict[str, Any] = {"graphs": cuda_graphs, "output_copy_stream": True}
    if cuda_graphs:
        cuda["graph_spec"] = [
            {"batch_size": b, "input": {name: {"dim": [s]} for name in inputs}}
            for s in sequence_buckets
            for b in small
        ]
    message = _common(precision, inputs, batch) | {
        "platform": "tensorrt_plan",
        "backend": "tensorrt",
        "default_model_filename": PLAN_FILENAME,
        "instance_group": [
            {
                "count": instances,
                "kind": "KIND_GPU",
                "profile": [str(index) for index in range(len(profiles))],
            }
        ],
        "optimization": {"cuda": cuda},
        "model_warmup": [
            _warm_up(inputs, b, s)
            for s in sequence_buckets
            for b in sorted({batch_sizes[0], *small, batch})
        ],
        "parameters": {
            # One block of memory per context, of the size its own profile needs;
            # by default each has the size of the largest.
            "execution_context_allocation_strategy": {
                "string_value": "ON_PROFILE_CHANGE"
            }
        },
    }
    return _write(message)


def rtx_model_config(
    precision: Precision,
    *,
    inputs: Sequence[str],
    sequence_buckets: Sequence[int],
    batch_sizes: Sequence[int],
) -> str:
    """The configuration of one TensorRT-RTX plan in Triton's Python backend.

    Raises:
        RepositoryError: Triton's protobuf would not take the values.
    """
    message = _common(precision, inputs, max(batch_sizes)) | {
        "backend": "python",
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "parameters": {
            "engine": {"string_value": "tensorrt-rtx"},
            "sequence_buckets": {"string_value": json.dumps(list(sequence_buckets))},
            "batch_sizes": {"string_value": json.dumps(list(batch_sizes))},
        },
    }
    return _write(message)


def _common(precision: Precision, inputs: Sequence[str], batch: int) -> dict[str, Any]:
    """Tensors and queue, as the gateway expects them of every engine."""
    return {
        "name": precision.model_name,
        "max_batch_size": batch,
        "input": [
            {"name": name, "data_type": "TYPE_INT32", "dims": [-1]} for name in inputs
        ],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [-1]}
            for name in (START_LOGITS, END_LOGITS)
        ],
        # Zero delay: a lone gateway has batched already, and the batches of several
        # merge while the engine is busy. A queue policy would make Triton hold each
        # request until an instance is free, and at times miss that it is, for 500 ms
        # (docs/decisions/0021-no-queue-policy-in-triton.md).
        "dynamic_batching": {},
    }


def _warm_up(inputs: Sequence[str], batch: int, tokens: int) -> dict[str, Any]:
    """One batch of zeros: token 0, nothing attended to, finite in float16."""
    tensor = {"data_type": "TYPE_INT32", "dims": [tokens], "zero_data": True}
    return {
        "name": f"{batch}x{tokens}",
        "batch_size": batch,
        "inputs": {name: dict(tensor) for name in inputs},
    }


def _write(message: dict[str, Any]) -> str:
    from google.protobuf import json_format, text_format

    try:
        # An empty text is an empty ModelConfig; its class is triton_config's affair.
        config = json_format.ParseDict(message, parse_config(""))
    except json_format.ParseError as error:
        raise RepositoryError(
            f"Triton's protobuf refused the config: {error}"
        ) from error
    return str(text_format.MessageToString(config))
