"""What a Triton process is started with: ports, files, arguments, environment.

In: an installation, a model repository, ports, settings. Out: a private directory
of symbolic links (site-packages stay untouched), the argument list and the
environment. Starts no process.
"""

from __future__ import annotations

import itertools
import os
import random
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8qa.contract import CONTROL_HEADER
from int8qa.embedded.guard import SHARED_MEMORY, remove_shared_memory
from int8qa.embedded.locate import STUB_NAME, TritonInstallation
from int8qa.errors import EmbeddedTritonError

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - for a container's own network, when asked for
ENGINE_THREADS_VARIABLE = "INT8QA_EMBEDDED__ENGINE_THREADS"
"""Read by the Triton model's Python code: CPU threads of one engine, 0 for auto."""
SHM_FAMILY = "int8qa"
MIN_SHM_BYTES = 16 * 2**20
"""Each model instance takes 1 MiB of shared memory and grows in steps of 1 MiB.
Source: the Python backend's shm-default-byte-size and shm-growth-byte-size."""
_PORTS_BELOW_EPHEMERAL = 10_000
_TEMPORARY_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - by mkdtemp
_MODELS = "models"
_counter = itertools.count()


@dataclass(frozen=True)
class TritonPorts:
    """Ports of one Triton."""

    grpc: int
    metrics: int
    http: int = 0
    """For health checks, on loopback only; 0: none."""


def pick_free_port(taken: Sequence[int] = ()) -> int:
    """Return a free loopback port, outside the kernel's ephemeral range.

    An ephemeral port would not stay free while Triton restarts: any outgoing
    connection may be given it, even the one of a client that tries to reach it.
    """
    first, last = _read_port_range()
    for _ in range(200):
        port = random.randint(first, last)  # noqa: S311 - no secret
        if port not in taken and is_port_free(port):
            return port
    raise EmbeddedTritonError(
        f"no free port found between {first} and {last} on {LOOPBACK}; name one"
    )


