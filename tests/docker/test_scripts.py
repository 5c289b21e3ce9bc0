"""The scripts that images are made with, and the one that tests the stack."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.select_packages import (
    IMAGES,
    LISTS,
    find_names,
    iter_entries,
    read_list,
    select_entries,
)

from .compose_model import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCKED = {name for name, _ in iter_entries(LOCK)}
OFFLINE_ONLY = {"torch", "onnx", "onnxruntime", "nvidia-modelopt", "transformers"}
DEVELOPMENT_ONLY = {"pytest", "ruff", "mypy", "hypothesis", "setuptools"}


@pytest.mark.parametrize("image", IMAGES)
def test_lists_have_all_that_an_image_needs(image: str) -> None:
    """`python scripts/select_packages.py --write` would add nothing."""
    listed = read_list(LISTS / f"{image}.txt")
    assert set(find_names(image, LOCKED)) <= set(listed)
    assert set(listed) <= LOCKED
    assert listed == sorted(listed)


def test_the_gateway_gets_no_engine_and_no_build_stage() -> None:
    """Nor anything that only tests and linters use."""
    gateway = set(read_list(LISTS / "gateway.txt"))
    triton = set(read_list(LISTS / "triton.txt"))
    assert not gateway & (OFFLINE_ONLY | DEVELOPMENT_ONLY)
    assert triton - gateway == {"nvidia-pytriton", "openvino"}
    assert OFFLINE_ONLY - {"torch"} <= set(read_list(LISTS / "builder.txt"))


def test_entries_keep_version_markers_and_hashes() -> None:
    """Every version of a name goes along; pip chooses by the markers."""
    lock = (
        "a-b==1 ; python_version < '3.11' \\\n    --hash=sha256:1 \\\n"
        "    --hash=sha256:2\n"
        "A_b==2 ; python_version >= '3.11' \\\n    --hash=sha256:3\n"
        "a==3 \\\n    --hash=sha256:4\n"
    )
    assert select_entries(lock, ["a-b"]) == lock[: lock.index("a==3")]
    assert select_entries(lock, ["a", "a-b"]) == lock


def test_an_unknown_name_is_refused() -> None:
    """The message says how the lists are made."""
    with pytest.raises(SystemExit, match=r"lock: zzz; run .*--write"):
        select_entries("a==1\n", ["a", "zzz"])


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_is_status_200(status: int, code: int) -> None:
    """check-http tells a ready service from one that is not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert _check(str(server.server_port)) == code
        server.shutdown()


def test_a_closed_port_is_not_healthy() -> None:
    """No service, no health."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    assert _check(port) != 0


def _check(port: str) -> int:
    return subprocess.run(
        [ROOT / "docker/check-http", port, "/ready"],
        capture_output=True,
        timeout=10,
        check=False,
    ).returncode


def test_without_an_engine_the_test_of_the_stack_says_so(tmp_path: Path) -> None:
    """One clear line at once, and nothing started."""
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 1\n")
    docker.chmod(0o755)
    finished = subprocess.run(
        [ROOT / "scripts/compose-test"],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("compose-test: no Docker engine")


def test_the_builder_finds_one_torch_to_install() -> None:
    """The Dockerfile reads the pin with sed; a reformatted pyproject must not lose it."""
    dockerfile = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r"RUN (sed .*) > torch\.txt", dockerfile)
    pins = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(r"torch==[\d.]+\n", pins)
