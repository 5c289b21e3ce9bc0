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
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import int8qa
from int8qa.contract import (
    TOKENIZER_FILENAME,
    Contract,
    Precision,
    load_contract,
)
from int8qa.errors import ConfigurationError, Int8qaError
from int8qa.gateway import batches, routes, status
from int8qa.gateway.access import AccessGate, KeyRing
from int8qa.gateway.addresses import AddressSplit
from int8qa.gateway.budget import ByteBudget
from int8qa.gateway.comparison import ComparisonWindow
from int8qa.gateway.connections import build_protocol
from int8qa.gateway.edge import RequestEdge, note_problem
from int8qa.gateway.engine import Engine
from int8qa.gateway.logs import configure_logging, get_logger
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
from int8qa.gateway.reload import Gateway, Reloader
from int8qa.gateway.routes import get_gateway, get_record
from int8qa.gateway.telemetry import Telemetry
from int8qa.gateway.tracing import NO_TRACING, Tracing, open_tracing
from int8qa.gateway.triton_group import open_tritons
from int8qa.gateway.waiting import finish_within
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import Settings

_DESCRIPTION = (
    "Extractive question answering in INT8, beside FP16, on Triton Inference Server. "
    "Offsets are Unicode code points. Every error is RFC 9457 problem JSON; 429 and "
    "503 carry `Retry-After`. Each response carries `X-Request-Id`."
)

_CORS_METHODS = ("GET", "POST")
_CORS_REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "X-Precision",
    "X-Request-Id",
    "X-Request-Timeout",
)
_CORS_RESPONSE_HEADERS = ("Retry-After", "Server-Timing", "X-Request-Id")

_BACKLOG = 2048

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_ANNOUNCE_POLL_S = 0.5

_LAST_WORDS_S = 0.5
"""Between a second signal's refusals and cutting whoever has not read them."""


def create_app(
    settings: Settings,
    contract: Contract,
    tokenizer: ReaderTokenizer,
    engine: Engine,
    *,
    open_engine: Callable[[Contract], Engine] | None = None,
    tracing: Tracing = NO_TRACING,
) -> FastAPI:
    """Build the application; ``app.state.gateway`` holds its parts.

    Its end closes the engine and ``tracing``. With ``open_engine``, which gives an
    engine for another build, ``app.state.reloader`` can replace ``app.state.gateway``.

    Raises:
        ConfigurationError: the default precision is not in the model repository, or
            the file of API keys is unusable.
        ContractError: the tokenizer is not the one the models were built with.
    """
    telemetry = Telemetry(contract)
    telemetry.declare_reasons(REJECTION_REASONS)
    telemetry.set_guard_threshold(settings.comparison.guard_agreement)
    access = settings.access
    keys = KeyRing(Path(access.keys_file), telemetry) if access.keys_file else None

    def open_gateway(
        contract: Contract, tokenizer: ReaderTokenizer, engine: Engine
    ) -> Gateway:
        comparison = ComparisonWindow(settings.comparison.window, contract.models)
        pipeline = AnswerPipeline(
            settings,
            contract,
            tokenizer,
            engine,
            telemetry=telemetry,
            comparison=comparison,
            tracing=tracing,
            on_other_build=app.state.reloader.request_retry,
        )
        return Gateway(settings, contract, pipeline, telemetry, comparison)

    @contextlib.asynccontextmanager
    async def run_lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await app.state.gateway.pipeline.start()
            async with keys.watch() if keys else contextlib.nullcontext():
                yield
        finally:
            await app.state.reloader.close()
            await app.state.gateway.pipeline.close()
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
    app.state.reloader = Reloader(
        app.state, engine, open_engine=open_engine, open_gateway=open_gateway
    )
    app.state.gateway = open_gateway(contract, tokenizer, engine)
    telemetry.read_comparison(app.state.gateway.comparison)
    app.state.plain_paths = frozenset({"/docs", "/openapi.json"})
    app.include_router(routes.router)
    app.include_router(batches.router)
    app.include_router(status.router)
    files = load_files(operator_links=not settings.admin.port)
    app.include_router(build_page_router(files))
    # From the innermost out.
    if keys is not None:
        app.add_middleware(AccessGate, keys=keys, telemetry=telemetry)
    if settings.admin.port:
        app.add_middleware(AddressSplit, admin_port=settings.admin.port)
    if access.list_origins():
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.list_origins(),
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
        )
    app.add_middleware(
        RequestEdge,
        telemetry=telemetry,
        max_body_bytes=settings.limits.max_body_bytes,
        budget=ByteBudget(settings.limits.max_pending_bytes),
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
        precisions=app.state.gateway.pipeline.list_precisions(),
        default_precision=app.state.gateway.pipeline.default_precision.value,
        keyed=keys is not None,
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
        reloader: Reloader,
        *,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self._reloader = reloader
        self._drain_timeout_s = drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, finish what was accepted, in bounded time."""
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await drain

    async def _drain(self) -> None:
        await self._reloader.close()
        pipeline = self._reloader.current.pipeline
        drain = asyncio.create_task(pipeline.drain(self._drain_timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if drain.done():
            await drain
            return
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await pipeline.drain(0)
        # Uvicorn closes each connection that has its answer. What is left is still
        # sending its request, or does not read.
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM: the first drains, the second fails what is left.

        A third skips the orderly close. SIGUSR1 reloads a rebuilt model repository.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        # Not SIGHUP: a terminal that is closed sends it, and means the end.
        if hasattr(signal, "SIGUSR1"):
            before[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1,
                lambda *_: self._loop.call_soon_threadsafe(self._reloader.request),
            )
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


def bind_socket(host: str, port: int, *, setting: str = "INT8QA_PORT") -> socket.socket:
    """Bind and listen, before anything expensive is started.

    Args:
        host: a local address.
        port: 0 for any free one.
        setting: where the port can be changed, for the message.

    Raises:
        ConfigurationError: the address is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}. Stop what listens "
            f"there, or choose another port with {setting}"
        ) from error


