"""Three Tritons and two gateways on one machine, and what may befall them.

In: two builds of a model. Out: processes, each Triton at a loopback address of its own,
started as `int8qa triton` and `int8qa serve` start them. Whatever happens, all of them
end with the block. Asks no question, and judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx

from int8qa.bench.gateway_process import GatewayProcess
from int8qa.build.repository import stage_repository
from int8qa.client import build_key_headers
from int8qa.contract import TOKENIZER_FILENAME, Contract, load_contract
from int8qa.embedded import TritonState, TritonSupervisor, locate_triton
from int8qa.embedded.guard import iter_group
from int8qa.embedded.launch import (
    LOOPBACK,
    TritonPorts,
    is_port_free,
    pick_free_port,
)
from int8qa.errors import ContractError, EmbeddedTritonError
from int8qa.settings import EmbeddedSettings

TRITONS = 3
GATEWAYS = 2
BATCHES_PER_TRITON = 3
"""In flight, from each gateway. Source: docs/scaling.md."""
_SERVER_PROCESS_NAME = "tritonserver"


def prepare_builds(repository: Path, newer: Path | None, place: Path) -> list[Path]:
    """The older build and the newer, each with models that say which one they are of.

    A build that was made without ``--beside`` is copied, and its models are marked.
    Without a newer one the older's engines are it, under another id.

    Args:
        repository: of the older build.
        newer: of the newer build.
        place: an empty directory for copies.

    Raises:
        ContractError: one is no complete model repository, or they are one build.
        RepositoryError: a copy cannot be written.
    """
    contract = load_contract(repository)
    builds = [repository.resolve()]
    if not contract.generation:
        builds = [place / "older"]
        stamp_build(repository, builds[0], contract.build_id)
    if newer is None:
        stamp_build(repository, place / "newer", f"{contract.build_id}-newer")
        return [*builds, place / "newer"]
    newer_contract = load_contract(newer)
    if newer_contract.build_id == contract.build_id:
        raise ContractError(
            f"{repository} and {newer} hold the same build, {contract.build_id}; give "
            f"--newer another, or leave it out"
        )
    if newer_contract.generation:
        return [*builds, newer.resolve()]
    stamp_build(newer, place / "newer", newer_contract.build_id)
    return [*builds, place / "newer"]


def stamp_build(source: Path, target: Path, build_id: str) -> Contract:
    """Copy a build and mark each of its models with an id.

    Raises:
        RepositoryError: the copy cannot be written.
    """
    contract = load_contract(source)
    with stage_repository(target) as staged:
        shutil.copyfile(
            source / TOKENIZER_FILENAME, staged.directory / TOKENIZER_FILENAME
        )
        for precision in contract.models:
            shutil.copytree(
                source / contract.triton_name(precision),
                staged.directory / precision.model_name,
            )
        named = contract.model_copy(update={"build_id": build_id})
        return staged.publish(named, {}, beside=True)


def choose_hosts() -> list[str]:
    """An address for each Triton; one for all where loopback has no more."""
    hosts = [f"127.0.0.{2 + number}" for number in range(TRITONS)]
    if all(is_port_free(0, host) for host in hosts):
        return hosts
    return [LOOPBACK] * TRITONS


class Fleet:
    """The processes; an async context manager that starts and ends them."""

    def __init__(
        self, older: Path, newer: Path, *, embedded: EmbeddedSettings, logs: Path
    ) -> None:
        """Choose addresses; nothing is started yet.

        Args:
            older: what all serve at first; from :func:`prepare_builds`.
            newer: what some serve later.
            embedded: of the Tritons. They share the cores unless it says otherwise.
            logs: directory for what the processes say.

        Raises:
            MissingDependencyError: there is no Triton to run here.
            EmbeddedTritonError: no port is free.
        """
        self._installation = locate_triton()
        self._older, self._newer = older, newer
        threads = embedded.engine_threads
        threads = threads or max(1, (os.cpu_count() or 1) // TRITONS)
        self._embedded = embedded.model_copy(update={"engine_threads": threads})
        self._hosts = choose_hosts()
        self._ports: list[TritonPorts] = []
        taken: list[int] = []
        for _ in range(TRITONS):
            taken += [pick_free_port(taken)]
            taken += [pick_free_port(taken)]
            self._ports.append(TritonPorts(*taken[-2:]))
        self.addresses = [
            f"{host}:{ports.grpc}"
            for host, ports in zip(self._hosts, self._ports, strict=True)
        ]
        self._supervisors = [self._supervise(i, older) for i in range(TRITONS)]
        self._frozen: set[int] = set()
        self._files = contextlib.ExitStack()
        self._logs = logs
        self.gateways = [self._prepare_gateway(i) for i in range(GATEWAYS)]
        self._client = httpx.AsyncClient(
            timeout=10.0, headers=build_key_headers(), trust_env=False
        )

    def log_path(self, gateway: int) -> Path:
        """Where a gateway's log is, JSON lines."""
        return self._logs / f"gateway-{gateway + 1}.jsonl"

    async def __aenter__(self) -> Fleet:  # noqa: PYI034 - Self is 3.11+
        self._files.enter_context(_log_to(self._logs / "tritons.log"))
        try:
            for gateway in self.gateways:
                gateway.start(self._older)
            await asyncio.gather(*(one.start() for one in self._supervisors))
            waits = (asyncio.to_thread(one.wait_ready) for one in self.gateways)
            await asyncio.gather(*waits)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        for number in list(self._frozen):
            with contextlib.suppress(EmbeddedTritonError):
                self.resume(number)
        # In threads, which end what they began even if nobody waits any more.
        stops = (asyncio.to_thread(one.stop) for one in self.gateways)
        await asyncio.gather(*stops)
        await asyncio.gather(*(one.stop() for one in self._supervisors))
        await self._client.aclose()
        self._files.close()

    # What may befall a Triton.

    async def kill(self, number: int) -> None:
        """SIGKILL; returns once its supervisor has started it again.

        Raises:
            EmbeddedTritonError: it does not run.
        """
        supervisor = self._supervisors[number]
        before = supervisor.restarts
        self._signal(number, signal.SIGKILL)
        await supervisor.wait_for_state(TritonState.READY, min_restarts=before + 1)

    def freeze(self, number: int) -> None:
        """SIGSTOP: it keeps its connections and answers nobody.

        Raises:
            EmbeddedTritonError: it does not run.
        """
        self._signal(number, signal.SIGSTOP)
        self._frozen.add(number)

    def resume(self, number: int) -> None:
        """SIGCONT.

        Raises:
            EmbeddedTritonError: it does not run.
        """
        self._frozen.discard(number)
        self._signal(number, signal.SIGCONT)

    async def replace(self, number: int) -> None:
        """End it in order, and start one of the newer build at its address.

        Raises:
            EmbeddedTritonError: the newer build did not become ready.
        """
        await self._supervisors[number].stop()
        self._supervisors[number] = self._supervise(number, self._newer)
        await self._supervisors[number].start()

    # What may befall a gateway.

    async def drain(self, number: int) -> int:
        """SIGTERM; returns its exit status once it has ended."""
        return await asyncio.to_thread(self.gateways[number].stop)

    async def start_newer(self, number: int) -> None:
        """Start it for the newer build; returns once that can be asked.

        Raises:
            GatewayRequestError: it ended, or was not ready in time.
        """
        self.gateways[number].start(self._newer)
        await asyncio.to_thread(self.gateways[number].wait_ready)

    # What they say of themselves.

    async def read_triton(self, number: int) -> str:
        """The metrics of a Triton that runs.

        Raises:
            EmbeddedTritonError: they cannot be read.
        """
        url = self._supervisors[number].metrics_url
        try:
            response = await self._client.get(url)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise EmbeddedTritonError(
                f"the metrics of Triton {number + 1} cannot be read at {url}: "
                f"{type(error).__name__}"
            ) from error
        return response.text

    async def read_gateway(self, number: int) -> str:
        """A gateway's metrics; empty where it does not answer."""
        try:
            response = await self._client.get(f"{self.gateways[number].url}/metrics")
        except httpx.HTTPError:
            return ""
        return response.text if response.status_code == httpx.codes.OK else ""

    def _supervise(self, number: int, build: Path) -> TritonSupervisor:
        ports = self._ports[number]
        return TritonSupervisor(
            installation=self._installation,
            model_repository=build,
            settings=self._embedded,
            grpc_port=ports.grpc,
            metrics_port=ports.metrics,
            host=self._hosts[number],
        )

    def _prepare_gateway(self, number: int) -> GatewayProcess:
        path = self.log_path(number)
        log = path.open("w+", encoding="utf-8", errors="replace")
        return GatewayProcess(
            ",".join(self.addresses),
            self._files.enter_context(log),
            INT8QA_BATCHER__MAX_IN_FLIGHT=str(BATCHES_PER_TRITON * TRITONS),
            INT8QA_LOG_FORMAT="json",
            INT8QA_LOG_LEVEL="info",
        )

    def _signal(self, number: int, what: signal.Signals) -> None:
        group = self._supervisors[number].process_group
        for process in iter_group(group) if group else ():
            if process.name == _SERVER_PROCESS_NAME:
                os.kill(process.pid, what)
                return
        raise EmbeddedTritonError(f"Triton {number + 1} does not run")


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """What Tritons and their supervisors say goes to a file, and not to the screen."""
    logger = logging.getLogger("int8qa")
    before = logger.level, logger.propagate
    handler = logging.FileHandler(path, "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)
        handler.close()
