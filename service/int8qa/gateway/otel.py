"""Spans of OpenTelemetry; the only module that imports it.

In: the moments that ``tracing`` names. Out: one trace per HTTP request, continued into
Triton, over OTLP to a collector. HTTP and gRPC attributes follow OpenTelemetry's
semantic conventions 1.44; what a client may have made up (paths of no route, query
strings, host and user agent) is left out, and exceptions give their kind alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from opentelemetry import context as trace_context
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import (
    TraceContextTextMapPropagator,
)
from starlette.datastructures import Headers

import int8qa
from int8qa.contract import Precision
from int8qa.errors import ConfigurationError
from int8qa.gateway.problems import CLIENT_CLOSED_REQUEST, describe_problem
from int8qa.gateway.telemetry import NO_PRECISION, OTHER_ROUTE, RequestRecord
from int8qa.gateway.tracing import NO_TRACING, CallTrace, RequestTrace, Tracing

UNTRACED_PATHS = frozenset({"/live", "/ready", "/metrics"})
"""Asked every few seconds by machines."""

TRITON_METHOD = "inference.GRPCInferenceService/ModelInfer"
"""Source: KServe's open inference protocol, version 2."""

_SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
_FLUSH_TIMEOUT_S = 5.0
_HTTP_PROTOCOL = "http/protobuf"
_HTTP_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
"""Not in our extra: gRPC is here anyway."""

# Baggage, the other propagator of OpenTelemetry's default, may hold anything.
_PROPAGATOR = TraceContextTextMapPropagator()


def open_span_tracing() -> Tracing:
    """Tracing as OpenTelemetry's standard variables have it.

    ``OTEL_SERVICE_NAME`` is int8qa unless it says otherwise. The protocol is gRPC
    unless ``OTEL_EXPORTER_OTLP_PROTOCOL`` says ``http/protobuf``.

    Raises:
        ConfigurationError: the protocol is unknown, or its exporter not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return NO_TRACING
    # The environment wins over our name.
    ours = {"service.name": "int8qa", "service.version": int8qa.__version__}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_build_exporter()))
    return SpanTracing(provider)


def _build_exporter() -> SpanExporter:
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "grpc"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        return over_grpc.OTLPSpanExporter()
    if protocol != _HTTP_PROTOCOL:
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; allowed are grpc and "
            f"{_HTTP_PROTOCOL}"
        )
    try:
        over_http = importlib.import_module(_HTTP_EXPORTER)
    except ImportError as error:
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, whose exporter is not "
            f"installed. Run `pip install opentelemetry-exporter-otlp-proto-http`, or "
            f"set it to grpc, with the collector's port for gRPC"
        ) from error
    exporter: SpanExporter = over_http.OTLPSpanExporter()
    return exporter


class SpanTracing(Tracing):
    """Makes spans; ``provider`` is closed with it, and is nobody else's default."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(
            "int8qa", int8qa.__version__, schema_url=_SCHEMA_URL
        )

    def trace_request(self, scope: MutableMapping[str, Any]) -> RequestTrace:
        if scope["path"] in UNTRACED_PATHS:
            return RequestTrace()
        return _RequestSpan(self._tracer, scope)

    def trace_stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        if not _is_traced():
            return contextlib.nullcontext()
        return _open_span(self._tracer, name)

    def trace_call(self, precision: Precision, windows: int) -> CallTrace:
        if not _is_traced():
            return CallTrace()
        return _CallSpans(self._tracer, precision, windows)

    @contextlib.contextmanager
    def trace_batch(
        self, calls: Iterable[CallTrace], precision: Precision, shape: tuple[int, ...]
    ) -> Iterator[None]:
        served = [
            call.dispatch()
            for call in dict.fromkeys(calls)
            if isinstance(call, _CallSpans)
        ]
        if not served:
            yield
            return
        # A span has one parent: the caller who waited longest, of those who record.
        # The links lead to the others, and from them back here.
        parent = next((span for span in served if span.is_recording()), served[0])
        with _open_span(
            self._tracer,
            "batch",
            context=set_span_in_context(parent),
            links=[Link(span.get_span_context()) for span in served],
            attributes={
                "int8qa.precision": precision.value,
                "int8qa.batch_size": shape[0],
                "int8qa.padded_length": shape[1],
            },
        ):
            batch = get_current_span().get_span_context()
            for span in served:
                if span is not parent:
                    span.add_link(batch)
            yield

    @contextlib.contextmanager
    def trace_triton(
        self, url: str, model_name: str
    ) -> Iterator[dict[str, str] | None]:
        if not _is_traced():
            yield None
            return
        host, _, port = url.rpartition(":")
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": TRITON_METHOD,
            "server.address": host.strip("[]"),
            "server.port": int(port),
            "int8qa.model": model_name,
        }
        with _open_span(
            self._tracer, TRITON_METHOD, kind=SpanKind.CLIENT, attributes=attributes
        ):
            metadata: dict[str, str] = {}
            _PROPAGATOR.inject(metadata)
            yield metadata

    def close(self) -> None:
        # A collector that is not there would hold the exit up for much longer.
        shutdown = threading.Thread(
            target=self._provider.shutdown, name="tracing-shutdown", daemon=True
        )
        shutdown.start()
        shutdown.join(_FLUSH_TIMEOUT_S)


