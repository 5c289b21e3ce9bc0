"""Keeps one Triton alive on loopback.

In: an installation, a model repository and the embedded settings. Out: a gRPC
and a metrics address that stay the same over restarts, an observable state, and
Triton's log in ours. Restarts after any death of the server or of a model's stub
process. Refuses to know what the models compute and who calls them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import cast

import grpc

from int8qa.embedded import guard
from int8qa.embedded.launch import (
    EVERYWHERE,
    LOOPBACK,
    TritonPorts,
    build_arguments,
    build_environment,
    check_shared_memory,
    compose_files,
    is_port_free,
    list_package_directories,
    make_private_directory,
    name_shm_prefix,
    pick_free_port,
    remove_stale_shared_memory,
)
from int8qa.embedded.locate import STUB_NAME, TritonInstallation
from int8qa.embedded.log_lines import LogLine, find_failure, parse_log_line
from int8qa.errors import EmbeddedTritonError
from int8qa.settings import EmbeddedSettings

TRITON_LOG = logging.getLogger("int8qa.triton")
_LOG = logging.getLogger("int8qa.embedded")

FIRST_RESTART_DELAY_S = 0.5
HEALTHY_AFTER_S = 30.0
"""Ready for so long, a death counts as the first one again."""
_READY_POLL_S = 0.1
_WATCH_POLL_S = 0.5
_KILL_MARGIN_S = 5.0
_LAST_OUTPUT_S = 1.0
_PORT_ATTEMPTS = 3
_MAX_LINE_BYTES = 16_384
_STUB_PROCESS_NAME = STUB_NAME[:15]  # as the kernel shortens it

ReadyCheck = Callable[[str], Awaitable[bool]]


class TritonState(str, Enum):
    """What the supervised Triton is doing."""

    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


class RestartBackoff:
    """Exponential delays with jitter, forgotten after a healthy time."""

    def __init__(
        self,
        *,
        max_delay_s: float,
        first_delay_s: float = FIRST_RESTART_DELAY_S,
        healthy_after_s: float = HEALTHY_AFTER_S,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._max_delay_s = max_delay_s
        self._first_delay_s = first_delay_s
        self._healthy_after_s = healthy_after_s
        self._uniform = uniform
        self._failures = 0

    def next_delay_s(self, healthy_s: float) -> float:
        """Return the wait before the next start.

        Args:
            healthy_s: how long Triton had been ready, 0 where it never was.

        Returns:
            Seconds in [d/2, d], where d doubles from the first delay up to the
            greatest one.
        """
        if healthy_s >= self._healthy_after_s:
            self._failures = 0
        # The exponent is bounded only to keep the float finite.
        delay_s = self._first_delay_s * 2 ** min(self._failures, 60)
        self._failures += 1
        share = self._uniform(0.5, 1.0)
        return float(share * min(delay_s, self._max_delay_s))


async def check_grpc_health(url: str) -> bool:
    """Ask Triton's standard gRPC health service whether it serves.

    Source: grpc.health.v1, Health/Check; field 1 of the answer is the status and
    1 is SERVING. The empty request asks for the whole server.
    """
    return await _call(url, "/grpc.health.v1.Health/Check", b"") == b"\x08\x01"


async def check_model_ready(url: str, name: str) -> bool:
    """Ask Triton whether a model is loaded; False also where it does not answer.

    Source: KServe's inference protocol, ModelReady; field 1 of the request is the name,
    field 1 of the answer is true.
    """
    request = b"\x0a" + bytes([len(name)]) + name.encode()
    method = "/inference.GRPCInferenceService/ModelReady"
    return await _call(url, method, request) == b"\x08\x01"


async def _call(url: str, method: str, request: bytes) -> bytes | None:
    options = [
        # A channel of its own: the shared pool would remember the refused
        # connections of the start-up and wait ever longer between attempts.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    async with grpc.aio.insecure_channel(url, options=options) as channel:
        call = channel.unary_unary(method)
        try:
            answer: bytes = await call(request, timeout=1.0)
        except grpc.aio.AioRpcError:
            return None
    return answer


class TritonSupervisor:
    """Starts, watches, restarts and stops one Triton.

    Use it as an async context manager, or call :meth:`start` and :meth:`stop`.
    """

    def __init__(
        self,
        *,
        installation: TritonInstallation,
        model_repository: Path,
        settings: EmbeddedSettings,
        grpc_port: int = 0,
        metrics_port: int = 0,
        http_port: int = 0,
        host: str = LOOPBACK,
        control_key: str = "",
        check_ready: ReadyCheck = check_grpc_health,
        backoff: RestartBackoff | None = None,
    ) -> None:
        """Prepare a supervisor; nothing is started yet.

        Args:
            installation: the Triton to run.
            model_repository: a complete model repository.
            settings: time limits, engine threads and ports.
            grpc_port: a fixed port; 0 leaves the choice to the settings, and 0 there
                means any free one.
            metrics_port: likewise, for Prometheus.
            http_port: a loopback port for Triton's HTTP health checks; 0: none.
            host: where gRPC and metrics listen; 0.0.0.0 in a container.
            control_key: who names it may have models loaded; empty: nobody.
            check_ready: given host:port, tells whether Triton serves.
            backoff: delays between restarts.
        """
        self._installation = installation
        self._model_repository = model_repository.resolve()
        self._settings = settings
        self._wanted_ports = (
            grpc_port or settings.grpc_port,
            metrics_port or settings.metrics_port,
        )
        self._http_port = http_port
        self._host = host
        self._control_key = control_key
        self._ports: TritonPorts | None = None
        self._check_ready = check_ready
        self._backoff = backoff or RestartBackoff(
            max_delay_s=settings.max_restart_delay_s
        )
        self._directory: Path | None = None
        self._run: _TritonRun | None = None
        self._launching: asyncio.Task[_TritonRun] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._state = TritonState.STOPPED
        self._state_changed = asyncio.Condition()
        self._restarts = 0

    @property
    def state(self) -> TritonState:
        """The state now; see also :meth:`wait_for_state`."""
        return self._state

    @property
    def restarts(self) -> int:
        """How many times Triton was started again after the first start."""
        return self._restarts

    @property
    def grpc_url(self) -> str:
        """host:port of Triton's gRPC endpoint, the same over all restarts."""
        return f"{self._reach}:{self._require_ports().grpc}"

    @property
    def metrics_url(self) -> str:
        """Address of Triton's own Prometheus metrics."""
        return f"http://{self._reach}:{self._require_ports().metrics}/metrics"

    @property
    def _reach(self) -> str:
        """The address we reach Triton at ourselves."""
        return LOOPBACK if self._host == EVERYWHERE else self._host

    @property
    def process_group(self) -> int | None:
        """Group of the guard, `tritonserver` and the stubs; None while none runs."""
        return self._run.group if self._run else None

    async def __aenter__(self) -> TritonSupervisor:  # noqa: PYI034 - Self is 3.11+
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start Triton and wait until every model is ready.

        Raises:
            EmbeddedTritonError: it ended before (with its own reason), was not
                ready in time, or a port is taken. Nothing is left running.
        """
        if self._state is not TritonState.STOPPED:
            raise EmbeddedTritonError(f"the embedded Triton is already {self._state}")
        if not self._model_repository.is_dir():
            raise EmbeddedTritonError(
                f"there is no model repository at {self._model_repository}; make one "
                "with `int8qa build`"
            )
        for prefix in remove_stale_shared_memory():
            _LOG.info("removed shared memory of an ended process: %s*", prefix)
        check_shared_memory()
        await self._set_state(TritonState.STARTING)
        try:
            self._launching = asyncio.create_task(self._launch_on_free_ports())
            self._run = await self._launching
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError) and not self._launching
            self._remove_directory()
            await self._set_state(TritonState.STOPPED)
            if stopped:
                raise EmbeddedTritonError(
                    "the embedded Triton was stopped while it was starting"
                ) from error
            if isinstance(error, OSError):
                raise EmbeddedTritonError(
                    f"the embedded Triton cannot be prepared: {error}"
                ) from error
            raise
        finally:
            self._launching = None
        await self._set_state(TritonState.READY)
        _LOG.info(
            "Triton is ready: gRPC on %s, metrics at %s",
            self.grpc_url,
            self.metrics_url,
        )
        self._watch = asyncio.create_task(self._keep_alive(), name="triton-watch")
        self._watch.add_done_callback(_report_end)

    async def stop(self) -> None:
        """Stop Triton: SIGTERM, then SIGKILL to all of it; may be called twice."""
        launching, self._launching = self._launching, None
        watch, self._watch = self._watch, None
        for task in (launching, watch):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        run, self._run = self._run, None
        try:
            if run is not None:
                await run.stop()
        finally:
            self._remove_directory()
            await self._set_state(TritonState.STOPPED)

    async def wait_for_state(
        self, state: TritonState, *, min_restarts: int = 0
    ) -> None:
        """Wait until the state is ``state`` after at least so many restarts."""
        async with self._state_changed:
            await self._state_changed.wait_for(
                lambda: self._state is state and self._restarts >= min_restarts
            )

    async def _keep_alive(self) -> None:
        while self._run is not None:
            ready_at_s = time.monotonic()
            reason = await self._run.wait_failed(self.grpc_url)
            await self._run.kill()
            self._run = None
            healthy_s = time.monotonic() - ready_at_s
            while self._run is None:
                delay_s = self._backoff.next_delay_s(healthy_s)
                _LOG.error("Triton is down: %s; restart in %.1f s", reason, delay_s)
                await self._set_state(TritonState.BACKOFF)
                await asyncio.sleep(delay_s)
                self._restarts += 1
                await self._set_state(TritonState.STARTING)
                try:
                    self._run = await self._launch(self._require_ports())
                # OSError: no processes, descriptors or memory left just now.
                # RuntimeError: no threads, which asyncio may want for a child.
                except (EmbeddedTritonError, OSError, RuntimeError) as error:
                    reason, healthy_s = str(error), 0.0
            await self._set_state(TritonState.READY)
            _LOG.info("Triton is ready again (restarts so far: %d)", self._restarts)

    async def _launch_on_free_ports(self) -> _TritonRun:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            grpc_port, metrics_port = self._wanted_ports
            if grpc_port and grpc_port == metrics_port:
                raise EmbeddedTritonError(
                    f"Triton's gRPC and metrics ports are both {grpc_port}; choose two "
                    "(embedded.grpc_port, embedded.metrics_port)"
                )
            grpc_port = grpc_port or pick_free_port([metrics_port])
            metrics_port = metrics_port or pick_free_port([grpc_port])
            self._ports = TritonPorts(grpc_port, metrics_port, self._http_port)
            try:
                return await self._launch(self._ports)
            except EmbeddedTritonError:
                # Another process may take a port between our look and Triton's bind.
                taken = not all(
                    is_port_free(port, self._host) for port in (grpc_port, metrics_port)
                )
                if attempt == _PORT_ATTEMPTS or all(self._wanted_ports) or not taken:
                    raise
        raise AssertionError

    async def _launch(self, ports: TritonPorts) -> _TritonRun:
        for purpose, port in (("grpc", ports.grpc), ("metrics", ports.metrics)):
            if not is_port_free(port, self._host):
                raise EmbeddedTritonError(
                    f"port {port} on {self._host}, wanted for Triton's {purpose}, is "
                    "in use by another process; stop that one or choose another port "
                    f"(embedded.{purpose}_port)"
                )
        directory = self._compose_directory()
        shm_prefix = name_shm_prefix()
        run = await _TritonRun.spawn(
            arguments=build_arguments(
                self._installation,
                directory=directory,
                ports=ports,
                shm_prefix=shm_prefix,
                # Earlier than our own limit, so that Triton still exits in order.
                exit_timeout_s=0.8 * self._settings.stop_timeout_s,
                host=self._host,
                control_key=self._control_key,
            ),
            environment=build_environment(
                self._installation,
                directory=directory,
                engine_threads=self._settings.engine_threads,
                base=os.environ,
            ),
            shm_prefix=shm_prefix,
            directory=directory,
            stop_timeout_s=self._settings.stop_timeout_s,
        )
        try:
            await run.wait_ready(
                lambda: self._check_ready(f"{self._reach}:{ports.grpc}"),
                timeout_s=self._settings.start_timeout_s,
            )
        except BaseException:
            await run.kill()
            raise
        return run

    async def _set_state(self, state: TritonState) -> None:
        async with self._state_changed:
            self._state = state
            self._state_changed.notify_all()

    def _require_ports(self) -> TritonPorts:
        if self._ports is None:
            raise EmbeddedTritonError("the embedded Triton was not started yet")
        return self._ports

    def _compose_directory(self) -> Path:
        """Make the private directory anew: a cleaner of /tmp may have been there."""
        self._remove_directory()
        self._directory = make_private_directory(os.environ.get("TMPDIR"))
        compose_files(
            self._installation,
            self._directory,
            model_repository=self._model_repository,
            package_directories=list_package_directories(),
        )
        return self._directory

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class _TritonRun(asyncio.SubprocessProtocol):
    """One life of Triton: the guard process and everything below it.

    A protocol rather than asyncio's Process, whose wait() also waits for the end
    of the output; a stub that hangs while its Triton is dead would hold that back.
    """

    def __init__(self, *, shm_prefix: str, stop_timeout_s: float) -> None:
        self._shm_prefix = shm_prefix
        self._stop_timeout_s = stop_timeout_s
        self._stubs: dict[int, str] = {}
        self._models_changed = False
        self._lines: deque[LogLine] = deque(maxlen=200)
        self._rest = b""
        self._exited = asyncio.Event()
        self._output_ended = asyncio.Event()
        self._transport: asyncio.SubprocessTransport

    @classmethod
    async def spawn(
        cls,
        *,
        arguments: list[str],
        environment: dict[str, str],
        shm_prefix: str,
        directory: Path,
        stop_timeout_s: float,
    ) -> _TritonRun:
        """Start the guard, which starts Triton, in a session of their own.

        A session of their own keeps Ctrl-C away from Triton: it is to stop after
        the gateway has drained, not with it.
        """
        transport, run = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(shm_prefix=shm_prefix, stop_timeout_s=stop_timeout_s),
            sys.executable,
            "-I",
            "-S",
            guard.__file__,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        run._transport = transport  # noqa: SLF001 - our own
        specification = {
            "arguments": arguments,
            "shm_prefix": shm_prefix,
            "directory": str(directory),
            "stop_timeout_s": stop_timeout_s,
        }
        run._input().write(json.dumps(specification).encode() + b"\n")  # noqa: SLF001
        return run

    @property
    def group(self) -> int:
        """Process group of the guard and of all it started."""
        return self._transport.get_pid()

    async def wait_ready(
        self, check: Callable[[], Awaitable[bool]], *, timeout_s: float
    ) -> None:
        """Wait until Triton serves all models, then note their stub processes."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._exited.is_set():
                await _wait_for(self._output_ended, _LAST_OUTPUT_S)
                raise EmbeddedTritonError(
                    f"Triton ended before it was ready ({self._describe_exit()}): "
                    f"{find_failure(self._lines)}"
                )
            if await check():
                break
            if time.monotonic() >= deadline_s:
                told = [line.message for line in self._lines if not line.is_banner]
                raise EmbeddedTritonError(
                    f"Triton was not ready within {timeout_s:g} s "
                    "(embedded.start_timeout_s); its last lines: "
                    f"{' | '.join(told[-5:]) or 'none'}"
                )
            await _wait_for(self._exited, _READY_POLL_S)
        self._note_stubs()

    def _note_stubs(self) -> None:
        self._models_changed = False
        self._stubs |= {
            process.pid: _read_stub_model(process.pid)
            for process in guard.iter_group(self.group)
            if process.name == _STUB_PROCESS_NAME
        }

    async def wait_failed(self, url: str) -> str:
        """Return, with the reason, once Triton or one of its stubs is gone.

        A stub whose model Triton has unloaded may go.
        """
        while not await _wait_for(self._exited, _WATCH_POLL_S):
            if self._models_changed:
                self._note_stubs()
            # Triton 2.51 never starts a dead stub again: it answers every request
            # with an error and still calls the model ready.
            for pid, model_name in list(self._stubs.items()):
                try:
                    stub = guard.read_process(pid)
                except OSError:  # it cannot be told now: no reason to end a Triton
                    continue
                if stub is None or stub.group != self.group or not stub.is_alive:
                    if await check_model_ready(url, model_name):
                        return f"the process of {model_name} ended (pid {pid})"
                    del self._stubs[pid]
        return f"tritonserver ended ({self._describe_exit()})"

    async def stop(self) -> None:
        """Let Triton exit in order; what has not gone in time is killed."""
        self._input().close()
        await _wait_for(self._exited, self._stop_timeout_s + _KILL_MARGIN_S)
        await self.kill()

    async def kill(self) -> None:
        """End every process of the group at once and remove their shared memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        await self._exited.wait()
        # Bounded: what left the group on purpose may hold the output open for ever.
        await _wait_for(self._output_ended, _LAST_OUTPUT_S)
        self._transport.close()
        guard.remove_shared_memory(self._shm_prefix)

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002
        """Take in a piece of Triton's output."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._log_line(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        """Note the end of Triton's output."""
        if fd == 1:
            if self._rest:
                self._log_line(self._rest)
            self._output_ended.set()

    def process_exited(self) -> None:
        """Note the guard's end."""
        self._exited.set()

    def _log_line(self, raw: bytes) -> None:
        line = parse_log_line(raw[:_MAX_LINE_BYTES].decode("utf-8", "replace"))
        self._lines.append(line)
        if line.message.startswith("successfully loaded"):
            self._models_changed = True
        if line.message:
            TRITON_LOG.log(line.level, "%s", line.message)

    def _input(self) -> asyncio.WriteTransport:
        # A cast, not a check: uvloop's transports do not inherit from asyncio's.
        return cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))

    def _describe_exit(self) -> str:
        code = self._transport.get_returncode()
        assert code is not None
        number = -code if code < 0 else code - 128
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            return f"exit status {code}"


def _read_stub_model(pid: int) -> str:
    """The model that a stub runs, from its command line: …/NAME/VERSION/model.py."""
    try:
        arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    paths = (Path(os.fsdecode(argument)) for argument in arguments[1:])
    return next((p.parts[-3] for p in paths if p.name == "model.py"), "")


async def _wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for the event within a limit; tell whether it came."""
    # Not asyncio.wait_for: before Python 3.12 it may swallow a cancellation.
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiting], timeout=timeout_s)
    finally:
        waiting.cancel()
    return event.is_set()


def _report_end(task: asyncio.Task[None]) -> None:
    """Say so if the watching itself breaks; it must not go unnoticed."""
    if not task.cancelled() and task.exception() is not None:
        _LOG.critical("the Triton supervisor failed", exc_info=task.exception())
