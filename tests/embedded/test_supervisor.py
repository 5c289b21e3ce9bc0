"""A real Triton under supervision: start, answer, die, come back, stop."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as triton

import int8qa
from int8qa.embedded import (
    TritonState,
    TritonSupervisor,
    guard,
    locate_triton,
    triton_run,
)
from int8qa.embedded.backoff import RestartBackoff
from int8qa.embedded.guard import SHARED_MEMORY, iter_group
from int8qa.embedded.launch import is_port_free, pick_free_port
from int8qa.errors import EmbeddedTritonError, MissingDependencyError
from int8qa.settings import EmbeddedSettings

from .conftest import HANG_HOLDING_THE_GIL, MakeRepository

LIMIT_S = 60.0
SETTINGS = EmbeddedSettings(
    start_timeout_s=LIMIT_S, stop_timeout_s=5.0, max_restart_delay_s=0.1
)


def make_supervisor(
    repository: Path, settings: EmbeddedSettings = SETTINGS, **ports: int
) -> TritonSupervisor:
    """A supervisor of the installed Triton; skipped where there is none."""
    try:
        installation = locate_triton()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return TritonSupervisor(
        installation=installation,
        model_repository=repository,
        settings=settings,
        **ports,
    )


async def ask(url: str) -> tuple[list[float], list[float]]:
    """Send one window of three tokens and return both rows of logits."""
    async with triton.InferenceServerClient(url) as client:
        inputs = []
        for name, row in (("input_ids", [1, 2, 3]), ("attention_mask", [4, 5, 6])):
            tensor = triton.InferInput(name, [1, 3], "INT32")
            tensor.set_data_from_numpy(np.array([row], np.int32))
            inputs.append(tensor)
        result = await client.infer("echo", inputs)
        start, end = (result.as_numpy(n) for n in ("start_logits", "end_logits"))
        return start[0].tolist(), end[0].tolist()


def find_process(group: int, name: str) -> int:
    """The process id of the group's one process of this (kernel) name."""
    (found,) = (p.pid for p in iter_group(group) if p.name == name)
    return found


def list_shared_memory(pid: int) -> list[Path]:
    """Shared-memory regions made on behalf of a process of ours."""
    return list(SHARED_MEMORY.glob(f"int8qa-*-{pid}-*"))


async def wait_until_empty(group: int) -> None:
    """Return once no process of the group lives."""
    while any(iter_group(group)):  # noqa: ASYNC110 - another program's processes
        await asyncio.sleep(0.05)


