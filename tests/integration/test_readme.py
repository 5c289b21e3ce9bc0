"""The README's commands do what it says: each is run here, or by CI itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Service

pytestmark = pytest.mark.triton

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_BY_CI = {"make up", "make test", "make check"}
"""`make up` starts the service of these very tests; the others are .ci/run."""


def _blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def _run(text: str, service: Service, shell: list[str]) -> str:
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{service.port}")
    text = text.replace(
        ".venv/bin/int8qa", f"{shlex.quote(sys.executable)} -m int8qa.cli"
    )
    return subprocess.run(
        [*shell, text],
        cwd=ROOT,
        env={**os.environ, "INT8QA_PORT": str(service.port)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


@pytest.mark.parametrize("block", _blocks("sh"))
def test_shell_commands_work(block: str, service: Service) -> None:
    """Each block ends with status 0 and prints something of use."""
    output = _run(block, service, ["bash", "-euc"])
    assert output.strip()
    if block.startswith("curl"):
        assert json.loads(output)["answer"]["text"]
    if " ask " in block:
        assert output.startswith("Ana Brzić")


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_code_works(block: str, service: Service) -> None:
    """The code runs as it stands, and finds the answer."""
    assert "Ana" in _run(block, service, [sys.executable, "-c"])


def test_other_commands_are_run_by_ci() -> None:
    """Blocks without a language hold only what CI runs itself, or the file tree."""
    for text in _blocks(""):
        if text.startswith("service/int8qa/"):
            continue
        assert {line for line in text.splitlines() if line} <= RUN_BY_CI


def test_listed_files_exist() -> None:
    """The tree in the README names real files, and no module is left out."""
    tree = next(t for t in _blocks("") if t.startswith("service/int8qa/"))
    listed = set(re.findall(r"(\w+)\.py\b", tree))
    modules = {
        path.stem
        for path in (ROOT / "service/int8qa").rglob("*.py")
        if path.stem != "__init__"
    }
    assert listed == modules


def test_linked_files_exist() -> None:
    """No link of README or docs to a file of ours is dead."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / Path(target)).exists(), (page, target)
