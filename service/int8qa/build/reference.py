"""Torch and ONNX Runtime: what the forms of a model are held against.

In: a float reader, or its ONNX graph. Out: functions from windows to logits. Not the
engine we compile for: an independent reading of the graph tells a wrong export from a
wrong compilation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from int8qa.build.accuracy import Infer, Logits

if TYPE_CHECKING:
    import onnx
    import torch


def run_torch(reader: torch.nn.Module, inputs: Sequence[str]) -> Infer:
    """The reader itself.

    Args:
        reader: takes one int32 tensor [B, S] per name of ``inputs``.
        inputs: names of the inputs, in order.
    """
    import torch

    def infer(feed: Mapping[str, Any]) -> Logits:
        with torch.no_grad():
            start, end = reader(*(torch.from_numpy(feed[name]) for name in inputs))
        return start.numpy(), end.numpy()

    return infer


def run_onnx(graph: onnx.ModelProto) -> Infer:
    """The graph in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def infer(feed: Mapping[str, Any]) -> Logits:
        start, end = session.run(None, dict(feed))
        return start, end

    return infer