@pytest.mark.triton
async def test_killed_triton_comes_back_on_the_same_port(
    make_repository: MakeRepository, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever process dies, the same address answers again; stop leaves nothing."""
    caplog.set_level("INFO", logger="int8qa.triton")
    settings = SETTINGS.model_copy(update={"engine_threads": 2})
    supervisor = make_supervisor(make_repository(), settings)
    groups = []
    async with supervisor:
        url = supervisor.grpc_url
        assert await ask(url) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])

        for restart, name in enumerate(
            ("tritonserver", "triton_python_b", "guard"), start=1
        ):
            group = supervisor.process_group
            assert group is not None
            groups.append(group)
            victim = group if name == "guard" else find_process(group, name)
            if name == "guard":  # and a stub hangs, so that the output stays open
                os.kill(find_process(group, "triton_python_b"), signal.SIGSTOP)
            os.kill(victim, signal.SIGKILL)
            await asyncio.wait_for(
                supervisor.wait_for_state(TritonState.READY, min_restarts=restart),
                LIMIT_S,
            )
            await asyncio.wait_for(wait_until_empty(group), LIMIT_S)

            assert supervisor.grpc_url == url
            assert await ask(url) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        assert len(list_shared_memory(os.getpid())) == 1
        assert supervisor.process_group is not None
        groups.append(supervisor.process_group)

    assert supervisor.state is TritonState.STOPPED
    assert supervisor.restarts == 3
    assert not [p for group in groups for p in iter_group(group)]
    assert not list_shared_memory(os.getpid())
    assert "engine threads 2" in caplog.messages
    assert any("Started GRPCInferenceService" in text for text in caplog.messages)


def get_status(url: str) -> int:
    """Of a server that may not listen yet: Triton starts gRPC, HTTP, metrics in turn."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return int(reply.status)
        except urllib.error.URLError as error:  # noqa: PERF203
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.triton
async def test_triton_alone(make_repository: MakeRepository) -> None:
    """`int8qa triton` serves on the ports it was told until SIGTERM, then nothing."""
    try:
        locate_triton()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    ports: list[int] = []
    while len(ports) < 3:
        ports.append(pick_free_port(ports))
    grpc_port, metrics_port, http_port = map(str, ports)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "int8qa.cli", "triton", "--host", "0.0.0.0"),
        *("--model-repository", str(make_repository())),
        *("--grpc-port", grpc_port, "--metrics-port", metrics_port),
        *("--http-port", http_port),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(int8qa.__file__).parents[1])},
    )
    assert process.stderr is not None
    lines: list[bytes] = []
    try:
        while not lines or b"Triton is ready at" not in lines[-1]:
            reading = process.stderr.readline()
            lines.append(await asyncio.wait_for(reading, LIMIT_S))
            assert lines[-1], b"".join(lines)
        drain = asyncio.create_task(process.stderr.read())
        assert await ask(f"127.0.0.1:{grpc_port}") == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        for port, path in ((http_port, "v2/health/ready"), (metrics_port, "metrics")):
            url = f"http://127.0.0.1:{port}/{path}"
            assert await asyncio.to_thread(get_status, url) == 200
    finally:
        process.terminate()
        code = await asyncio.wait_for(process.wait(), LIMIT_S)
    assert code == 0, await drain
    assert all(is_port_free(port) for port in ports)


