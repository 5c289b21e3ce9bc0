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
