"""`int8qa bench rehearsal` over real Tritons, and interrupted."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Service, free_port, group_of, start_service

pytestmark = [pytest.mark.triton, pytest.mark.slow]
LIMIT_S = 900.0


def start_rehearsal(repository: Path, output: Path) -> Service:
    """As a user starts it, with the shortest phases."""
    return start_service(
        free_port(),
        command=[
            *(sys.executable, "-m", "int8qa.cli", "bench", "rehearsal"),
            *("--model-repository", str(repository), "--output", str(output)),
            *("--phase-seconds", "4"),
        ],
    )


def find_gateways(running: Service) -> set[int]:
    """Processes of `int8qa serve` whose environment names this run's Tritons."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            serves = b"\0serve\0" in path.read_bytes()
            group = int(
                (path.parent / "stat").read_text().rpartition(")")[2].split()[2]
            )
        except OSError:
            continue
        if serves and group == running.process.pid:
            found.add(int(path.parent.name))
    return found


def test_no_request_fails_whatever_happens_to_one(
    demo_repository: Path, tmp_path: Path
) -> None:
    """Killed, stopped, replaced, drained: all answered, and builds never mixed."""
    running = start_rehearsal(demo_repository, tmp_path)
    try:
        code = running.process.wait(LIMIT_S)
    finally:
        running.stop()
    assert code == 0, "".join(running.lines[-30:])
    result = json.loads((tmp_path / "rehearsal.json").read_text())
    assert result["problems"] == []
    phases = {phase["name"]: phase for phase in result["phases"]}
    assert len(phases) == 7
    assert sum(phase["asked"] for phase in phases.values()) > 20
    windows = result["newer_windows"]
    assert windows["computed"] == windows["sent"] > 0
    rush = [use for use in result["tritons"] if use["phase"] == "rush"]
    assert all(0 < use["executions"] <= use["requests"] for use in rush)
    # Each gateway lost one Triton of three for a while, and for another build.
    for counts in result["serving"]["gateways"]:
        assert {2, 3} <= set(counts)
    assert group_of(running) == set()


def test_interrupt_leaves_nothing_running(
    demo_repository: Path, tmp_path: Path
) -> None:
    """Ctrl-C under load: a line that says so, and no process of it."""
    running = start_rehearsal(demo_repository, tmp_path)
    try:
        limit = time.monotonic() + LIMIT_S
        while not any("clients ask" in line for line in running.lines):
            assert running.process.poll() is None, "".join(running.lines)
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert len(find_gateways(running)) == 2
        assert len(group_of(running)) >= 3
    finally:
        code = running.stop(signal.SIGINT)
    assert code == 130
    assert "nothing is left running" in running.lines[-1]
    assert find_gateways(running) == group_of(running) == set()
    assert not (tmp_path / "rehearsal.json").exists()
