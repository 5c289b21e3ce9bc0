"""What a run was, as JSON: the part that is known without having trained.

In: options, material and the directory written. Out: the members of training.json that
the card is written from. Times and losses are added by run.py.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from int8qa import __version__
from int8qa.build.checkpoint import CheckpointFiles
from int8qa.build.repository import hash_file
from int8qa.training.material import Material
from int8qa.training.options import TrainingOptions

_PACKAGES = ("torch", "transformers", "accelerate", "nvidia-modelopt")


def describe_run(
    options: TrainingOptions,
    *,
    files: CheckpointFiles,
    teacher_files: CheckpointFiles | None,
    material: Material,
    directory: Path,
    quantized_tensors: int,
    scores: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The report, but for what only the training itself knows.

    Args:
        options: of the run.
        files: the start's.
        teacher_files: the teacher's, if there is one.
        material: what was trained on.
        directory: of the checkpoint written.
        quantized_tensors: sites of the recipe; 0 without QAT.
        scores: see run.py.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = material.checkpoint.model
    sizes = [p.numel() for n, p in model.named_parameters() if "_quantizer" not in n]
    return {
        "name": options.output.resolve().name,
        "architecture": config["architectures"][0],
        "parameters": sum(sizes),
        "dtype": options.dtype,
        "weights_sha256": hash_file(directory / "model.safetensors"),
        "start": {
            "name": files.name,
            "sha256": files.sha256,
            "fresh_head": material.fresh_head,
        },
        "teacher": teacher_files
        and {"name": teacher_files.name, "sha256": teacher_files.sha256},
        "options": options.describe(),
        "quantized_tensors": quantized_tensors,
        "data": [count.to_json() for count in material.examples.counts],
        "max_window_tokens": material.max_window_tokens,
        "doc_stride": material.doc_stride,
        "scores": list(scores),
        "versions": {
            "int8qa": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
