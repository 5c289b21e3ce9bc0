"""What holds for every test, and the command line for those who need it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from int8qa import cli
from tests.command_line import Finished, Run

# How long an example takes is the machine's affair: no test is timed.
settings.register_profile("int8qa", deadline=None)
settings.load_profile("int8qa")


WHOLE = "tests/integration/"
"""Tests of whole services: each takes the machine, and all share a built repository."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of whole services, which take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(WHOLE))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, one gets all tests of whole services, or all of a file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return WHOLE if nodeid.startswith(WHOLE) else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run ``int8qa`` without this machine's variables, in a directory of its own."""
    for name in list(os.environ):
        if name.upper().startswith("INT8QA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["int8qa", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as finished:
            code = finished.code or 0
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return call
