"""The outermost layer of every HTTP request, in plain ASGI.

In: ASGI messages. Out: the same, with a request id, security headers, a bounded
body, and at the end one metric and one log line; no exception leaves it. Also the
watch for clients that leave. Knows no routes and no questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from int8qa.errors import InputTooLargeError, QueueFullError
from int8qa.gateway.budget import ByteBudget
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.problems import CLIENT_CLOSED_REQUEST, Problem, describe_problem
from int8qa.gateway.telemetry import (
    NO_PRECISION,
    OTHER_ROUTE,
    STAGES,
    RequestRecord,
    StageSeconds,
    Telemetry,
)
from int8qa.gateway.tracing import NO_TRACING, Tracing
from int8qa.gateway.waiting import finish_within

T = TypeVar("T")

_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

_LINGER_S = 5.0
_LINGER_BYTES = 64 * 2**20

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Answers are made of the client's text. Files with a tag say otherwise themselves.
    "Cache-Control": "no-store",
}

_SECURITY_HEADERS = tuple(
    (name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
)
_REQUEST_ID = b"x-request-id"

_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_DOCS_POLICY = (
    # FastAPI writes /docs with one script in it, and Swagger UI its styles.
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' "
    b"'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'"
)


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class RequestEdge:
    """ASGI middleware; one per application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        telemetry: Telemetry,
        max_body_bytes: int,
        budget: ByteBudget,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self._tracing = tracing
        self._max_body_bytes = max_body_bytes
        self._budget = budget
        self._log = get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        record = RequestRecord(
            request_id=choose_request_id(headers.get("x-request-id")),
            method=scope["method"],
        )
        scope.setdefault("state", {})["record"] = record
        trace = self._tracing.trace_request(scope)
        body = _BoundedBody(receive, headers, self._max_body_bytes, self._budget)

        send_decorated = _decorate_send(send, record, body)
        try:
            await self._app(scope, body.receive, send_decorated)
        except (ClientGoneError, ClientDisconnect):
            record.status = CLIENT_CLOSED_REQUEST
            record.outcome = "cancelled"
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - the last edge; logged below
            began = record.status != 0
            problem = describe_problem(error)
            note_problem(record, problem, error)
            if not began:
                response = problem.to_response(record.request_id)
                await response(scope, receive, send_decorated)
        finally:
            body.release()
            record.route = _label_route(scope)
            seconds = time.monotonic() - started
            trace.end(record)
            self._telemetry.observe_request(record, seconds)
            self._write_line(record, seconds, trace.trace_id)

    def _write_line(
        self, record: RequestRecord, seconds: float, trace_id: str | None
    ) -> None:
        fields = _list_log_fields(record, seconds)
        if trace_id is not None:
            fields["trace_id"] = trace_id
        if record.failure is not None:
            self._log.error("request", **fields)
        elif record.status >= 500:
            self._log.warning("request", **fields)
        elif record.route in _QUIET_ROUTES and record.status < 400:
            self._log.debug("request", **fields)
        else:
            self._log.info("request", **fields)


_QUIET_ROUTES = frozenset(
    {"/live", "/ready", "/metrics", "/v1/comparison", "/v1/models", "/static/{name}"}
)
"""Asked every few seconds by machines; their successes are worth a debug line."""


def note_problem(record: RequestRecord, problem: Problem, error: BaseException) -> None:
    """Let the metrics and the log line of a request say how it failed."""
    record.status = problem.kind.status
    record.outcome = problem.kind.outcome
    record.problem = problem.kind.slug
    if problem.kind.status in (500, 502):
        record.failure = describe_exception(error)


def choose_request_id(offered: str | None) -> str:
    """The client's request id if it is 1 to 128 visible ASCII characters, else ours."""
    if offered is not None and _SANE_REQUEST_ID.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


