"""A gateway of our own in front of a Triton that runs already, for as long as needed.

In: Triton's address and a model repository. Out: the gateway's address, once it is
ready. A process of its own, as LoadGen's rules want the service apart from the load.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from int8qa.embedded.launch import pick_free_port
from int8qa.errors import GatewayRequestError

STOP_TIMEOUT_S = 30.0


@contextlib.contextmanager
def run_gateway(
    triton_url: str, repository: Path, *, ready_timeout_s: float = 120.0
) -> Iterator[str]:
    """Run ``int8qa serve`` until the block is left; yields its base URL.

    The live comparison is off: it would ask INT8's questions of FP16 again.

    Raises:
        GatewayRequestError: it ended, or was not ready in time; has its last words.
    """
    port = pick_free_port()
    settings = {
        "INT8QA_HOST": "127.0.0.1",
        "INT8QA_PORT": str(port),
        "INT8QA_TRITON__URL": triton_url,
        "INT8QA_MODEL_REPOSITORY": str(repository),
        "INT8QA_COMPARISON__FRACTION": "0",
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "int8qa.cli", "serve"],
            env=os.environ | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            if not _wait_ready(url, process, ready_timeout_s):
                log.seek(0)
                last = [line.strip() for line in log if line.strip()][-1:]
                status = process.poll()
                state = (
                    f"was not ready after {ready_timeout_s:.0f} s"
                    if status is None
                    else f"ended with status {status}"
                )
                raise GatewayRequestError(
                    f"the gateway started for the load {state}: "
                    f"{last[0] if last else 'it said nothing'}"
                )
            yield url
        finally:
            stop_process(process)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Have a process end in order; kill it if it does not within ``STOP_TIMEOUT_S``."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/ready").status_code == httpx.codes.OK:
                    return True
            time.sleep(0.1)
    return False
