"""Tiny model repositories for a real Triton: numpy only, no engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """
name: "%s"
backend: "python"
max_batch_size: 8
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "attention_mask" data_type: TYPE_INT32 dims: [ -1 ] }
]
output [
  { name: "start_logits" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "end_logits" data_type: TYPE_FP32 dims: [ -1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

MODEL = """
import ctypes
import os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        threads = os.environ["INT8QA_EMBEDDED__ENGINE_THREADS"]
        pb_utils.Logger.log_info("engine threads " + threads)
        {on_initialize}

    def execute(self, requests):
        {on_execute}
        responses = []
        for request in requests:
            tensors = []
            for source, target in (("input_ids", "start_logits"),
                                   ("attention_mask", "end_logits")):
                tensor = pb_utils.get_input_tensor_by_name(request, source)
                values = tensor.as_numpy().astype(np.float32)
                tensors.append(pb_utils.Tensor(target, values))
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""

HANG_HOLDING_THE_GIL = "ctypes.PyDLL(None).sleep(120)"

MakeRepository = Callable[..., Path]


@pytest.fixture
def make_repository(tmp_path: Path) -> MakeRepository:
    """Write a repository of one model that returns its inputs as floats."""

    def make(
        name: str = "echo", *, on_initialize: str = "pass", on_execute: str = "pass"
    ) -> Path:
        version = tmp_path / "repository" / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(CONFIG % name)
        (version / "model.py").write_text(
            MODEL.format(on_initialize=on_initialize, on_execute=on_execute)
        )
        return tmp_path / "repository"

    return make
