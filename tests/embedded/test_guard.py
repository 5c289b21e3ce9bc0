"""The guard process, with a shell in Triton's place."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from int8qa.embedded import guard

LIMIT_S = 30


def start_guard(
    script: str, directory: Path, *, stop_timeout_s: float = 10.0
) -> subprocess.Popen[bytes]:
    """Run a shell script under a guard, in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    specification = {
        "arguments": ["/bin/sh", "-c", script],
        "shm_prefix": f"int8qa-test-{os.getpid()}-",
        "directory": str(directory),
        "stop_timeout_s": stop_timeout_s,
    }
    assert process.stdin is not None
    process.stdin.write(json.dumps(specification).encode() + b"\n")
    process.stdin.flush()
    return process


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for one line of output."""
    assert process.stdout is not None
    return process.stdout.readline()


def wait_until_dead(pid: int) -> None:
    """Fail unless the process ends soon; the kernel takes a moment for it."""
    for _ in range(500):
        process = guard.read_process(pid)
        if process is None or not process.is_alive:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still alive")


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)]
)
def test_status_is_passed_on(script: str, status: int, tmp_path: Path) -> None:
    """The guard ends as its child ended, and keeps the directory for a restart."""
    with start_guard(script, tmp_path) as process:
        assert process.wait(LIMIT_S) == status

    assert tmp_path.exists()


def test_end_of_input_stops_the_child_in_order(tmp_path: Path) -> None:
    """Closing standard input, as our death does, reaches the child as SIGTERM."""
    directory = tmp_path / "private"
    directory.mkdir()
    script = "trap 'echo orderly; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    with start_guard(script, directory) as process:
        assert read_line(process) == b"up\n"
        assert process.stdin is not None
        process.stdin.close()

        assert read_line(process) == b"orderly\n"
        assert process.wait(LIMIT_S) == 3

    assert not directory.exists()


def test_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """After the limit the child is killed."""
    script = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    with start_guard(script, tmp_path, stop_timeout_s=0.1) as process:
        read_line(process)
        process.send_signal(signal.SIGTERM)

        assert process.wait(LIMIT_S) == 128 + signal.SIGKILL


def test_orphans_of_the_child_are_killed(tmp_path: Path) -> None:
    """What a dead child leaves in its group ends with it."""
    script = "(trap '' TERM; sleep 600) & echo $!; kill -9 $$"
    with start_guard(script, tmp_path) as process:
        orphan = int(read_line(process))
        assert process.wait(LIMIT_S) == 137

    wait_until_dead(orphan)


def test_killed_guard_takes_the_child_along(tmp_path: Path) -> None:
    """The kernel ends the child when the guard itself is killed."""
    with start_guard("echo $$; exec sleep 600", tmp_path) as process:
        child = int(read_line(process))
        process.kill()
        process.wait(LIMIT_S)

    wait_until_dead(child)


def test_missing_program_is_told(tmp_path: Path) -> None:
    """A server that cannot be executed is named on the output."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    specification = {
        "arguments": [str(tmp_path / "absent")],
        "shm_prefix": f"int8qa-test-{os.getpid()}-",
        "directory": str(tmp_path),
        "stop_timeout_s": 1.0,
    }
    output, _ = process.communicate(json.dumps(specification).encode(), LIMIT_S)

    assert process.returncode == guard.CANNOT_START
    assert b"cannot start" in output
    assert b"absent" in output


def test_shared_memory_is_removed_by_prefix(tmp_path: Path) -> None:
    """Only regions of the prefix go."""
    for name in ("ours-1", "ours-2", "theirs"):
        (tmp_path / name).touch()

    guard.remove_shared_memory("ours-", root=tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_no_descriptor_left_is_not_taken_for_a_death() -> None:
    """A process that cannot be looked at is no process that is gone."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            guard.read_process(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert guard.read_process(2**30) is None
