"""The gateway as one application, and the server that runs it.

In: settings, the contract, a tokenizer, an engine. Out: a FastAPI application that
opens and closes all it needs in its lifespan, and starts whether or not the engine
is there; or the whole as a process that ends gracefully on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import int8qa
from int8qa.contract import (
    TOKENIZER_FILENAME,
    Contract,
    load_contract,
)
from int8qa.errors import ConfigurationError, Int8qaError
from int8qa.gateway import batches, routes, status
from int8qa.gateway.comparison import ComparisonWindow
from int8qa.gateway.edge import RequestEdge, note_problem
from int8qa.gateway.engine import Engine
from int8qa.gateway.logs import configure_logging
from int8qa.gateway.openapi import describe_api
from int8qa.gateway.page import build_page_router, load_files
from int8qa.gateway.pipeline import AnswerPipeline
from int8qa.gateway.problems import (
    INVALID,
    REJECTION_REASONS,
    FieldFault,
    RequestProblemError,
    describe_problem,
)
from int8qa.gateway.routes import Gateway, get_gateway, get_record
from int8qa.gateway.telemetry import Telemetry
from int8qa.gateway.tracing import NO_TRACING, Tracing, open_tracing
from int8qa.gateway.triton import TritonEngine
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import Settings

_DESCRIPTION = (
    "Extractive question answering in INT8, beside FP16, on Triton Inference Server. "
    "Offsets are Unicode code points. Every error is RFC 9457 problem JSON; 429 and "
    "503 carry `Retry-After`. Each response carries `X-Request-Id`."
)

_BACKLOG = 2048

_LAST_WORDS_S = 0.5
"""Between a second signal's refusals and cutting whoever has not read them."""


def create_app(
    settings: Settings,
    contract: Contract,
    tokenizer: ReaderTokenizer,
    engine: Engine,
    *,
    tracing: Tracing = NO_TRACING,
) -> FastAPI:
    """Build the application; ``app.state.gateway`` holds its parts.

    Its end closes the engine and ``tracing``.

    Raises:
        ConfigurationError: the default precision is not in the model repository.
        ContractError: the tokenizer is not the one the models were built with.
    """
    telemetry = Telemetry(contract)
    telemetry.declare_reasons(REJECTION_REASONS)
    comparison = ComparisonWindow(settings.comparison.window, contract.models)
    telemetry.read_comparison(comparison)
    telemetry.set_guard_threshold(settings.comparison.guard_agreement)
    pipeline = AnswerPipeline(
        settings,
        contract,
        tokenizer,
        engine,
        telemetry=telemetry,
        comparison=comparison,
        tracing=tracing,
    )

    @contextlib.asynccontextmanager
    async def run_lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await pipeline.start()
            yield
        finally:
            await pipeline.close()
            await asyncio.to_thread(tracing.close)

    # FastAPI's own page loads its scripts from a CDN: blank where there is no internet.
    app = FastAPIOffline(
        title="int8qa",
        version=int8qa.__version__,
        description=_DESCRIPTION,
        lifespan=run_lifespan,
        redirect_slashes=False,
        redoc_url=None,
        # FastAPI's own spans and logs, where it has any, quote query strings and the
        # messages of exceptions.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
        },
    )
    app.state.gateway = Gateway(
        settings=settings,
        contract=contract,
        pipeline=pipeline,
        telemetry=telemetry,
        comparison=comparison,
    )
    app.state.plain_paths = frozenset({"/docs", "/openapi.json"})
    app.include_router(routes.router)
    app.include_router(batches.router)
    app.include_router(status.router)
    app.include_router(build_page_router(load_files()))
    app.add_middleware(
        RequestEdge,
        telemetry=telemetry,
        max_body_bytes=settings.limits.max_body_bytes,
        tracing=tracing,
    )
    for kind in (
        Int8qaError,
        RequestProblemError,
        HTTPException,
        RequestValidationError,
    ):
        app.add_exception_handler(kind, _handle_error)
    app.openapi = lambda: describe_api(  # type: ignore[method-assign]
        app,
        limits=settings.limits,
        precisions=pipeline.list_precisions(),
        default_precision=pipeline.default_precision.value,
    )
    return app


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        # Path and query parameters alone; bodies do not pass through FastAPI.
        faults = [
            FieldFault(str(finding["loc"][-1]), finding["msg"])
            for finding in error.errors()
        ]
        error = RequestProblemError(INVALID, "invalid parameters", faults)
    problem = describe_problem(error)
    record = get_record(request)
    note_problem(record, problem, error)
    if problem.kind.reason is not None:
        get_gateway(request).telemetry.count_rejection(problem.kind.reason)
    headers = error.headers if isinstance(error, HTTPException) else None
    return problem.to_response(record.request_id, headers=dict(headers or {}))


