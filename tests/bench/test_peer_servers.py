"""Servers that others wrote: awaited, and stopped with everything they started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from int8qa.bench import peer_servers
from int8qa.bench.peer_load import PeerSpec
from int8qa.bench.peer_servers import run_load, run_server
from int8qa.errors import GatewayRequestError
from tests.bench.peer_fakes import serve_answers

FAMILY = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
from pathlib import Path
path = Path(sys.argv[1])
path.with_suffix(".new").write_text(str(child.pid))
path.with_suffix(".new").rename(path)
time.sleep(3600)
"""


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_children_go_with_their_server(tmp_path: Path) -> None:
    """Workers that it does not stop itself are killed."""
    told = tmp_path / "pid"
    command = [sys.executable, "-c", FAMILY, str(told)]
    with (
        serve_answers() as other,
        run_server(command, ready=other.url, settings={}, log=tmp_path / "log"),
    ):
        while not told.exists():
            time.sleep(0.01)
        child = int(told.read_text())
        assert is_alive(child)
    while is_alive(child):
        time.sleep(0.01)


def test_server_that_never_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has its last line; it is stopped all the same."""
    monkeypatch.setattr(peer_servers, "READY_S", 0.0)
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import time; time.sleep(3600)"]
    with (
        pytest.raises(GatewayRequestError, match="not ready after 0 s: it printed"),
        run_server(command, ready="http://127.0.0.1:9", settings={}, log=log),
    ):
        pytest.fail("it is not ready")


def test_loading_program_that_fails(tmp_path: Path) -> None:
    """An outcome that an earlier one left is not taken for its own."""
    outcome = tmp_path / "outcome.json"
    outcome.write_text("{}")
    spec = PeerSpec("", "", str(outcome), "", 1, 0)
    command = [sys.executable, "-c", "raise SystemExit('no such engine')"]
    with pytest.raises(GatewayRequestError, match="status 1: no such engine"):
        run_load(command, spec)
    with pytest.raises(GatewayRequestError, match="status 0: it gives no reason"):
        run_load([sys.executable, "-c", "pass"], spec)
