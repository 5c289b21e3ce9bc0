"""``config.pbtxt`` through Triton's own protobuf, never through string templates.

In: names, shapes and limits of one model. Out: a validated ``ModelConfig`` as text
that Triton's parser reads back to the same message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from int8qa.contract import (
    BUILD_ID_PARAMETER,
    END_LOGITS,
    START_LOGITS,
    Precision,
)
from int8qa.errors import RepositoryError

OPENVINO_INSTANCES = 2
"""Of a CPU engine: two batches side by side, each on half the cores, answered more
questions than one after the other on all (docs/decisions/0023-two-at-a-time.md)."""


def openvino_model_config(
    precision: Precision,
    *,
    inputs: Sequence[str],
    sequence_buckets: Sequence[int],
    batch_sizes: Sequence[int],
    max_batch_tokens: int,
) -> str:
    """The configuration of one OpenVINO model in Triton's Python backend.

    Without dynamic batching: on a CPU it cost 10 to 28 % of the throughput
    (docs/decisions/0021-no-queue-policy-in-triton.md).

    Returns:
        Protobuf text format.

    Raises:
        RepositoryError: Triton's protobuf would not take the values.
    """
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    message: dict[str, Any] = {
        "name": precision.model_name,
        "backend": "python",
        "max_batch_size": max(batch_sizes),
        "input": [
            {"name": name, "data_type": "TYPE_INT32", "dims": [-1]} for name in inputs
        ],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [-1]}
            for name in (START_LOGITS, END_LOGITS)
        ],
        "instance_group": [{"count": OPENVINO_INSTANCES, "kind": "KIND_CPU"}],
        "parameters": {
            "engine": {"string_value": "openvino"},
            "sequence_buckets": {"string_value": json.dumps(list(sequence_buckets))},
            "batch_sizes": {"string_value": json.dumps(list(batch_sizes))},
            "max_batch_tokens": {"string_value": json.dumps(max_batch_tokens)},
        },
    }
    try:
        config = json_format.ParseDict(message, model_config_pb2.ModelConfig())
    except json_format.ParseError as error:
        raise RepositoryError(
            f"Triton's protobuf refused the config: {error}"
        ) from error
    return str(text_format.MessageToString(config))


def stamp_config(text: str, name: str, build_id: str) -> str:
    """Name a model anew and write the build it is of into its parameters.

    Raises:
        RepositoryError: ``text`` is no configuration.
    """
    from google.protobuf import text_format

    config = parse_config(text)
    config.name = name
    config.parameters[BUILD_ID_PARAMETER].string_value = build_id
    return str(text_format.MessageToString(config))


def parse_config(text: str) -> Any:
    """Read a ``config.pbtxt`` back into Triton's ``ModelConfig``.

    Raises:
        RepositoryError: it is not one.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"not a Triton model configuration: {error}") from error
