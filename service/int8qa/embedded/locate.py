"""Where the Triton of the `nvidia-pytriton` wheel lies on this machine.

In: facts about the host and its Python. Out: the paths needed to start
`tritonserver` with the stub of the running Python, or one clear line that says
what is missing. Starts nothing, writes nothing, imports nothing of the wheel.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from int8qa.errors import MissingDependencyError

MIN_GLIBC = (2, 35)
"""Source: the platform tag of the wheel, manylinux_2_35."""
MACHINES = ("x86_64", "aarch64")
"""Source: the platform tags of the published wheels."""
STUB_NAME = "triton_python_backend_stub"
_INSTALL = "run `make install` in the checkout, or `pip install -e '.[cpu]'` there"
_ELSEWHERE = "or run Triton elsewhere and use `int8qa serve`"


@dataclass(frozen=True)
class HostFacts:
    """What decides whether the wheel's Triton can run here."""

    system: str
    machine: str
    libc: str
    """``glibc`` or anything else."""
    libc_version: str
    python_version: tuple[int, int]
    python_executable: Path
    library_directories: tuple[Path, ...]
    """Where ``libpython3.x.so.1.0`` may lie, in order of preference."""
    package_directory: Path | None
    """The wheel's package `pytriton`; None where it is not installed."""
    has_bash: bool = True

    @property
    def python_name(self) -> str:
        """``3.11`` for Python 3.11.x."""
        return ".".join(map(str, self.python_version))


@dataclass(frozen=True)
class TritonInstallation:
    """Paths of one usable Triton; all of them exist."""

    server: Path
    backend_directory: Path
    """The wheel's own backend `python`: without a stub, so not usable in place."""
    stub: Path
    libraries: Path
    """The wheel's `nvidia_pytriton.libs`."""
    libpython: Path
    """The shared library that the stub is linked against."""


def read_host_facts() -> HostFacts:
    """Describe the running interpreter and its machine."""
    libc, libc_version = platform.libc_ver()
    spec = importlib.util.find_spec("pytriton")
    return HostFacts(
        system=platform.system(),
        machine=platform.machine(),
        libc=libc,
        libc_version=libc_version,
        python_version=(sys.version_info.major, sys.version_info.minor),
        python_executable=Path(sys.executable),
        library_directories=tuple(dict.fromkeys(_iter_library_directories())),
        package_directory=Path(spec.origin).parent if spec and spec.origin else None,
        has_bash=shutil.which("bash") is not None,
    )


def locate_triton(host: HostFacts | None = None) -> TritonInstallation:
    """Find the server, its Python backend, the stub and libpython.

    Raises:
        MissingDependencyError: the platform has no wheel, the wheel is absent or
            incomplete, or this Python cannot be embedded by the stub.
    """
    host = read_host_facts() if host is None else host
    _check_platform(host)
    package = host.package_directory
    if package is None:
        raise MissingDependencyError(
            "the embedded Triton is not installed (no package nvidia-pytriton); "
            f"{_INSTALL}, {_ELSEWHERE}"
        )
    root = package / "tritonserver"
    installation = TritonInstallation(
        server=root / "bin" / "tritonserver",
        backend_directory=root / "backends" / "python",
        stub=root / "python_backend_stubs" / host.python_name / STUB_NAME,
        libraries=package.parent / "nvidia_pytriton.libs",
        libpython=_find_libpython(host),
    )
    if not host.has_bash:
        raise MissingDependencyError(
            "Triton's Python backend starts its stubs through bash, and there is no "
            "bash on PATH; install it"
        )
    if not installation.stub.exists():
        shipped = sorted(
            (
                path.parent.name
                for path in root.glob(f"python_backend_stubs/*/{STUB_NAME}")
            ),
            key=_parse_version,
        )
        raise MissingDependencyError(
            f"the embedded Triton has no stub for Python {host.python_name}; it has "
            f"them for {', '.join(shipped) or 'no version'}: use one of these"
        )
    for path in (
        installation.server,
        installation.backend_directory / "libtriton_python.so",
        installation.libraries,
    ):
        if not path.exists():
            raise MissingDependencyError(
                f"the installed nvidia-pytriton is incomplete ({path} is missing); "
                f"uninstall that package, then {_INSTALL}"
            )
    return installation


def _check_platform(host: HostFacts) -> None:
    if host.system != "Linux":
        raise MissingDependencyError(
            f"the embedded Triton runs on Linux only, this is {host.system}; use the "
            f"Docker images, {_ELSEWHERE}"
        )
    if host.machine not in MACHINES:
        raise MissingDependencyError(
            f"the embedded Triton exists for {' and '.join(MACHINES)}, this machine is "
            f"{host.machine}; {_ELSEWHERE.removeprefix('or ')}"
        )
    needed = ".".join(map(str, MIN_GLIBC))
    if host.libc != "glibc":
        raise MissingDependencyError(
            f"the embedded Triton needs glibc {needed} or newer, this system has "
            f"{host.libc or 'another C library'}; use the Docker images, {_ELSEWHERE}"
        )
    if _parse_version(host.libc_version) < MIN_GLIBC:
        raise MissingDependencyError(
            f"the embedded Triton needs glibc {needed} or newer, this system has glibc "
            f"{host.libc_version}; use the Docker images, {_ELSEWHERE}"
        )


def _find_libpython(host: HostFacts) -> Path:
    name = f"libpython{host.python_name}.so.1.0"
    for directory in host.library_directories:
        if (directory / name).exists():
            return directory / name
    raise MissingDependencyError(
        f"the Python at {host.python_executable} has no shared library {name}, which "
        f"Triton's Python backend is linked against (looked in "
        f"{', '.join(map(str, host.library_directories))}); use a Python built with "
        f"--enable-shared, or install the system's package libpython{host.python_name}"
    )


def _iter_library_directories() -> Iterator[Path]:
    configured = sysconfig.get_config_var("LIBDIR")
    multiarch = sysconfig.get_config_var("MULTIARCH")
    for directory in (configured, str(Path(sys.base_prefix) / "lib")):
        if directory:
            yield Path(directory)
            if multiarch:  # Debian and Ubuntu
                yield Path(directory) / multiarch


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
