"""Finding the wheel's Triton, and saying what is missing where there is none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import int8qa
from int8qa.embedded.locate import HostFacts, locate_triton, read_host_facts
from int8qa.errors import MissingDependencyError


@pytest.fixture
def host(tmp_path: Path) -> HostFacts:
    """A machine with a complete wheel for Python 3.10 and 3.11."""
    root = tmp_path / "site-packages" / "pytriton" / "tritonserver"
    for name in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "python_backend_stubs/3.10/triton_python_backend_stub",
        "python_backend_stubs/3.11/triton_python_backend_stub",
    ):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (tmp_path / "site-packages" / "nvidia_pytriton.libs").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libpython3.11.so.1.0").touch()
    return HostFacts(
        system="Linux",
        machine="x86_64",
        libc="glibc",
        libc_version="2.35",
        python_version=(3, 11),
        python_executable=tmp_path / "bin" / "python",
        library_directories=(tmp_path / "absent", tmp_path / "lib"),
        package_directory=root.parent,
    )


def test_complete_installation_is_found(host: HostFacts, tmp_path: Path) -> None:
    """Every path of the result exists and the stub fits the Python version."""
    found = locate_triton(host)

    assert found.stub.parent.name == "3.11"
    assert found.libpython == tmp_path / "lib" / "libpython3.11.so.1.0"
    for field in dataclasses.fields(found):
        assert getattr(found, field.name).exists(), field.name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"system": "Darwin"}, ["Linux only", "Darwin"]),
        ({"machine": "riscv64"}, ["x86_64", "aarch64", "riscv64"]),
        ({"libc_version": "2.31"}, ["glibc 2.35", "glibc 2.31"]),
        ({"libc_version": "2.4"}, ["glibc 2.35", "glibc 2.4"]),
        ({"libc": "", "libc_version": ""}, ["glibc 2.35", "another C library"]),
        ({"package_directory": None}, ["make install", "pip install -e '.[cpu]'"]),
        ({"python_version": (3, 12)}, ["libpython3.12.so.1.0", "--enable-shared"]),
        ({"has_bash": False}, ["no bash on PATH"]),
        ({"library_directories": ()}, ["libpython3.11.so.1.0", "bin/python"]),
    ],
)
def test_what_is_missing_is_named(
    host: HostFacts, changes: dict[str, object], told: list[str]
) -> None:
    """One line names what was found, what is needed and what to do."""
    with pytest.raises(MissingDependencyError) as caught:
        locate_triton(dataclasses.replace(host, **changes))

    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize("version", ["2.35", "2.36", "2.100", "3.0"])
def test_glibc_versions_compare_as_numbers(host: HostFacts, version: str) -> None:
    """2.100 is newer than 2.35, whatever their letters say."""
    locate_triton(dataclasses.replace(host, libc_version=version))


def test_python_without_stub_is_refused(host: HostFacts, tmp_path: Path) -> None:
    """The message lists the Python versions that would do."""
    (tmp_path / "lib" / "libpython3.14.so.1.0").touch()

    with pytest.raises(MissingDependencyError, match=r"3\.14.*3\.10, 3\.11"):
        locate_triton(dataclasses.replace(host, python_version=(3, 14)))


def test_incomplete_wheel_is_refused(host: HostFacts) -> None:
    """A wheel without its server names the missing file."""
    assert host.package_directory is not None
    (host.package_directory / "tritonserver" / "bin" / "tritonserver").unlink()

    with pytest.raises(MissingDependencyError, match=r"incomplete.*bin/tritonserver"):
        locate_triton(host)


def test_host_facts_describe_this_interpreter() -> None:
    """The facts come from the running Python."""
    facts = read_host_facts()

    assert facts.python_executable.exists()
    assert facts.python_name.startswith("3.")


def test_locating_is_cheap_to_import() -> None:
    """Whether there is a Triton is told without gRPC and pydantic installed."""
    code = (
        "import sys; from int8qa.embedded import locate_triton; "
        "print(*{'grpc', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": str(Path(int8qa.__file__).parents[1])},
        text=True,
    )

    assert answer.stdout.strip() == ""
