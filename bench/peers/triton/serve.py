"""Triton alone, over the INT8 engine of int8qa's build.

In: a built model repository. Out: a repository with that engine and the ``model.py``
beside this file, configured as Triton's documentation begins: ``dynamic_batching {}``,
all defaults. ``--ragged`` also lets requests of unequal length go together
(``allow_ragged_batch``); without it the client has to pad. Runs in int8qa's own
environment, whose Triton it becomes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
from pathlib import Path

MODEL = "reader"
MAX_BATCH = 8


def write_repository(
    built: Path, target: Path, *, ragged: bool, instances: int, threads: int
) -> None:
    """Lay out Triton's model repository.

    Args:
        built: int8qa's, with OpenVINO engines.
        target: made anew.
        ragged: let unequal lengths go into one batch.
        instances: of the model.
        threads: of each.
    """
    contract = json.loads((built / "contract.json").read_text(encoding="utf-8"))
    shutil.rmtree(target, ignore_errors=True)
    version = target / MODEL / "1"
    version.mkdir(parents=True)
    generation = contract["generation"]
    name = "qa_int8" if generation <= 1 else f"qa_int8_{generation}"
    for file in ("model.xml", "model.bin", "properties.json"):
        (version / file).symlink_to((built / name / "1" / file).resolve())
    shutil.copy(Path(__file__).with_name("model.py"), version)
    config = write_config(contract["inputs"], ragged, instances, threads)
    (target / MODEL / "config.pbtxt").write_text(config, encoding="utf-8")


def write_config(inputs: list[str], ragged: bool, instances: int, threads: int) -> str:
    """``config.pbtxt``."""
    lines = [f'name: "{MODEL}"', 'backend: "python"', f"max_batch_size: {MAX_BATCH}"]
    for name in inputs:
        extra = " allow_ragged_batch: true" if ragged else ""
        lines.append(
            f'input {{ name: "{name}" data_type: TYPE_INT32 dims: -1{extra} }}'
        )
    lines += [
        f'output {{ name: "{name}" data_type: TYPE_FP32 dims: -1 }}'
        for name in ("start_logits", "end_logits")
    ]
    lines += [
        "dynamic_batching { }",
        f"instance_group {{ count: {instances} kind: KIND_CPU }}",
        f'parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}',
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Lay out the repository and become Triton."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--built", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True, help="gRPC")
    parser.add_argument("--health-port", type=int, required=True)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--instances", type=int, default=1)
    given = parser.parse_args()
    repository = given.work.resolve() / "triton-repository"
    write_repository(
        given.built,
        repository,
        ragged=given.ragged,
        instances=given.instances,
        threads=max(1, len(os.sched_getaffinity(0)) // given.instances),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics_port = probe.getsockname()[1]
    command = [sys.executable, "-m", "int8qa.cli", "triton"]
    command += ["--model-repository", str(repository)]
    command += ["--grpc-port", str(given.port), "--http-port", str(given.health_port)]
    command += ["--metrics-port", str(metrics_port)]
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
