"""One contestant's processes: its server, and the program that loads it.

In: command lines. Out: a server that is ready and is stopped again; the outcome of one
load. Services get every core; what loads them is pinned to the last one, which they
share with it. Judges nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from int8qa.bench.peer_load import Outcome, PeerSpec
from int8qa.errors import GatewayRequestError

READY_S = 300.0
"""A server that is not ready after so long is broken. Compiling three engines on a busy
machine takes a minute."""
STOP_S = 30.0
LOAD_S = 3600.0
_PROBE_S = 0.25
_OWN_PREFIX = "INT8QA_"
_DROPPED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def choose_pinning(cores: Sequence[int]) -> list[str]:
    """What stands before the command that loads a service.

    Returns:
        ``taskset`` with the last core; empty where there is no taskset or one core.
    """
    if len(cores) < 2 or shutil.which("taskset") is None:
        return []
    return ["taskset", "--cpu-list", str(cores[-1])]


def clean_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of every process here.

    How many threads it takes is a contestant's own choice, and settings of int8qa that
    somebody has exported are not for a measurement.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OWN_PREFIX) and name not in _DROPPED
    }
    return {**kept, **settings}


@contextlib.contextmanager
def run_server(
    command: Sequence[str],
    *,
    ready: str,
    settings: Mapping[str, str],
    log: Path,
) -> Iterator[None]:
    """A server that answers, until the block ends.

    Args:
        command: of the server.
        ready: URL that answers 200 once it is.
        settings: environment variables.
        log: file for what it prints.

    Raises:
        GatewayRequestError: it ended, or was not ready in time.
    """
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=clean_variables(settings),
            start_new_session=True,
        )
    try:
        _await_ready(process, ready, log)
        yield
    finally:
        _stop(process)


def run_load(command: Sequence[str], spec: PeerSpec) -> Outcome:
    """Load a server once.

    Raises:
        GatewayRequestError: the loading program failed.
    """
    target = Path(spec.outcome)
    target.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(spec)) + "\n",
            check=False,
            capture_output=True,
            text=True,
            env=clean_variables({}),
            timeout=LOAD_S,
        )
    except subprocess.TimeoutExpired:
        raise GatewayRequestError(f"not all answers came in {LOAD_S:.0f} s") from None
    if done.returncode or not target.is_file():
        lines = done.stderr.strip().splitlines() or ["it gives no reason"]
        raise GatewayRequestError(
            f"the loading program ended with status {done.returncode}: {lines[-1]}"
        )
    return Outcome(**json.loads(target.read_text(encoding="utf-8")))


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # No proxy of the user's stands between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise GatewayRequestError(
                f"the server ended with status {process.returncode}: {_last_line(log)}"
            )
        try:
            with opener.open(url, timeout=5.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_PROBE_S)
    raise GatewayRequestError(
        f"the server was not ready after {READY_S:.0f} s: {_last_line(log)}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    # Whatever it started and left behind shares its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
