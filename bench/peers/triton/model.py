"""Triton's Python backend over an OpenVINO model, as one would write it first.

In: the requests that Triton's dynamic batcher put together. They are padded to the
longest of them, run as one batch, and cut apart. Lengths are rounded up to 16, without
which OpenVINO would compile for nearly every batch anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import triton_python_backend_utils as pb_utils

STEP_TOKENS = 16
OUTPUTS = ("start_logits", "end_logits")


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._inputs = [entry["name"] for entry in config["input"]]
        parameters = config["parameters"]
        directory = Path(args["model_repository"]) / args["model_version"]
        threads = int(parameters["threads"]["string_value"])
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(directory / "model.xml"),
            "CPU",
            {
                **json.loads((directory / "properties.json").read_text("utf-8")),
                "INFERENCE_NUM_THREADS": threads,
                # Each instance would pin its threads to the first cores.
                "ENABLE_CPU_PINNING": threads >= len(os.sched_getaffinity(0)),
            },
        )
        self._request = compiled.create_infer_request()

    def execute(self, requests: list[Any]) -> list[Any]:
        feeds = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            for request in requests
        ]
        longest = max(feed[self._inputs[0]].shape[1] for feed in feeds)
        length = -(-longest // STEP_TOKENS) * STEP_TOKENS
        merged = {
            name: np.concatenate(
                [
                    np.pad(feed[name], ((0, 0), (0, length - feed[name].shape[1])))
                    for feed in feeds
                ]
            )
            for name in self._inputs
        }
        self._request.infer(merged)
        logits = [self._request.get_tensor(name).data for name in OUTPUTS]
        responses = []
        low = 0
        for feed in feeds:
            rows, width = feed[self._inputs[0]].shape
            responses.append(
                pb_utils.InferenceResponse(
                    [
                        # Copies: the request reuses its memory for the next batch.
                        pb_utils.Tensor(name, np.array(part[low : low + rows, :width]))
                        for name, part in zip(OUTPUTS, logits, strict=True)
                    ]
                )
            )
            low += rows
        return responses