# The process.


class GatewayServer(uvicorn.Server):
    """Uvicorn, which drains the pipeline while it waits for connections.

    Unlike uvicorn it does not raise a caught signal again when done: who called may
    have more to stop.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        pipeline: AnswerPipeline,
        *,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self._pipeline = pipeline
        self._drain_timeout_s = drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, finish what was accepted, in bounded time."""
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await drain

    async def _drain(self) -> None:
        drain = asyncio.create_task(self._pipeline.drain(self._drain_timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if drain.done():
            await drain
            return
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await self._pipeline.drain(0)
        # Uvicorn closes each connection that has its answer. What is left is still
        # sending its request, or does not read.
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM: the first drains, the second fails what is left.

        A third skips the orderly close.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ask the server to end; on a second signal, without waiting for answers."""
        del sig, frame
        if self._hurry.is_set():
            self.force_exit = True
        elif self.should_exit:
            # A plain set() in a signal handler would not wake the loop.
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind and listen, before anything expensive is started.

    Raises:
        ConfigurationError: the address is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}. Stop what listens "
            f"there, or choose another port with INT8QA_PORT"
        ) from error


async def run_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application until SIGINT or SIGTERM, then drain and return.

    Args:
        app: from ``create_app``.
        listener: from ``bind_socket``; closed at the end.
        on_ready: called once with the base URL, when all models can first be asked.
    """
    gateway: Gateway = app.state.gateway
    drain_timeout_s = gateway.settings.limits.shutdown_timeout_s
    server = GatewayServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            # A little longer than the drain, which answers what it cannot finish.
            timeout_graceful_shutdown=math.ceil(drain_timeout_s) + 1,
        ),
        gateway.pipeline,
        drain_timeout_s=drain_timeout_s,
    )
    host, port = listener.getsockname()[:2]
    base_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def announce() -> None:
        await gateway.pipeline.watch.wait_ready()
        if on_ready is not None:
            on_ready(base_url)

    announcement = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[listener])
    finally:
        announcement.cancel()
        await asyncio.gather(announcement, return_exceptions=True)
        listener.close()


def serve(
    settings: Settings,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Run the gateway against a Triton until SIGINT or SIGTERM; blocks.

    Args:
        settings: of the process.
        listener: a socket already bound by ``bind_socket``.
        on_ready: called once with the base URL, when all models can first be asked.

    Raises:
        ConfigurationError: the port is taken, the default precision not built, or
            tracing asked for and not installed.
        ContractError: the model repository is incomplete.
        CheckpointError: its tokenizer cannot be read.
    """
    configure_logging(settings)
    contract = load_contract(settings.model_repository)
    tokenizer = ReaderTokenizer.from_file(
        settings.model_repository / TOKENIZER_FILENAME
    )
    tracing = open_tracing(settings.tracing)
    engine = TritonEngine(settings.triton.url, contract, tracing=tracing)
    app = create_app(settings, contract, tokenizer, engine, tracing=tracing)
    if listener is None:
        listener = bind_socket(settings.host, settings.port)
    run_event_loop(run_server(app, listener, on_ready=on_ready))


def run_event_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` to its end, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # not on Windows, nor on every Python
        asyncio.run(main)
    else:
        uvloop.run(main)
