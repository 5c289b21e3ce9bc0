"""The whole service in one process tree: an embedded Triton and the gateway.

In: settings and a complete model repository. Out: a gateway on its port, answering
through a Triton that this process starts, watches and stops. What ``int8qa up`` runs;
``int8qa triton`` runs the Triton alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
from collections.abc import Callable, Iterator

from int8qa.contract import TOKENIZER_FILENAME, Contract, load_contract
from int8qa.embedded import TritonSupervisor, locate_triton
from int8qa.embedded.launch import TritonPorts
from int8qa.gateway.app import create_app
from int8qa.gateway.server import run_server
from int8qa.gateway.tracing import open_tracing
from int8qa.gateway.triton import TritonEngine
from int8qa.gateway.workers import run_workers
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import Settings


async def run_stack(
    settings: Settings,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None],
) -> None:
    """Run Triton and the gateway until SIGINT or SIGTERM.

    Args:
        settings: of the process; ``triton.url`` is ours to choose here.
        listener: the gateway's socket, bound before anything was started.
        on_ready: called once with the base URL, when all models can be asked.

    Raises:
        ConfigurationError: tracing is asked for and not installed.
        MissingDependencyError: there is no Triton to run here.
        EmbeddedTritonError: Triton did not become ready; its own reason is given.
        ContractError: the model repository is incomplete.
    """
    # What is missing is said before a Triton is started for nothing.
    tracing = open_tracing(settings.tracing)
    installation = locate_triton()
    contract = load_contract(settings.model_repository)
    tokenizer = ReaderTokenizer.from_file(
        settings.model_repository / TOKENIZER_FILENAME
    )
    control_key = secrets.token_hex(16) if settings.embedded.model_control else ""
    supervisor = TritonSupervisor(
        installation=installation,
        model_repository=settings.model_repository,
        settings=settings.embedded,
        control_key=control_key,
    )

    def open_engine(contract: Contract) -> TritonEngine:
        return TritonEngine(
            supervisor.grpc_url, contract, control_key=control_key, tracing=tracing
        )

    try:
        with cancelled_by_signals():
            await supervisor.start()
        if settings.workers > 1:
            tracing.close()  # each worker has its own
            triton = {"url": supervisor.grpc_url, "control_key": control_key}
            reach = {"triton": settings.triton.model_copy(update=triton)}
            reached = settings.model_copy(update=reach)
            await run_workers(reached, listener, on_ready=on_ready)
            return
        app = create_app(
            settings,
            contract,
            tokenizer,
            open_engine(contract),
            open_engine=open_engine,
            tracing=tracing,
        )
        await run_server(app, listener, on_ready=on_ready)
    except asyncio.CancelledError:
        # A signal during start-up: what was started is stopped below, and there is
        # nobody left to tell.
        return
    finally:
        await supervisor.stop()


async def run_triton(
    settings: Settings,
    *,
    host: str,
    ports: TritonPorts,
    on_ready: Callable[[str], None],
) -> None:
    """Run Triton alone until SIGINT or SIGTERM, started again whenever it ends.

    Args:
        settings: of the process; ``model_repository`` and ``embedded`` are read.
        host: where gRPC and metrics listen.
        ports: Triton's.
        on_ready: called once with host:port of gRPC, when every model is loaded.

    Raises:
        MissingDependencyError: there is no Triton to run here.
        EmbeddedTritonError: Triton did not become ready; its own reason is given.
    """
    supervisor = TritonSupervisor(
        installation=locate_triton(),
        model_repository=settings.model_repository,
        settings=settings.embedded,
        grpc_port=ports.grpc,
        metrics_port=ports.metrics,
        http_port=ports.http,
        host=host,
        control_key=settings.triton.control_key,
    )
    try:
        with cancelled_by_signals():
            await supervisor.start()
            on_ready(supervisor.grpc_url)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        return
    finally:
        await supervisor.stop()


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Until the server handles them itself, SIGINT and SIGTERM cancel this task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    handled = (signal.SIGINT, signal.SIGTERM)
    for number in handled:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