def is_port_free(port: int, host: str = LOOPBACK) -> bool:
    """Tell whether a server could listen on this port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def list_package_directories() -> list[str]:
    """Return where this interpreter finds installed packages, in its order."""
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [
        entry
        for entry in sys.path
        if entry in filter(None, asked)
        or Path(entry).name in {"site-packages", "dist-packages"}
    ]


def make_private_directory(preferred: str | None) -> Path:
    """Make an empty directory whose path a shell takes as one plain word.

    Triton starts its Python stubs by an unquoted `bash -c`.

    Args:
        preferred: where to make it, usually TMPDIR; the system's temporary
            directories follow.

    Raises:
        EmbeddedTritonError: none of them will do.
    """
    reasons = []
    for name in (preferred, *_TEMPORARY_DIRECTORIES):
        if not name:
            continue
        parent = str(Path(name).absolute())
        if shlex.quote(parent) != parent:
            reasons.append(f"{parent} has white space or special characters")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="int8qa-triton-", dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
    raise EmbeddedTritonError(
        f"no temporary directory is usable for Triton ({'; '.join(reasons)}); set "
        "TMPDIR to one that is writable and has a path without white space"
    )


def compose_files(
    installation: TritonInstallation,
    directory: Path,
    *,
    model_repository: Path,
    package_directories: Sequence[str],
) -> None:
    """Fill ``directory`` with what Triton needs beside the wheel's own files.

    ``backends/python``: Triton looks for the stub beside the backend's library,
    where the wheel has none.
    ``models``: the model repository by a name that needs no quoting; its own may.
    ``lib``: libpython alone, so that nothing else of Python's library directory (a
    conda environment's libstdc++, say) reaches Triton.
    ``bin``, ``pyvenv.cfg``, ``lib/python3.x``: a virtual environment. The stub's
    interpreter is isolated (measured with Python 3.11 and 3.12: it ignores
    PYTHONPATH and the user's site-packages) and takes the first `python3` on PATH
    for its own; through this one it finds the packages of the running interpreter,
    wherever they are.

    Args:
        installation: the Triton to link to.
        directory: from :func:`make_private_directory`.
        model_repository: absolute path.
        package_directories: added to the stub's module search path, their ``.pth``
            files obeyed (editable installations).
    """
    backend = directory / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(installation.backend_directory / name)
    (backend / STUB_NAME).symlink_to(installation.stub)
    (directory / _MODELS).symlink_to(model_repository)
    version = installation.stub.parent.name
    site_packages = directory / "lib" / f"python{version}" / "site-packages"
    site_packages.mkdir(parents=True)
    (directory / "lib" / installation.libpython.name).symlink_to(installation.libpython)
    (site_packages / "int8qa-packages.pth").write_text(
        "".join(
            f"import site; site.addsitedir({entry!r})\n"
            for entry in package_directories
        ),
        "utf-8",
    )
    (directory / "bin").mkdir()
    (directory / "bin" / "python3").symlink_to(sys.executable)
    (directory / "pyvenv.cfg").write_text(
        f"home = {Path(sys.base_prefix) / 'bin'}\n"
        "include-system-site-packages = false\n",
        "utf-8",
    )


def build_arguments(
    installation: TritonInstallation,
    *,
    directory: Path,
    ports: TritonPorts,
    shm_prefix: str,
    exit_timeout_s: float,
    host: str = LOOPBACK,
    control_key: str = "",
) -> list[str]:
    """Return the command line of `tritonserver`, the program first.

    ``host`` is where gRPC and metrics listen. HTTP, which could be asked for answers
    too, stays on loopback. Who names ``control_key`` may have models loaded and
    unloaded, and so have Triton run code; without a key nobody may.
    """
    control = ["--model-control-mode=none"]
    if control_key:
        control = [
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--grpc-restricted-protocol=model-repository:{CONTROL_HEADER}={control_key}",
            f"--http-restricted-api=model-repository:{CONTROL_HEADER}={control_key}",
        ]
    http = (
        ["--allow-http=true", f"--http-address={LOOPBACK}", f"--http-port={ports.http}"]
        if ports.http
        else ["--allow-http=false"]
    )
    return [
        str(installation.server),
        f"--model-repository={directory / _MODELS}",
        *control,
        # Every model loads at start-up or Triton exits and says why. After that a
        # model that is being loaded, or cannot be, is no reason to call the server
        # unready: those before it serve.
        "--exit-on-error=true",
        "--strict-readiness=false",
        # The build writes complete configurations; asking the model for one costs
        # a second stub process per model, about a second of start-up each.
        "--disable-auto-complete-config",
        f"--backend-directory={directory / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        *http,
        f"--grpc-address={host}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={host}",
        f"--metrics-port={ports.metrics}",
        # Without a GPU these two only cost start-up time and log warnings.
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        "--log-verbose=0",
        f"--exit-timeout-secs={max(1, int(exit_timeout_s))}",
    ]


def build_environment(
    installation: TritonInstallation,
    *,
    directory: Path,
    engine_threads: int,
    base: Mapping[str, str],
) -> dict[str, str]:
    """Return the environment of `tritonserver` and its Python stubs.

    Args:
        installation: whose libraries are needed.
        directory: what :func:`compose_files` filled.
        engine_threads: CPU threads of one engine, 0 lets the engine choose.
        base: the environment to extend, usually ``os.environ``.
    """
    environment = dict(base)
    for name, entries in {
        "PATH": [str(directory / "bin")],
        "LD_LIBRARY_PATH": [str(directory / "lib"), str(installation.libraries)],
    }.items():
        inherited = [base[name]] if base.get(name) else []
        environment[name] = os.pathsep.join([*entries, *inherited])
    environment[ENGINE_THREADS_VARIABLE] = str(engine_threads)
    return environment


def name_shm_prefix() -> str:
    """Name the shared-memory regions of one Triton run, unique on this machine.

    The name holds the process id and its namespace, so that a later start can
    tell the leftovers of a killed process from a neighbour container's regions.
    """
    return f"{SHM_FAMILY}-{_read_pid_namespace()}-{os.getpid()}-{next(_counter)}-"


def remove_stale_shared_memory(root: Path = SHARED_MEMORY) -> list[str]:
    """Remove our regions whose process is gone; return the prefixes removed."""
    family = f"{SHM_FAMILY}-{_read_pid_namespace()}-"
    prefixes = set()
    for path in root.glob(f"{family}*"):
        owner = path.name.removeprefix(family).split("-", 1)[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            prefixes.add(f"{family}{owner}-")
    for prefix in prefixes:
        remove_shared_memory(prefix, root=root)
    return sorted(prefixes)


def check_shared_memory(root: Path = SHARED_MEMORY) -> None:
    """Refuse to start where the Python backend would run out of shared memory.

    Raises:
        EmbeddedTritonError: there is no shared memory, or too little is free.
    """
    try:
        state = os.statvfs(root)
    except OSError as error:
        raise EmbeddedTritonError(
            f"{root} is not usable ({error.strerror}), Triton's Python backend needs "
            "it; mount a tmpfs there"
        ) from error
    free = state.f_bavail * state.f_frsize
    if free < MIN_SHM_BYTES:
        raise EmbeddedTritonError(
            f"{root} has {free // 2**20} MiB free, Triton's Python backend needs "
            f"{MIN_SHM_BYTES // 2**20} MiB; enlarge it (Docker: --shm-size=128m)"
        )


def _read_port_range() -> tuple[int, int]:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii")
        low = int(text.split()[0])
    except (OSError, ValueError, IndexError):
        low = 32_768  # the kernel's default
    if low < 12_000:  # an unusually wide range: nothing sensible lies below it
        return 20_000, 60_000
    return max(10_240, low - _PORTS_BELOW_EPHEMERAL), low - 1


def _read_pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