class _RequestSpan(RequestTrace):
    """The server span of an HTTP request, current until its end."""

    __slots__ = ("_method", "_span", "_token", "trace_id")

    def __init__(self, tracer: Tracer, scope: MutableMapping[str, Any]) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        self._method = "HTTP" if method == "_OTHER" else method
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        host, port = scope.get("server") or (None, None)
        if host is not None:
            attributes["server.address"] = host
        if port is not None:
            attributes["server.port"] = port
        parent = _PROPAGATOR.extract(Headers(scope=scope), Context())
        self._span = tracer.start_span(
            self._method, context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        self._token = trace_context.attach(set_span_in_context(self._span))
        self.trace_id = format_trace_id(self._span.get_span_context().trace_id)

    def end(self, record: RequestRecord) -> None:
        trace_context.detach(self._token)
        span = self._span
        # A route's template stands for the path, whose parameters are the client's.
        path = "/REDACTED"
        if record.route != OTHER_ROUTE:
            path = record.route
            span.update_name(f"{self._method} {path}")
            span.set_attribute("http.route", path)
        span.set_attribute("url.path", path)
        if record.status not in (0, CLIENT_CLOSED_REQUEST):
            span.set_attribute("http.response.status_code", record.status)
        span.set_attribute("int8qa.request_id", record.request_id)
        span.set_attribute("int8qa.outcome", record.outcome)
        if record.precision != NO_PRECISION:
            span.set_attribute("int8qa.precision", record.precision)
        if record.windows:
            span.set_attribute("int8qa.windows", record.windows)
        if record.items is not None:
            span.set_attribute("int8qa.items", record.items)
        # Semantic conventions: 4xx is no error of the server.
        if record.status >= 500:
            span.set_attribute("error.type", record.problem or str(record.status))
            span.set_status(StatusCode.ERROR)
        span.end()


class _CallSpans(CallTrace):
    """A ``queue`` span, then an ``inference`` span, both of the caller's span."""

    __slots__ = ("_attributes", "_inference", "_parent", "_queue", "_since", "_tracer")

    def __init__(self, tracer: Tracer, precision: Precision, windows: int) -> None:
        self._tracer = tracer
        self._parent = trace_context.get_current()
        self._attributes = {
            "int8qa.precision": precision.value,
            "int8qa.windows": windows,
        }
        self._since = time.monotonic()
        self._queue = tracer.start_span(
            "queue", context=self._parent, attributes=self._attributes
        )
        self._inference: Span | None = None

    def dispatch(self) -> Span:
        """The first of the caller's windows is on its way; or another."""
        if self._inference is None:
            now_ns = time.time_ns()
            self._queue.end(now_ns)
            self._inference = self._tracer.start_span(
                "inference",
                context=self._parent,
                start_time=now_ns,
                attributes={
                    **self._attributes,
                    "int8qa.queue_s": time.monotonic() - self._since,
                },
            )
        return self._inference

    def end(self, answer: asyncio.Future[Any]) -> None:
        span = self._inference or self._queue
        if not answer.done() or answer.cancelled():
            _note_error(span, asyncio.CancelledError())
        elif (error := answer.exception()) is not None:
            _note_error(span, error)
        span.end()


def _is_traced() -> bool:
    """Whether what runs now belongs to a request; probes and replays do not."""
    return get_current_span().get_span_context().is_valid


@contextlib.contextmanager
def _open_span(tracer: Tracer, name: str, **options: Any) -> Iterator[None]:
    # An exception's message and frames are for the log, where they are cleaned.
    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False, **options
    ) as span:
        try:
            yield
        except BaseException as error:
            _note_error(span, error)
            raise


def _note_error(span: Span, error: BaseException) -> None:
    """Say what kind of error ended a span, in the words of the table of problems."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        span.set_attribute("int8qa.outcome", "cancelled")
        return
    kind = describe_problem(error).kind
    span.set_attribute("int8qa.outcome", kind.outcome)
    span.set_attribute("error.type", kind.slug)
    if kind.status >= 500:
        span.set_status(StatusCode.ERROR)
