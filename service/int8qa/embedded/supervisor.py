"""Keeps one Triton alive on loopback.

In: an installation, a model repository and the embedded settings. Out: a gRPC
and a metrics address that stay the same over restarts, an observable state, and
Triton's log in ours. Restarts after any death of the server or of a model's stub
process. Refuses to know what the models compute and who calls them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path
from types import TracebackType

from int8qa.embedded.backoff import RestartBackoff
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
from int8qa.embedded.locate import TritonInstallation
from int8qa.embedded.triton_run import TritonRun, check_grpc_health
from int8qa.errors import EmbeddedTritonError
from int8qa.settings import EmbeddedSettings

_LOG = logging.getLogger("int8qa.embedded")

_PORT_ATTEMPTS = 3

ReadyCheck = Callable[[str], Awaitable[bool]]


class TritonState(str, Enum):
    """What the supervised Triton is doing."""

    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


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
        self._run: TritonRun | None = None
        self._launching: asyncio.Task[TritonRun] | None = None
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

    async def _launch_on_free_ports(self) -> TritonRun:
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

    async def _launch(self, ports: TritonPorts) -> TritonRun:
        for purpose, port in (("grpc", ports.grpc), ("metrics", ports.metrics)):
            if not is_port_free(port, self._host):
                raise EmbeddedTritonError(
                    f"port {port} on {self._host}, wanted for Triton's {purpose}, is "
                    "in use by another process; stop that one or choose another port "
                    f"(embedded.{purpose}_port)"
                )
        directory = self._compose_directory()
        shm_prefix = name_shm_prefix()
        run = await TritonRun.spawn(
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


def _report_end(task: asyncio.Task[None]) -> None:
    """Say so if the watching itself breaks; it must not go unnoticed."""
    if not task.cancelled() and task.exception() is not None:
        _LOG.critical("the Triton supervisor failed", exc_info=task.exception())
