"""The parent of `tritonserver`: no process of it outlives int8qa.

A script of the standard library alone, run as ``python -I -S guard.py``. In: one
line of JSON on standard input, then silence; end of file means stop, also when
int8qa was killed. Out: Triton's own output and exit status. When Triton ends for
whatever reason, its process group and shared memory are removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's name for it
CANNOT_START = 127
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_LIMIT_S = 5.0


@dataclass(frozen=True)
class ProcessStatus:
    """What the kernel says about one process."""

    pid: int
    name: str
    """At most 15 characters."""
    state: str
    group: int

    @property
    def is_alive(self) -> bool:
        """False for a zombie: nothing of it runs any more."""
        return self.state not in {"Z", "X"}


def read_process(pid: int) -> ProcessStatus | None:
    """Read one process's status; None when it is gone or hidden from us.

    Source: proc_pid_stat(5), fields 1, 2, 3 and 5.

    Raises:
        OSError: it cannot be told, for want of file descriptors above all.
    """
    try:
        text = Path("/proc", str(pid), "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return ProcessStatus(pid, name, fields[0], int(fields[2]))


def iter_group(group: int) -> Iterator[ProcessStatus]:
    """Yield the living processes of a process group."""
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a name is all we need
        if entry.isdigit():
            process = read_process(int(entry))
            if process is not None and process.group == group and process.is_alive:
                yield process


def remove_shared_memory(prefix: str, *, root: Path = SHARED_MEMORY) -> None:
    """Remove the shared-memory regions whose name begins with ``prefix``."""
    with contextlib.suppress(OSError):
        for path in root.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def main() -> int:
    """Run Triton to its end; return its status, 128 + signal where one ended it."""
    line = _read_line(0)
    if not line:  # int8qa ended before it said what to start
        return CANNOT_START
    specification = json.loads(line)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    asked_to_stop = []
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked_to_stop.append(True))

    libc = ctypes.CDLL(None, use_errno=True)
    # Stubs whose Triton dies become our children, so that they can be reaped.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = _spawn(specification["arguments"], libc)

    status: int | None = None
    deadline_s: float | None = None
    watched = [0, wake_read]
    while status is None:
        left_s = None if deadline_s is None else max(0, deadline_s - time.monotonic())
        readable, _, _ = select.select(watched, [], [], left_s)
        if wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
        if 0 in readable and not os.read(0, 4096):
            watched.remove(0)
            asked_to_stop.append(True)
        status = _reap(child)
        if status is None and asked_to_stop and deadline_s is None:
            os.kill(child, signal.SIGTERM)
            deadline_s = time.monotonic() + specification["stop_timeout_s"]
        elif status is None and deadline_s and time.monotonic() >= deadline_s:
            os.kill(child, signal.SIGKILL)
            deadline_s += 1.0
    _sweep()
    remove_shared_memory(specification["shm_prefix"])
    if asked_to_stop:
        shutil.rmtree(specification["directory"], ignore_errors=True)
    return status


def _read_line(descriptor: int) -> bytes:
    """Read up to a newline and not a byte further."""
    line = bytearray()
    while byte := os.read(descriptor, 1):
        if byte == b"\n":
            break
        line += byte
    return bytes(line)


def _spawn(arguments: list[str], libc: ctypes.CDLL) -> int:
    """Fork and exec; safe here because this process has a single thread."""
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # killed before the line above took effect
            os._exit(CANNOT_START)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # SIGPIPE stays ignored, as Python set it: with int8qa killed, Triton's log
        # has no reader, and that must not keep it from an orderly exit.
        os.execv(arguments[0], arguments)  # noqa: S606
    except OSError as error:
        os.write(2, f"error: cannot start {arguments[0]}: {error}\n".encode())
    finally:
        os._exit(CANNOT_START)


def _reap(child: int) -> int | None:
    """Collect ended children; return Triton's status once it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(wait_status)
                status = code if code >= 0 else 128 - code
    return status


def _sweep() -> None:
    """Kill what Triton left in our process group: its stubs, above all."""
    own = os.getpid()
    deadline_s = time.monotonic() + _SWEEP_LIMIT_S
    while time.monotonic() < deadline_s:
        left = [p.pid for p in iter_group(os.getpgid(0)) if p.pid != own]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(own)
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
