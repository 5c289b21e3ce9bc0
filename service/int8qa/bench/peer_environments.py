"""The virtual environment of a peer, made once from its pinned requirements.

In: a peer's folder with ``requirements.txt``. Out: the Python of an environment that
has exactly these packages, under ``bench/.venvs``. An environment is recognised by what
it was made from; one that could not be made leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from int8qa.errors import MissingDependencyError

REQUIREMENTS = "requirements.txt"
TORCH_INDEX_VARIABLE = "INT8QA_TORCH_INDEX"
"""Address of PyTorch's CPU wheel index, as in ``scripts/install``."""
_STAMP = ".int8qa-made-from"
_LONGEST_S = 3600.0


def make_environment(peer: Path, root: Path) -> Path:
    """The environment's Python; quick when it is current.

    Args:
        peer: the peer's folder.
        root: where environments lie.

    Raises:
        MissingDependencyError: it could not be made; says what pip said last.
    """
    requirements = peer / REQUIREMENTS
    directory = root / peer.name
    python = directory / "bin" / "python"
    stamp = directory / _STAMP
    recipe = identify_requirements(requirements)
    if stamp.is_file() and stamp.read_text(encoding="ascii") == recipe:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    try:
        _run([sys.executable, "-m", "venv", str(directory)], peer.name)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
        index = os.environ.get(TORCH_INDEX_VARIABLE)
        torch = read_pins(requirements).get("torch")
        if index and torch:
            _run([*pip, "--index-url", index, f"torch=={torch}"], peer.name)
        _run([*pip, "--requirement", str(requirements)], peer.name)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)  # half of one would pass for whole
        raise
    stamp.write_text(recipe, encoding="ascii")
    return python


def identify_requirements(requirements: Path) -> str:
    """What an environment is recognised by: the file and the Python it is for."""
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    return f"{digest} {sys.version_info.major}.{sys.version_info.minor}"


def read_pins(requirements: Path) -> dict[str, str]:
    """Versions by package, as the file pins them."""
    pins = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals and not name.startswith("#"):
            pins[name.strip()] = version.strip()
    return pins


def _run(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
        )
    except subprocess.TimeoutExpired:
        raise MissingDependencyError(
            f"the environment of {name} was not made within {_LONGEST_S:.0f} s"
        ) from None
    if done.returncode:
        lines = [
            line
            for line in (done.stdout + done.stderr).strip().splitlines()
            if line.strip() and "WARNING" not in line
        ]
        raise MissingDependencyError(
            f"the environment of {name} cannot be made: "
            f"{lines[-1].strip() if lines else 'pip gives no reason'}"
        )