def _bind_admin(settings: Settings, public: socket.socket) -> list[socket.socket]:
    """The operators' socket, if there is to be one."""
    host, port = settings.admin.host, settings.admin.port
    if not port:
        return []
    # Requests are told apart by the port.
    if port == public.getsockname()[1]:
        raise ConfigurationError(
            f"INT8QA_ADMIN__PORT and INT8QA_PORT are both {port}; choose two ports"
        )
    return [bind_socket(host, port, setting="INT8QA_ADMIN__PORT")]


async def run_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application until SIGINT or SIGTERM, then drain and return.

    Args:
        app: from ``create_app``.
        listener: from ``bind_socket``; closed at the end. The operators' address, if
            there is one, is bound here.
        on_ready: called once with the base URL, when all models can first be asked.

    Raises:
        ConfigurationError: the operators' address is taken, or not ours.
    """
    gateway: Gateway = app.state.gateway
    settings = gateway.settings
    try:
        listeners = [listener, *_bind_admin(settings, listener)]
    except ConfigurationError:
        listener.close()
        raise
    proxies = settings.access.trusted_proxies
    _tell_exposure(settings)
    drain_timeout_s = gateway.settings.limits.shutdown_timeout_s
    server = GatewayServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            http=build_protocol(gateway.settings.limits),
            ws="none",
            # Else uvicorn believes any X-Forwarded-For that comes from loopback.
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies or None,
            # A little longer than the drain, which answers what it cannot finish.
            timeout_graceful_shutdown=math.ceil(drain_timeout_s) + 1,
        ),
        app.state.reloader,
        drain_timeout_s=drain_timeout_s,
    )
    host, port = listener.getsockname()[:2]
    base_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def announce() -> None:
        # Another gateway may take this one's place before it was ever ready.
        waiting = True
        while waiting:
            with contextlib.suppress(asyncio.TimeoutError):
                ready = app.state.gateway.pipeline.watch.wait_ready()
                await finish_within(ready, _ANNOUNCE_POLL_S)
                waiting = False
        if on_ready is not None:
            on_ready(base_url)

    announcement = asyncio.create_task(announce())
    try:
        await server.serve(sockets=listeners)
    finally:
        announcement.cancel()
        await asyncio.gather(announcement, return_exceptions=True)
        for one in listeners:
            one.close()


def _tell_exposure(settings: Settings) -> None:
    """Say who may ask, where that is more than this machine's own."""
    log, admin = get_logger(), settings.admin
    if admin.port:
        log.info("admin_address", host=admin.host, port=admin.port)
    if not settings.access.keys_file and settings.host not in _LOOPBACK:
        log.warning(
            "open_to_all",
            host=settings.host,
            hint="whoever reaches this address may ask; INT8QA_ACCESS__KEYS_FILE asks "
            "for API keys",
        )


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

    def count(precision: Precision, serving: int, left_out: int) -> None:
        telemetry: Telemetry = app.state.gateway.telemetry
        telemetry.count_tritons(precision, serving, left_out)

    def open_engine(contract: Contract) -> Engine:
        return open_tritons(
            settings.triton.url,
            contract,
            control_key=settings.triton.control_key,
            tracing=tracing,
            count=count,
        )

    app = create_app(
        settings,
        contract,
        tokenizer,
        open_engine(contract),
        open_engine=open_engine,
        tracing=tracing,
    )
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
