"""Triton's Python backend running an OpenVINO IR. Copied into the model repository.

In: int32 tensors [B, S] as the contract names them. Out: float32 start and end logits
[B, S]. It stands alone: inside Triton neither int8qa nor torch need be installed,
only numpy and openvino. Warm-up shapes come from ``config.pbtxt``, what float
operations run in from ``properties.json`` beside the model; ``cpu.json`` says what the
CPU must have, where not every CPU will do.

Of several instances each can run on all cores, or on its share of them. A batch that
its sender calls alone gets all: nobody else needs them, and it is answered soonest. Any
other gets the share: batches side by side on a core each answer more questions than one
after the other on all cores, whose threads wait for one another.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import triton_python_backend_utils as pb_utils

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
ALONE = "alone"
"""Request parameter: nothing else of its sender is in this model."""


def check_cpu(path: Path, info: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse a model whose sums would overflow on this CPU.

    Raises:
        TritonModelException: none of the instruction sets it needs one of is there.
    """
    if not path.exists() or not info.exists():
        return
    wanted = json.loads(path.read_text(encoding="utf-8"))["any_of"]
    if not set(wanted) & set(info.read_text(encoding="utf-8").split()):
        raise pb_utils.TritonModelException(
            f"this model was built for CPUs with {' or '.join(wanted)}, and this CPU "
            f"has none of them: its INT8 sums would overflow. Run `int8qa build` here, "
            f"or on a machine like this one"
        )


def list_shapes(
    lengths: list[int], batch_sizes: list[int], most: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What to run before the first caller comes: OpenVINO compiles for each new shape.

    Args:
        lengths: padded tokens, ascending.
        batch_sizes: windows.
        most: padded tokens of a batch of several windows.

    Returns:
        Single windows of every length; and batches (B, S) of every fourth length, S
        ascending for each B, up to the longest. The rest compile when they come, in 3
        to 6 ms each: to run one of them beforehand takes 30 to 130 ms.
    """
    some = lengths[::-1][::4][::-1]
    batches = [(b, s) for b in batch_sizes if b > 1 for s in some if b * s <= most]
    return [(1, length) for length in lengths], batches


class TritonPythonModel:
    """One instance of one precision."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {
            name: value["string_value"] for name, value in config["parameters"].items()
        }
        names = {entry["name"] for entry in config["input"]}
        self._inputs = tuple(name for name in INPUTS if name in names)
        directory = Path(args["model_repository"]) / args["model_version"]
        check_cpu(directory / "cpu.json")
        properties: dict[str, Any] = json.loads(
            (directory / "properties.json").read_text(encoding="utf-8")
        )
        # Beside a gateway, and other instances, the cores are not this one's to pin.
        properties["ENABLE_CPU_PINNING"] = False
        threads = int(os.environ.get("INT8QA_EMBEDDED__ENGINE_THREADS", "0"))
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        instances = sum(group["count"] for group in config["instance_group"])
        core = openvino.Core()
        model = core.read_model(directory / "model.xml")
        compiled = core.compile_model(model, "CPU", properties)
        self._alone = self._beside = compiled.create_infer_request()
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        share = math.ceil(threads / instances)
        if share < threads:
            properties["INFERENCE_NUM_THREADS"] = share
            compiled = core.compile_model(model, "CPU", properties)
            self._beside = compiled.create_infer_request()
        self._batch_sizes = sorted(json.loads(parameters["batch_sizes"]), reverse=True)
        lengths = json.loads(parameters["sequence_buckets"])
        most = int(parameters["max_batch_tokens"])
        singles, batches = list_shapes(lengths, self._batch_sizes, most)
        # What is alone is one window as a rule, or those of one long document.
        documents = list({batch: (batch, length) for batch, length in batches}.values())
        warm_up = {self._alone: singles + documents}
        warm_up[self._beside] = singles + batches
        for engine, shapes in warm_up.items():
            for shape in shapes:
                ones = np.ones(shape, np.int32)
                self._infer(engine, dict.fromkeys(self._inputs, ones))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one request, or several where an operator has Triton merge them.

        Rows run in batches of the sizes the engine knows, so that merging never makes
        up a new shape.
        """
        alone = len(requests) == 1 and json.loads(requests[0].parameters()).get(ALONE)
        engine = self._alone if alone else self._beside
        feeds = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            for request in requests
        ]
        if len(feeds) == 1 and len(feeds[0][self._inputs[0]]) in self._batch_sizes:
            return [self._respond(*self._infer(engine, feeds[0]))]
        try:
            merged = {
                name: np.concatenate([feed[name] for feed in feeds])
                for name in self._inputs
            }
        except ValueError:  # lengths differ: a caller without dynamic batching
            return [self._respond(*self._infer(engine, feed)) for feed in feeds]
        start, end = self._infer_rows(engine, merged)
        bounds = np.cumsum([0, *(len(feed[self._inputs[0]]) for feed in feeds)])
        return [
            self._respond(start[low:high], end[low:high])
            for low, high in itertools.pairwise(bounds)
        ]

    def _infer_rows(self, engine: Any, feed: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(feed[self._inputs[0]])
        parts = []
        low = 0
        while low < rows:
            size = next((s for s in self._batch_sizes if s <= rows - low), rows - low)
            part = {name: array[low : low + size] for name, array in feed.items()}
            parts.append(self._infer(engine, part))
            low += size
        return tuple(np.concatenate(logits) for logits in zip(*parts, strict=True))

    def _infer(self, engine: Any, feed: dict[str, Any]) -> tuple[Any, Any]:
        engine.infer(feed)
        # Copies: the request reuses its output memory for the next batch.
        start, end = (engine.get_tensor(name).data for name in OUTPUTS)
        return start.astype(np.float32), end.astype(np.float32)

    def _respond(self, start: Any, end: Any) -> Any:
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(OUTPUTS[0], start),
                pb_utils.Tensor(OUTPUTS[1], end),
            ]
        )
