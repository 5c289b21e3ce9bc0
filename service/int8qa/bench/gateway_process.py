"""Gateways of our own in front of Tritons that run already, for as long as needed.

In: Tritons' addresses and a model repository. Out: the gateway's address, once it is
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
from typing import IO

import httpx

from int8qa.embedded.launch import LOOPBACK, pick_free_port
from int8qa.errors import GatewayRequestError

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


class GatewayProcess:
    """One ``int8qa serve`` at an address of its own; may be started again.

    The live comparison is off: it would ask INT8's questions of FP16 again.
    """

    def __init__(self, triton_url: str, log: IO[str], **settings: str) -> None:
        """Choose the address; nothing is started yet.

        Args:
            triton_url: ``INT8QA_TRITON__URL``.
            log: open for reading and writing; gets what the gateway says.
            settings: further ``INT8QA_`` variables by their whole names.
        """
        port = pick_free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self._log = log
        self._settings = {
            "INT8QA_HOST": LOOPBACK,
            "INT8QA_PORT": str(port),
            "INT8QA_ADMIN__PORT": "0",  # else /metrics is not where we ask
            "INT8QA_TRITON__URL": triton_url,
            "INT8QA_COMPARISON__FRACTION": "0",
        } | settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, repository: Path) -> None:
        """Start it for the build in ``repository``; does not wait."""
        environment = self._settings | {"INT8QA_MODEL_REPOSITORY": str(repository)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "int8qa.cli", "serve"],
            env=os.environ | environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return once every model can be asked.

        Raises:
            GatewayRequestError: it ended, or was not ready in time; has its last words.
        """
        process = self._process
        assert process is not None
        if _wait_ready(self.url, process, timeout_s):
            return
        self._log.seek(0)
        last = [line.strip() for line in self._log if line.strip()][-1:]
        status = process.poll()
        state = (
            f"was not ready after {timeout_s:.0f} s"
            if status is None
            else f"ended with status {status}"
        )
        raise GatewayRequestError(
            f"the gateway started for the load {state}: "
            f"{last[0] if last else 'it said nothing'}"
        )

    def stop(self) -> int:
        """End it in order, and return its status; 0 if it never ran."""
        if self._process is None:
            return 0
        stop_process(self._process)
        return self._process.returncode


@contextlib.contextmanager
def run_gateway(
    triton_url: str, repository: Path, *, ready_timeout_s: float = READY_TIMEOUT_S
) -> Iterator[str]:
    """Run ``int8qa serve`` until the block is left; yields its base URL.

    Raises:
        GatewayRequestError: it ended, or was not ready in time; has its last words.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        gateway = GatewayProcess(triton_url, log)
        gateway.start(repository)
        try:
            gateway.wait_ready(ready_timeout_s)
            yield gateway.url
        finally:
            gateway.stop()


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
