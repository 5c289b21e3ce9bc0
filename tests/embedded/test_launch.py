"""Ports, files, arguments and environment of a Triton process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from int8qa.embedded import launch
from int8qa.embedded.locate import TritonInstallation
from int8qa.errors import EmbeddedTritonError


@pytest.fixture
def installation(tmp_path: Path) -> TritonInstallation:
    """An installation of empty files."""
    wheel = tmp_path / "wheel"
    backend = wheel / "backend"
    backend.mkdir(parents=True)
    stub = wheel / f"{sys.version_info.major}.{sys.version_info.minor}" / "stub"
    stub.parent.mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).touch()
    for path in (stub, wheel / "tritonserver", wheel / "libpython3.11.so.1.0"):
        path.touch()
    return TritonInstallation(
        server=wheel / "tritonserver",
        backend_directory=backend,
        stub=stub,
        libraries=wheel / "libs",
        libpython=wheel / "libpython3.11.so.1.0",
    )


def test_picked_port_is_free_and_not_ephemeral() -> None:
    """No outgoing connection can be given the port while Triton restarts."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    port = launch.pick_free_port()

    assert launch.is_port_free(port)
    assert port < low or low < 12_000


def test_taken_port_is_recognised() -> None:
    """A listening socket makes its port unfree."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not launch.is_port_free(server.getsockname()[1])


def test_composed_directory_completes_the_wheel(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    """The private directory is complete, and the wheel's stays as it was."""
    before = sorted(installation.backend_directory.iterdir())

    launch.compose_files(
        installation,
        tmp_path / "private",
        model_repository=tmp_path / "my models",
        package_directories=["/there", "/it's"],
    )

    backend = tmp_path / "private" / "backends" / "python"
    assert {path.name for path in backend.iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }
    assert all(path.resolve().is_file() for path in backend.iterdir())
    assert (tmp_path / "private" / "lib" / "libpython3.11.so.1.0").resolve().is_file()
    assert sorted(installation.backend_directory.iterdir()) == before
    models = tmp_path / "private" / "models"
    assert models.readlink() == tmp_path / "my models"
    asked = "import sys; print(sys.prefix, sys.path)"
    answer = subprocess.run(
        [tmp_path / "private" / "bin" / "python3", "-I", "-c", asked],
        capture_output=True,
        check=True,
        text=True,
    )
    assert answer.stdout.startswith(f"{tmp_path / 'private'} ")
    assert "'/there', \"/it's\"" in answer.stdout


@pytest.mark.parametrize("name", ["a b", "a\tb", "$(b)", "it's"])
def test_private_directory_needs_no_quoting(tmp_path: Path, name: str) -> None:
    """A temporary directory that an unquoted shell would split is passed over."""
    preferred = tmp_path / name
    preferred.mkdir()

    directory = launch.make_private_directory(str(preferred))

    assert directory.is_dir()
    directory.rmdir()
    assert directory.parent != preferred
    assert directory.parent in map(Path, launch._TEMPORARY_DIRECTORIES)


def test_private_directory_is_where_it_was_asked_for(tmp_path: Path) -> None:
    """A usable TMPDIR is used."""
    assert launch.make_private_directory(str(tmp_path)).parent == tmp_path


def test_no_usable_temporary_directory_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names every directory looked at, its fault and what to set."""
    monkeypatch.setattr(launch, "_TEMPORARY_DIRECTORIES", (str(tmp_path / "absent"),))

    with pytest.raises(
        EmbeddedTritonError, match=r"a b has white space.*absent: No such.*TMPDIR"
    ):
        launch.make_private_directory(str(tmp_path / "a b"))


def test_environment_puts_ours_first_and_keeps_the_rest(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    """Search paths are prepended, the rest is inherited, threads are told."""
    environment = launch.build_environment(
        installation,
        directory=tmp_path,
        engine_threads=3,
        base={"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/cuda", "HOME": "/home/ada"},
    )

    assert environment["PATH"] == f"{tmp_path / 'bin'}:/usr/bin"
    assert environment["LD_LIBRARY_PATH"] == (
        f"{tmp_path / 'lib'}:{installation.libraries}:/cuda"
    )
    assert environment["HOME"] == "/home/ada"
    assert environment["INT8QA_EMBEDDED__ENGINE_THREADS"] == "3"


def test_arguments_listen_on_loopback_only(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    """No endpoint of the embedded Triton is reachable from another machine."""
    arguments = launch.build_arguments(
        installation,
        directory=tmp_path,
        ports=launch.TritonPorts(grpc=11_001, metrics=11_002),
        shm_prefix="p-",
        exit_timeout_s=0.2,
    )

    assert "--grpc-address=127.0.0.1" in arguments
    assert "--metrics-address=127.0.0.1" in arguments
    assert "--allow-http=false" in arguments
    assert f"--model-repository={tmp_path / 'models'}" in arguments
    assert "--exit-timeout-secs=1" in arguments


def test_a_wider_address_is_not_for_http(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    """In a container gRPC and metrics listen everywhere, HTTP for health checks not."""
    arguments = launch.build_arguments(
        installation,
        directory=tmp_path,
        ports=launch.TritonPorts(grpc=11_001, metrics=11_002, http=11_003),
        shm_prefix="p-",
        exit_timeout_s=8.0,
        host=launch.EVERYWHERE,
    )

    assert "--grpc-address=0.0.0.0" in arguments
    assert "--metrics-address=0.0.0.0" in arguments
    assert "--http-address=127.0.0.1" in arguments
    assert "--http-port=11003" in arguments


def test_models_are_loaded_for_whom_the_key_is_known(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    """With a key both protocols ask for it; without one nobody can load a model."""

    def build(control_key: str) -> list[str]:
        return launch.build_arguments(
            installation,
            directory=tmp_path,
            ports=launch.TritonPorts(grpc=11_001, metrics=11_002, http=11_003),
            shm_prefix="p-",
            exit_timeout_s=8.0,
            control_key=control_key,
        )

    open_to_some, closed = build("k"), build("")
    assert "--model-control-mode=explicit" in open_to_some
    assert "--load-model=*" in open_to_some
    for option in ("--grpc-restricted-protocol", "--http-restricted-api"):
        assert f"{option}=model-repository:int8qa-control=k" in open_to_some
    assert "--model-control-mode=none" in closed
    assert not any("restricted" in argument for argument in closed)


def test_only_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Living owners, other namespaces and foreign files are left alone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = launch.name_shm_prefix()
    stale = own.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    elsewhere = stale.replace("int8qa-", "int8qa-9", 1)
    for name in (f"{own}a", f"{stale}b", f"{elsewhere}c", "int8qa-x", "sem.other"):
        (tmp_path / name).touch()

    removed = launch.remove_stale_shared_memory(tmp_path)

    assert len(removed) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{own}a",
        f"{elsewhere}c",
        "int8qa-x",
        "sem.other",
    }


def test_prefixes_of_one_process_differ() -> None:
    """Two Tritons of one process never share a region."""
    assert launch.name_shm_prefix() != launch.name_shm_prefix()


def test_absent_shared_memory_is_refused(tmp_path: Path) -> None:
    """The message names the directory that is not usable."""
    with pytest.raises(EmbeddedTritonError, match="absent is not usable"):
        launch.check_shared_memory(tmp_path / "absent")


def test_small_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how much there is, how much is needed, and what to do."""
    monkeypatch.setattr(launch, "MIN_SHM_BYTES", 2**60)

    with pytest.raises(EmbeddedTritonError, match=r"MiB free.*needs.*--shm-size"):
        launch.check_shared_memory()
