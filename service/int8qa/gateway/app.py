"""The gateway as one application.

In: settings, the contract, a tokenizer, an engine. Out: a FastAPI application that
opens and closes all it needs in its lifespan, and starts whether or not the engine
is there; or, with an engine of its own choice, what ``int8qa serve`` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

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
from int8qa.errors import Int8qaError
from int8qa.gateway import batches, routes, status
from int8qa.gateway.access import AccessGate, KeyRing
from int8qa.gateway.addresses import AddressSplit
from int8qa.gateway.budget import ByteBudget
from int8qa.gateway.comparison import ComparisonWindow
from int8qa.gateway.crew import Crew
from int8qa.gateway.edge import RequestEdge, note_problem
from int8qa.gateway.engine import Engine
from int8qa.gateway.load import stand_alone
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
from int8qa.gateway.process import bind_socket, run_event_loop
from int8qa.gateway.reload import Gateway, Reloader
from int8qa.gateway.routes import get_gateway, get_record
from int8qa.gateway.server import run_server
from int8qa.gateway.telemetry import Telemetry
from int8qa.gateway.tracing import NO_TRACING, Tracing, open_tracing
from int8qa.gateway.triton_group import open_tritons
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


def create_app(
    settings: Settings,
    contract: Contract,
    tokenizer: ReaderTokenizer,
    engine: Engine,
    *,
    open_engine: Callable[[Contract], Engine] | None = None,
    tracing: Tracing = NO_TRACING,
    crew: Crew | None = None,
) -> FastAPI:
    """Build the application; ``app.state.gateway`` holds its parts.

    Its end closes the engine and ``tracing``. With ``open_engine``, which gives an
    engine for another build, ``app.state.reloader`` can replace ``app.state.gateway``.
    ``crew`` is what this process shares with other gateway processes.

    Raises:
        ConfigurationError: the default precision is not in the model repository, or
            the file of API keys is unusable.
        ContractError: the tokenizer is not the one the models were built with.
    """
    telemetry = Telemetry(contract, leads=crew is None or crew.leads)
    telemetry.declare_reasons(REJECTION_REASONS)
    telemetry.set_guard_threshold(settings.comparison.guard_agreement)
    access = settings.access
    keys = None
    if access.keys_file:
        tell = None if crew is None else crew.tell_key_use
        keys = KeyRing(Path(access.keys_file), telemetry, tell=tell)
    load = stand_alone() if crew is None else crew.load

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
            load=load,
            share=functools.partial(crew.share, contract.build_id) if crew else None,
        )
        return Gateway(settings, contract, pipeline, telemetry, comparison)

    @contextlib.asynccontextmanager
    async def run_lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            await app.state.gateway.pipeline.start()
            if crew is not None:
                await crew.settle()
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
        app.state,
        engine,
        open_engine=open_engine,
        open_gateway=open_gateway,
        consent=crew,
    )
    app.state.gateway = open_gateway(contract, tokenizer, engine)
    telemetry.read_comparison(app.state.gateway.comparison)
    app.state.crew = crew
    if crew is not None:
        crew.attach(app.state.gateway, app.state.reloader, keys)
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
        budget=ByteBudget(settings.limits.max_pending_bytes, load),
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


def open_app(
    settings: Settings,
    contract: Contract,
    tokenizer: ReaderTokenizer,
    crew: Crew | None = None,
) -> FastAPI:
    """``create_app``, with the engine and the tracing that the settings name.

    Raises:
        ConfigurationError: as ``create_app``; or tracing is not installed.
        ContractError: as ``create_app``.
    """
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
        crew=crew,
    )
    return app


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
    app = open_app(settings, contract, tokenizer)
    if listener is None:
        listener = bind_socket(settings.host, settings.port)
    run_event_loop(run_server(app, listener, on_ready=on_ready))