async def run_until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Do ``work``, and cancel it when the client leaves.

    The body must have been read: what ``receive`` then gives is the disconnect.

    Raises:
        ClientGoneError: the client left first.
    """
    worker = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        # A connection that can be asked no more is as good as gone.
        with contextlib.suppress(Exception):
            await _wait_for_disconnect(receive)
        gone = True
        if worker is not None:
            worker.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


class _BoundedBody:
    """A request's body, counted while it is read."""

    def __init__(
        self, receive: Receive, headers: Headers, limit: int, budget: ByteBudget
    ) -> None:
        self._receive = receive
        self._declared = headers.get("content-length", "")
        # Such a client waits for leave to send, and will not get it.
        self._waits = "expect" in headers
        self._limit = limit
        self._budget = budget
        self._held = 0
        self._received = 0
        self._refused = False

    async def receive(self) -> Message:
        """Pass a message on.

        Raises:
            InputTooLargeError: more is declared, or was sent, than is allowed.
            QueueFullError: all requests together hold too much.
        """
        if self._declared.isdecimal() and int(self._declared) > self._limit:
            self._refused = True
            raise _build_too_large(f"{self._declared} bytes", self._limit)
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._limit:
                self._refused = True
                raise _build_too_large(f"more than {self._limit} bytes", self._limit)
            self._hold(len(message.get("body", b"")))
        return message

    def _hold(self, count: int) -> None:
        try:
            self._budget.take(count)
        except QueueFullError:
            self._refused = True
            raise
        self._held += count

    def release(self) -> None:
        """The request is over: give back what its body took."""
        self._budget.give_back(self._held)
        self._held = 0

    @property
    def refused(self) -> bool:
        """Whether a client may still be sending what nobody will read."""
        return self._refused and not self._waits

    async def discard(self) -> None:
        """Read on for a bounded while, and keep nothing.

        Closing on a client that still sends would reset the connection, and the
        reset may overtake the response.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await finish_within(self._discard(), _LINGER_S)

    async def _discard(self) -> None:
        discarded = 0
        while discarded < _LINGER_BYTES:
            message = await self._receive()
            discarded += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return


def _decorate_send(send: Send, record: RequestRecord, body: _BoundedBody) -> Send:
    async def send_decorated(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message["headers"] = _decorate_headers(message["headers"], record)
        elif body.refused and not message.get("more_body"):
            await send({**message, "more_body": True})
            await body.discard()
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return send_decorated


def _decorate_headers(
    headers: Iterable[tuple[bytes, bytes]], record: RequestRecord
) -> list[tuple[bytes, bytes]]:
    """Add those of every response; a response's own stay as they are.

    On bytes: Starlette's mutable headers search the list anew for each of them.
    """
    decorated = [pair for pair in headers if pair[0] != _REQUEST_ID]
    given = dict(decorated)
    decorated.append((_REQUEST_ID, record.request_id.encode("latin-1")))
    for pair in _SECURITY_HEADERS:
        name = pair[0]
        if name not in given and (name != b"cache-control" or b"etag" not in given):
            decorated.append(pair)
    if b"content-security-policy" not in given:
        is_html = given.get(b"content-type", b"").startswith(b"text/html")
        policy = _DOCS_POLICY if is_html else _DATA_POLICY
        decorated.append((b"content-security-policy", policy))
    if record.stages is not None:
        timing = _format_timing(record.stages).encode()
        decorated.append((b"server-timing", timing))
    return decorated


def _build_too_large(measured: str, limit: int) -> InputTooLargeError:
    return InputTooLargeError(
        "body",
        f"the body has {measured[:40]}; allowed are {limit}. Send less at once, or "
        f"raise INT8QA_LIMITS__MAX_BODY_BYTES",
    )


def _list_log_fields(record: RequestRecord, seconds: float) -> dict[str, object]:
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "outcome": record.outcome,
        "problem": record.problem,
        "key": record.key,
        "client": record.client,
        "precision": None if record.precision == NO_PRECISION else record.precision,
        "items": record.items,
        "windows": record.windows or None,
        "question_chars": record.question_chars or None,
        "context_chars": record.context_chars or None,
        "total_ms": round(seconds * 1e3, 3),
        "failure": record.failure,
    }
    if record.stages is not None:
        for stage in STAGES:
            fields[f"{stage}_ms"] = round(getattr(record.stages, stage) * 1e3, 3)
    return {name: value for name, value in fields.items() if value is not None}


def _label_route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    known: frozenset[str] = getattr(scope["app"].state, "plain_paths", frozenset())
    return scope["path"] if scope["path"] in known else OTHER_ROUTE


def _format_timing(stages: StageSeconds) -> str:
    return ", ".join(
        f"{stage};dur={getattr(stages, stage) * 1e3:.3f}" for stage in STAGES
    )
