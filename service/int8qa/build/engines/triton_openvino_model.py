"""Triton's Python backend running an OpenVINO IR. Copied into the model repository.

In: int32 tensors [B, S] as the contract names them. Out: float32 start and end logits
[B, S]. It stands alone: inside Triton neither int8qa nor torch need be installed,
only numpy and openvino. Precision and warm-up shapes come from ``config.pbtxt``.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import triton_python_backend_utils as pb_utils

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")


class TritonPythonModel:
    """One instance of one precision."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {
            name: value["string_value"] for name, value in config["parameters"].items()
        }
        names = {entry["name"] for entry in config["input"]}
        self._inputs = tuple(name for name in INPUTS if name in names)
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": parameters["inference_precision_hint"],
            "PERFORMANCE_HINT": "LATENCY",
        }
        threads = int(os.environ.get("INT8QA_EMBEDDED__ENGINE_THREADS", "0"))
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        directory = Path(args["model_repository"]) / args["model_version"]
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(directory / "model.xml"), "CPU", properties
        )
        self._request = compiled.create_infer_request()
        self._outputs = [compiled.output(name) for name in OUTPUTS]
        self._batch_sizes = sorted(json.loads(parameters["batch_sizes"]), reverse=True)
        # OpenVINO compiles primitives for each new shape; the first caller of a
        # length should not pay for that.
        for length in json.loads(parameters["sequence_buckets"]):
            self._infer({name: np.ones((1, length), np.int32) for name in self._inputs})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests that Triton's dynamic batcher put together.

        Their lengths are equal. Their rows run in batches of the sizes the engine
        knows, so that merging never makes up a new shape.
        """
        feeds = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            for request in requests
        ]
        if len(feeds) == 1 and len(feeds[0][self._inputs[0]]) in self._batch_sizes:
            return [self._respond(*self._infer(feeds[0]))]
        try:
            merged = {
                name: np.concatenate([feed[name] for feed in feeds])
                for name in self._inputs
            }
        except ValueError:  # lengths differ: a caller without dynamic batching
            return [self._respond(*self._infer(feed)) for feed in feeds]
        start, end = self._infer_rows(merged)
        bounds = np.cumsum([0, *(len(feed[self._inputs[0]]) for feed in feeds)])
        return [
            self._respond(start[low:high], end[low:high])
            for low, high in itertools.pairwise(bounds)
        ]

    def _infer_rows(self, feed: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(feed[self._inputs[0]])
        parts = []
        low = 0
        while low < rows:
            size = next((s for s in self._batch_sizes if s <= rows - low), rows - low)
            parts.append(
                self._infer(
                    {name: array[low : low + size] for name, array in feed.items()}
                )
            )
            low += size
        return tuple(np.concatenate(logits) for logits in zip(*parts, strict=True))

    def _infer(self, feed: dict[str, Any]) -> tuple[Any, Any]:
        self._request.infer(feed)
        # Copies: the request reuses its output memory for the next batch.
        start, end = (self._request.get_tensor(port).data for port in self._outputs)
        return start.astype(np.float32), end.astype(np.float32)

    def _respond(self, start: Any, end: Any) -> Any:
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(OUTPUTS[0], start),
                pb_utils.Tensor(OUTPUTS[1], end),
            ]
        )
