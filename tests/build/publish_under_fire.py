"""Publishes over and over, each time struck at the next step. Run as a program.

Each try is a forked child, struck by an audit hook right before its n-th access to the
file system: ``kill`` ends the process there, ``fail`` makes the access fail. Writes one
JSON object: the states the target was found in, and every fault.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from int8qa.build.repository import find_current, stage_repository
from int8qa.contract import Contract, ModelRecord, Precision
from int8qa.errors import RepositoryError

KILLED = 137
REFUSED = 3
SURVIVED = 4
WATCHED = ("open", "os.")


def make_contract(build_id: str) -> Contract:
    return Contract(
        build_id=build_id,
        checkpoint="tiny",
        tokenizer_sha256="0" * 64,
        pad_token_id=0,
        inputs=("input_ids", "attention_mask"),
        max_window_tokens=64,
        sequence_buckets=(32, 64),
        batch_sizes=(1, 2),
        max_batch_tokens=128,
        models={
            precision: ModelRecord(
                name=precision.model_name,
                engine="openvino",
                calibrator="none",
                recipe="none",
                f1=1.0,
                exact_match=1.0,
                size_bytes=3,
            )
            for precision in Precision
        },
    )


def publish(target: Path, build_id: str, *, beside: bool = False) -> None:
    """What a build does with a repository, with small files for models."""
    with stage_repository(target) as staged:
        (staged.directory / "tokenizer.json").write_text("{}")
        for precision in Precision:
            directory = staged.model_directory(precision.model_name)
            (directory / "model.xml").write_text(build_id)
            staged.write_config(precision.model_name, f"# {build_id}")
        staged.publish(make_contract(build_id), {"build_id": build_id}, beside=beside)


def strike(step: int, mode: str, root: Path) -> list[str]:
    """From here on, the ``step``-th access below ``root`` does not take place.

    Returns:
        An empty list; the access struck will be appended.
    """
    counter = itertools.count()
    struck: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith(WATCHED) or not arguments:
            return
        if not str(arguments[0]).startswith(str(root)) or next(counter) != step:
            return
        if mode == "kill":
            os._exit(KILLED)
        struck.append(event)
        raise OSError(errno.EIO, "struck", str(arguments[0]))

    sys.addaudithook(hook)
    return struck


def try_to_publish(target: Path, step: int, mode: str) -> int:
    """Exit status of a child that publishes ``new`` and is struck at ``step``."""
    child = os.fork()
    if child == 0:
        try:
            struck = strike(step, mode, target.parent)
            publish(target, "new")
        except RepositoryError:
            os._exit(REFUSED)
        except BaseException as error:  # noqa: BLE001 - told apart from a refusal
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(SURVIVED if struck else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(target: Path) -> str:
    if not target.exists():
        return "absent"
    for build_id in ("old", "new"):
        if find_current(target, build_id):
            return build_id
    return "half"


def main(root: Path, mode: str) -> None:
    states: list[str] = []
    faults: list[str] = []
    for step in itertools.count():
        parent = root / f"{mode}-{step}"
        target = parent / "model_repository"
        publish(target, "old")
        (target / "README.md").write_text("kept")
        status = try_to_publish(target, step, mode)
        state = state_of(target)
        states.append(state)
        if status not in {0, KILLED, REFUSED, SURVIVED}:
            faults.append(f"step {step}: exit {status}")
        if status in {0, SURVIVED} and state != "new":
            faults.append(f"step {step}: success, but {state}")
        publish(target, "next")
        left = sorted(path.name for path in parent.iterdir())
        if find_current(target, "next") is None or left != ["model_repository"]:
            faults.append(f"step {step}: the next build left {left}")
        elif not (target / "README.md").is_file():
            faults.append(f"step {step}: README.md is lost")
        shutil.rmtree(parent)
        if status == 0:
            break
    print(json.dumps({"states": states, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