@pytest.mark.triton
async def test_white_space_in_every_path_is_no_obstacle(
    make_repository: MakeRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout in "a b" works: the models, the wheel and TMPDIR may lie there."""
    spaced = tmp_path / "a b"
    spaced.mkdir()
    repository = make_repository().rename(spaced / "my models")
    supervisor = make_supervisor(repository)
    installation = supervisor._installation
    packages = installation.libraries.parent
    (spaced / "packages").symlink_to(packages)
    supervisor._installation = dataclasses.replace(
        installation,
        **{
            name: spaced
            / "packages"
            / getattr(installation, name).relative_to(packages)
            for name in ("server", "backend_directory", "stub", "libraries")
        },
    )
    monkeypatch.setenv("TMPDIR", str(spaced))

    async with supervisor:
        assert await ask(supervisor.grpc_url) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


@pytest.mark.triton
@pytest.mark.parametrize(
    "shortage",
    [OSError(errno.EAGAIN, "no more"), RuntimeError("can't start new thread")],
    ids=["process", "thread"],
)
async def test_watch_outlives_shortages_and_cleaners(
    make_repository: MakeRepository,
    monkeypatch: pytest.MonkeyPatch,
    shortage: Exception,
) -> None:
    """A spawn that fails and a private directory that is gone are got over."""
    supervisor = make_supervisor(make_repository())
    spawn = triton_run.TritonRun.spawn
    shortages = [shortage]

    async def spawn_at_second_attempt(**options):
        if shortages:
            raise shortages.pop()
        return await spawn(**options)

    async with supervisor:
        monkeypatch.setattr(triton_run.TritonRun, "spawn", spawn_at_second_attempt)
        assert supervisor._directory is not None
        shutil.rmtree(supervisor._directory)
        assert supervisor.process_group is not None
        os.kill(find_process(supervisor.process_group, "tritonserver"), signal.SIGKILL)
        await asyncio.wait_for(
            supervisor.wait_for_state(TritonState.READY, min_restarts=2), LIMIT_S
        )

        assert await ask(supervisor.grpc_url) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        directory = supervisor._directory
    assert not shortages
    assert not directory.exists()


async def test_unreadable_process_table_is_no_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of file descriptors we cannot see the stubs; their Triton lives on."""
    run = triton_run.TritonRun(shm_prefix="p-", stop_timeout_s=1.0)
    run._stubs = {1: "qa_int8"}
    looks = []

    def fail_to_look(pid: int) -> None:
        looks.append(pid)
        if len(looks) == 3:
            run.process_exited()
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(triton_run, "_WATCH_POLL_S", 0.001)
    monkeypatch.setattr(guard, "read_process", fail_to_look)
    monkeypatch.setattr(run, "_describe_exit", lambda: "exit status 7")

    assert await asyncio.wait_for(run.wait_failed("127.0.0.1:9"), LIMIT_S) == (
        "tritonserver ended (exit status 7)"
    )
    assert looks == [1, 1, 1]


@pytest.mark.triton
async def test_ports_come_from_the_settings_and_are_logged(
    make_repository: MakeRepository, caplog: pytest.LogCaptureFixture
) -> None:
    """Prometheus can be pointed at a fixed address, told in one log line."""
    caplog.set_level("INFO", logger="int8qa.embedded")
    grpc_port = pick_free_port()
    metrics_port = pick_free_port([grpc_port])
    settings = SETTINGS.model_copy(
        update={"grpc_port": grpc_port, "metrics_port": metrics_port}
    )

    async with make_supervisor(make_repository(), settings) as supervisor:
        assert supervisor.grpc_url == f"127.0.0.1:{grpc_port}"
        assert supervisor.metrics_url == f"http://127.0.0.1:{metrics_port}/metrics"
        reader, writer = await asyncio.open_connection("127.0.0.1", metrics_port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"nv_inference_count" in await reader.read()
        writer.close()
        await writer.wait_closed()

    assert (
        f"Triton is ready: gRPC on 127.0.0.1:{grpc_port}, "
        f"metrics at http://127.0.0.1:{metrics_port}/metrics"
    ) in caplog.messages


async def test_one_port_for_two_purposes_is_refused(tmp_path: Path) -> None:
    """The message names the port and both settings."""
    supervisor = make_supervisor(tmp_path, grpc_port=11_001, metrics_port=11_001)

    with pytest.raises(
        EmbeddedTritonError, match=r"both 11001.*grpc_port.*metrics_port"
    ):
        await supervisor.start()


@pytest.mark.triton
async def test_model_that_does_not_load_gives_its_reason(
    make_repository: MakeRepository,
) -> None:
    """The error carries the exception of the model's own code."""
    repository = make_repository(
        "oops", on_initialize='raise RuntimeError("engine file is missing")'
    )
    supervisor = make_supervisor(repository)

    with pytest.raises(
        EmbeddedTritonError, match=r"model oops does not load.*engine file is missing"
    ):
        await supervisor.start()

    assert supervisor.state is TritonState.STOPPED
    assert not list_shared_memory(os.getpid())


@pytest.mark.triton
async def test_slow_model_runs_into_the_start_timeout(
    make_repository: MakeRepository,
) -> None:
    """The error names the limit and carries the last lines of the log."""
    repository = make_repository(on_initialize=HANG_HOLDING_THE_GIL)
    settings = SETTINGS.model_copy(update={"start_timeout_s": 1.0})
    supervisor = make_supervisor(repository, settings)

    with pytest.raises(EmbeddedTritonError, match=r"within 1 s.*engine threads"):
        await supervisor.start()

    assert not list_shared_memory(os.getpid())


@pytest.mark.triton
async def test_stop_interrupts_a_start(make_repository: MakeRepository) -> None:
    """A start that is still waiting ends at once, and so does its Triton."""
    supervisor = make_supervisor(make_repository(on_initialize=HANG_HOLDING_THE_GIL))
    starting = asyncio.create_task(supervisor.start())
    while not list_shared_memory(os.getpid()):
        await asyncio.sleep(0.02)
        assert not starting.done()

    await asyncio.wait_for(supervisor.stop(), LIMIT_S)

    with pytest.raises(EmbeddedTritonError, match="stopped while it was starting"):
        await starting
    assert supervisor.state is TritonState.STOPPED
    assert not list_shared_memory(os.getpid())


@pytest.mark.triton
@pytest.mark.parametrize("purpose", ["grpc_port", "metrics_port"])
async def test_taken_port_is_named(
    make_repository: MakeRepository, purpose: str
) -> None:
    """A fixed port of another process is refused before anything starts."""
    port = pick_free_port()
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    supervisor = make_supervisor(make_repository(), **{purpose: port})

    async with server:
        with pytest.raises(EmbeddedTritonError, match=rf"port {port} .*{purpose}"):
            await supervisor.start()


async def test_absent_repository_is_named(tmp_path: Path) -> None:
    """The message says how to make a model repository."""
    supervisor = make_supervisor(tmp_path / "absent")

    with pytest.raises(EmbeddedTritonError, match=r"absent.*int8qa build"):
        await supervisor.start()


PARENT = """
import asyncio, sys
from pathlib import Path
from int8qa.embedded import TritonSupervisor, locate_triton
from int8qa.settings import EmbeddedSettings

async def main():
    supervisor = TritonSupervisor(
        installation=locate_triton(),
        model_repository=Path(sys.argv[1]),
        settings=EmbeddedSettings(stop_timeout_s=3.0),
    )
    await supervisor.start()
    print(supervisor.process_group, supervisor.grpc_url, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.triton
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hanging"])
async def test_nothing_outlives_a_killed_parent(
    make_repository: MakeRepository, busy: bool
) -> None:
    """SIGKILL to int8qa ends server and stubs, also one that hangs in native code."""
    make_supervisor(Path())  # skips where there is no Triton
    repository = make_repository(on_execute=HANG_HOLDING_THE_GIL if busy else "pass")
    source_root = Path(int8qa.__file__).parents[1]
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT,
        str(repository),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(source_root)},
    )
    assert parent.stdout is not None
    line = await asyncio.wait_for(parent.stdout.readline(), LIMIT_S)
    group, url = int(line.split()[0]), line.split()[1].decode()
    assert {p.name for p in iter_group(group)} >= {"tritonserver", "triton_python_b"}
    asking = asyncio.create_task(ask(url)) if busy else None
    if busy:
        await asyncio.sleep(0.5)

    parent.kill()
    await parent.wait()
    await asyncio.wait_for(wait_until_empty(group), LIMIT_S)

    assert not list_shared_memory(parent.pid)
    if asking is not None:
        with pytest.raises(triton.InferenceServerException):
            await asking


def test_backoff_doubles_up_to_its_bound_and_forgets() -> None:
    """Delays grow to the bound; a healthy while starts them anew."""
    backoff = RestartBackoff(
        max_delay_s=3.0,
        first_delay_s=0.5,
        healthy_after_s=30.0,
        uniform=lambda low, high: high,
    )

    assert [backoff.next_delay_s(0.0) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.next_delay_s(29.9) == 3.0
    assert backoff.next_delay_s(30.0) == 0.5


def test_backoff_jitter_stays_within_half_and_whole() -> None:
    """Jitter never lengthens a delay and never more than halves it."""
    for share in (0.5, 1.0):
        backoff = RestartBackoff(
            max_delay_s=8.0, first_delay_s=2.0, uniform=lambda low, high, s=share: s
        )
        assert backoff.next_delay_s(0.0) == 2.0 * share
    assert (
        1.0 <= RestartBackoff(max_delay_s=8.0, first_delay_s=2.0).next_delay_s(0) <= 2
    )


@pytest.mark.triton
def test_runs_under_uvloop(make_repository: MakeRepository) -> None:
    """`int8qa up` runs on uvloop, whose transports are no subclasses of asyncio's."""
    uvloop = pytest.importorskip("uvloop")
    repository = make_repository()

    async def start_and_stop() -> TritonState:
        supervisor = make_supervisor(repository)
        async with supervisor:
            return supervisor.state

    assert uvloop.run(start_and_stop()) is TritonState.READY
