"""ONNX Runtime behind LitServe, with LitServe's own batching.

In: the ONNX float32 model of int8qa's build and its tokenizer. After LitServe's
documentation: ``decode_request``, ``batch``, ``predict``, ``unbatch``,
``encode_response``; for CPUs it advises as many workers as there are cores, hence
``--workers``. A worker's ONNX Runtime gets its share of the cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reading import Reading, find_answer, pad_windows

Read = tuple[str, list[Any]]
"""A context and its windows."""


class ReaderApi(litserve.LitAPI):  # type: ignore[misc]
    """One worker."""

    def __init__(self, model: Path, tokenizer: Path, threads: int, batch: int) -> None:
        """Where things are; what is heavy waits for ``setup`` in the worker."""
        super().__init__(max_batch_size=batch, batch_timeout=0.01, api_path="/answer")
        self._paths = (model, tokenizer)
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load the model."""
        del device
        import onnxruntime

        model, tokenizer = self._paths
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        self.session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self.reading = Reading(tokenizer)

    def decode_request(self, request: dict[str, str]) -> Read:
        """JSON to windows."""
        context = request["context"]
        return context, self.reading.split(request["question"], context)

    def batch(self, inputs: Sequence[Read]) -> Sequence[Read]:
        """As they are; ``predict`` lays all windows into one batch."""
        return inputs

    def predict(self, inputs: Sequence[Read] | Read) -> list[str]:
        """One batch of all windows, padded to the longest."""
        reads = list(inputs)
        feed = pad_windows([window for _, windows in reads for window in windows])
        names = {port.name for port in self.session.get_inputs()}
        starts, ends = self.session.run(
            ["start_logits", "end_logits"],
            {name: array for name, array in feed.items() if name in names},
        )
        bounds = np.cumsum([0, *(len(windows) for _, windows in reads)])
        return [
            find_answer(context, windows, starts[low:high], ends[low:high])
            for (context, windows), low, high in zip(
                reads, bounds[:-1], bounds[1:], strict=True
            )
        ]

    def unbatch(self, output: list[str]) -> list[str]:
        """One answer each."""
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        """To JSON."""
        return {"answer": output}


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    api = ReaderApi(
        given.model, given.tokenizer, max(1, cores // given.workers), given.batch
    )
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=given.workers, timeout=60
    )
    server.run(
        host="127.0.0.1",
        port=given.port,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
