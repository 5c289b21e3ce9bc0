"""What the gateway traces, as calls that do nothing until tracing is switched on.

In: the moments of a request: its head, its stages, its batch, the call to Triton, its
end. Out: nothing, at no cost; or spans, from ``otel``, the only module that imports
OpenTelemetry, and only when asked. No method takes a text: none can get into a span.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, MutableMapping
from typing import Any, Literal

from int8qa.contract import Precision
from int8qa.errors import ConfigurationError
from int8qa.gateway.telemetry import RequestRecord

TracingMode = Literal["off", "otlp"]
"""Values of ``INT8QA_TRACING``."""

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class RequestTrace:
    """One HTTP request's trace, from its head to the end of its response."""

    __slots__ = ()

    trace_id: str | None = None
    """32 hexadecimal digits; None where nothing is traced."""

    def end(self, record: RequestRecord) -> None:
        """The response is out, or the client gone; ``record`` says how it went."""


class CallTrace:
    """One ``submit`` to a batcher: its wait, then its inference."""

    __slots__ = ()

    def end(self, answer: asyncio.Future[Any]) -> None:
        """The caller leaves; ``answer`` says how it went."""


class Tracing:
    """Traces nothing. Every method is cheap and never raises."""

    def trace_request(self, scope: MutableMapping[str, Any]) -> RequestTrace:
        """Begin a request, in its own task; ``scope`` is ASGI's."""
        del scope
        return _NO_REQUEST

    def trace_stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Trace a stage of the request at hand, if there is one."""
        del name
        return _NOTHING

    def trace_call(self, precision: Precision, windows: int) -> CallTrace:
        """Begin the wait of a request's ``windows`` for their first batch."""
        del precision, windows
        return _NO_CALL

    def trace_batch(
        self, calls: Iterable[CallTrace], precision: Precision, shape: tuple[int, ...]
    ) -> contextlib.AbstractContextManager[None]:
        """Trace a batch [B, S] that goes out now with windows of ``calls``."""
        del calls, precision, shape
        return _NOTHING

    def trace_triton(
        self, url: str, model_name: str
    ) -> contextlib.AbstractContextManager[dict[str, str] | None]:
        """Trace a call to Triton, ``host:port``; yields gRPC metadata to send along."""
        del url, model_name
        return _NOTHING

    def close(self) -> None:
        """Send what is left; blocks for seconds at most."""


_NO_REQUEST = RequestTrace()
_NO_CALL = CallTrace()

NO_TRACING = Tracing()
"""Tracing that is off."""


def open_tracing(mode: TracingMode) -> Tracing:
    """Switch tracing on, if asked; where spans go, OpenTelemetry's variables say.

    Raises:
        ConfigurationError: it is asked for, and not installed or set wrongly.
    """
    if mode == "off":
        return NO_TRACING
    try:
        from int8qa.gateway import otel
    except ImportError as error:
        raise ConfigurationError(
            f"INT8QA_TRACING is {mode}, but {error.name} is not installed. Run "
            f"`pip install 'int8qa[tracing]'`, or set INT8QA_TRACING=off"
        ) from error
    return otel.open_span_tracing()
