"""A real service for the integration tests: `int8qa up` as users start it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from int8qa.build.pipeline import BuildOptions, build_repository

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def up_command() -> list[str]:
    """`make up` where it would use this very environment, else what it ends with."""
    if Path(sys.prefix) == ROOT / ".venv":
        return ["make", "--no-print-directory", "up"]
    return [sys.executable, "-m", "int8qa.cli", "up"]


@dataclass
class Service:
    """A running `int8qa up`: its address, its output and its process."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_output(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                break
            if self.get_status("/ready") == 200:
                return
            time.sleep(0.1)
        pytest.fail("the service did not become ready:\n" + "".join(self.lines[-40:]))

    def get_status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def post(self, path: str, body: Any, timeout_s: float = 60.0) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return int(response.status), json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Signal the whole group, as a terminal does, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        code = self.process.wait(timeout_s)
        if self.reader is not None:
            self.reader.join(timeout_s)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def start_service(
    port: int, *, command: Sequence[str] | None = None, **environment: str
) -> Service:
    process = subprocess.Popen(
        command or up_command(),
        cwd=ROOT,
        env={**os.environ, "INT8QA_PORT": str(port), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    service = Service(process, port)
    service.reader = threading.Thread(target=service.read_output, daemon=True)
    service.reader.start()
    return service


def list_tritons() -> set[int]:
    """Process ids of every tritonserver and stub on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() in {"tritonserver", "triton_python_b"}:
                found.add(int(path.parent.name))
    return found


def group_of(service: Service) -> set[int]:
    """Tritons and stubs whose environment names this service's port."""
    mark = f"INT8QA_PORT={service.port}".encode()
    found = set()
    for pid in list_tritons():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    return found


@pytest.fixture(scope="session")
def demo_repository() -> Path:
    """The demo model repository, where `make up` keeps it; built if need be."""
    target = ROOT / "model_repository"
    build_repository(BuildOptions(model_repository=target))
    return target


@pytest.fixture(scope="module")
def service(demo_repository: Path) -> Iterator[Service]:
    """`int8qa up`, ready."""
    running = start_service(free_port())
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()
