"""What is watched of a process and its children."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from int8qa.bench.processes import Watch, list_family
from int8qa.errors import GatewayRequestError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
files = [open("/dev/null") for _ in range(40)]
print(child.pid, flush=True)
input()
child.communicate(b"\\n")
print("child ended", flush=True)
input()
"""


def test_family() -> None:
    """Parent and child have a curve each; one that ends keeps what it had."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        child = int(process.stdout.readline())
        assert list_family(process.pid) == [process.pid, child]
        watch = Watch(process.pid)
        watch.sample(0.0)
        parent_curve, child_curve = watch.curves
        assert parent_curve.name.endswith(f" {process.pid}")
        assert parent_curve.descriptors[0] > 40 > child_curve.descriptors[0]
        # The child may be so young that it has hardly a page.
        assert parent_curve.rss_mib[0] > child_curve.rss_mib[0] > 0
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "child ended\n"
        watch.sample(1.04)
        assert (parent_curve.ended, child_curve.ended) == (False, True)
        assert (len(parent_curve.rss_mib), len(child_curve.rss_mib)) == (2, 1)
        assert watch.time_s == [0.0, 1.0]
    finally:
        process.kill()
        process.communicate()
    watch.sample(2.0)
    assert parent_curve.ended


def test_no_such_process() -> None:
    """The message says how to find the right one."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(
        GatewayRequestError, match=rf"watch process {gone.pid}: No such"
    ):
        Watch(gone.pid)


def test_a_zombie() -> None:
    """A process that ended and was not waited for is not watched."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(GatewayRequestError, match="it has ended"):
            Watch(pid)
    finally:
        os.waitpid(pid, 0)
