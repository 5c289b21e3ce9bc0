"""Errors to RFC 9457 problem responses, by one table.

In: an error of int8qa, or one of HTTP itself. Out: a problem with its status and
headers. The only place that knows both. Unknown errors become a bare 500: nothing
of them is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from int8qa.errors import (
    BuildError,
    ConfigurationError,
    ContractError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    EmbeddedTritonError,
    EngineError,
    EngineOutputError,
    EngineUnavailableError,
    GatewayRequestError,
    InputTooLargeError,
    Int8qaError,
    InvalidInputError,
    MissingDependencyError,
    OverloadedError,
    QueueFullError,
    ShuttingDownError,
    UnknownModelError,
)

PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:int8qa:problem:"
CLIENT_CLOSED_REQUEST = 499
"""Logged, never sent: the client left before the answer. Source: nginx."""

MAX_FAULTS = 20
"""Faults one response lists; the rest are counted."""

_MAX_NAME_CHARS = 64


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One row of the table."""

    status: int
    slug: str
    title: str
    outcome: str
    """Label of ``int8qa_request_seconds``."""
    reason: str | None = None
    """Label of ``int8qa_rejected_total``, None where nothing was refused."""


MALFORMED = ProblemKind(400, "malformed", "Malformed request", "invalid", "malformed")
MEDIA_TYPE = ProblemKind(
    415, "unsupported-media-type", "Unsupported media type", "invalid", "malformed"
)
INVALID = ProblemKind(422, "invalid", "Invalid request", "invalid", "invalid")
TOO_LARGE = ProblemKind(413, "too-large", "Too large", "invalid", "too_large")
LATE_BODY = ProblemKind(408, "request-timeout", "Request timeout", "timeout")
INTERNAL = ProblemKind(500, "internal", "Internal error", "error")

PROBLEMS: dict[type[Int8qaError], ProblemKind] = {
    InvalidInputError: INVALID,
    InputTooLargeError: TOO_LARGE,
    UnknownModelError: ProblemKind(
        404, "unknown-model", "Unknown model", "invalid", "unknown_model"
    ),
    OverloadedError: ProblemKind(
        503, "overloaded", "Overloaded", "overloaded", "overloaded"
    ),
    QueueFullError: ProblemKind(
        429, "queue-full", "Queue full", "overloaded", "queue_full"
    ),
    DeadlineUnreachableError: ProblemKind(
        503, "deadline-unreachable", "Deadline unreachable", "overloaded", "deadline"
    ),
    ShuttingDownError: ProblemKind(
        503, "shutting-down", "Shutting down", "overloaded", "shutting_down"
    ),
    DeadlineExceededError: ProblemKind(
        504, "deadline-exceeded", "Deadline exceeded", "timeout"
    ),
    EngineError: ProblemKind(502, "engine-failed", "Engine failed", "bad_engine"),
    EngineOutputError: ProblemKind(
        502, "engine-output", "Unusable engine output", "bad_engine"
    ),
    EngineUnavailableError: ProblemKind(
        503,
        "engine-unavailable",
        "Engine unavailable",
        "unavailable",
        "engine_unavailable",
    ),
    # What follows belongs to start-up and to the command line. Should one reach a
    # request all the same, it is our fault and its message is for the log.
    ConfigurationError: INTERNAL,
    MissingDependencyError: INTERNAL,
    ContractError: INTERNAL,
    EmbeddedTritonError: INTERNAL,
    GatewayRequestError: INTERNAL,
    BuildError: INTERNAL,
}

REJECTION_REASONS = frozenset(
    kind.reason
    for kind in (MALFORMED, MEDIA_TYPE, *PROBLEMS.values())
    if kind.reason is not None
)


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One offending field of a request, as the client wrote its name."""

    field: str
    message: str


class RequestProblemError(Exception):
    """A fault of the HTTP message itself, before any question is known."""

    def __init__(
        self, kind: ProblemKind, detail: str, faults: Sequence[FieldFault] = ()
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem, ready to be sent."""

    kind: ProblemKind
    detail: str
    faults: tuple[FieldFault, ...] = ()
    retry_after_s: int | None = None

    def to_dict(self, request_id: str) -> dict[str, Any]:
        """The body; ``instance`` is the request id, also found in the log."""
        return {
            "type": TYPE_PREFIX + self.kind.slug,
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "instance": request_id,
            "errors": [
                {"field": fault.field, "message": fault.message}
                for fault in self.faults
            ],
        }

    def to_response(
        self, request_id: str, *, headers: dict[str, str] | None = None
    ) -> Response:
        """The whole response."""
        extra = dict(headers or {})
        if self.retry_after_s is not None:
            extra["Retry-After"] = str(self.retry_after_s)
        if not self.faults:
            # Where huggingface_hub looks for a message besides `errors`.
            extra["X-Error-Message"] = self.detail.encode("ascii", "replace").decode()
        return Response(
            orjson.dumps(self.to_dict(request_id)),
            status_code=self.kind.status,
            media_type=PROBLEM_MEDIA_TYPE,
            headers=extra,
        )


def find_kind(error: type[Int8qaError]) -> ProblemKind | None:
    """The row of a class, or of its nearest ancestor that has one."""
    for ancestor in error.__mro__:
        kind = PROBLEMS.get(ancestor)
        if kind is not None:
            return kind
    return None


def describe_problem(error: BaseException) -> Problem:
    """Map any error to a problem; what is unknown shows nothing of itself."""
    if isinstance(error, RequestProblemError):
        return Problem(error.kind, error.detail, error.faults)
    if isinstance(error, HTTPException):
        return Problem(_describe_status(error.status_code), str(error.detail))
    kind = find_kind(type(error)) if isinstance(error, Int8qaError) else None
    if kind is None or kind is INTERNAL:
        return Problem(
            INTERNAL,
            "an unexpected error; the log of the service holds it under the request id",
        )
    faults: tuple[FieldFault, ...] = ()
    if isinstance(error, InvalidInputError):
        faults = (FieldFault(error.field, str(error)),)
    retry_after_s = None
    if isinstance(error, (OverloadedError, EngineUnavailableError)):
        retry_after_s = max(1, math.ceil(error.retry_after_s))
    return Problem(kind, str(error), faults, retry_after_s)


def build_field_problem(faults: Sequence[FieldFault]) -> RequestProblemError:
    """One 422 that names the offending fields, at most ``MAX_FAULTS`` of them."""
    first = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if len(faults) > MAX_FAULTS:
        more = f" (and {len(faults) - 1} more; errors lists the first {MAX_FAULTS})"
    return RequestProblemError(
        INVALID, f"{first.field}: {first.message}{more}", faults[:MAX_FAULTS]
    )


def collect_faults(
    error: ValidationError, *, prefix: str = "", allowed: Sequence[str] = ()
) -> list[FieldFault]:
    """Turn pydantic's findings into faults that never quote the request's values.

    Args:
        error: what pydantic raised.
        prefix: put before each field's name, e.g. ``items.3``.
        allowed: known field names of the outermost object; the first unknown one
            is told them.
    """
    faults = []
    to_tell = allowed
    for finding in error.errors(
        include_url=False, include_input=False, include_context=False
    ):
        path = [_clean_name(str(part)) for part in finding["loc"]]
        where = ".".join([prefix, *path] if prefix else path) or "body"
        message = finding["msg"]
        if finding["type"] == "extra_forbidden":
            message = "unknown field"
            if len(path) == 1 and to_tell:
                message += f"; known are {', '.join(to_tell)}"
                to_tell = ()
        elif finding["type"] == "string_unicode":
            message = (
                "holds a lone surrogate, which is no Unicode text; in JSON escapes, "
                "send whole surrogate pairs"
            )
        elif finding["type"] in ("model_type", "dict_type"):
            message = "must be a JSON object"
        faults.append(FieldFault(where, message))
    return faults


def _clean_name(name: str) -> str:
    # Names of unknown fields are the client's own: keep them short and printable.
    cut = name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in cut)


def _describe_status(status: int) -> ProblemKind:
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    slug = title.lower().replace(" ", "-")
    return ProblemKind(
        status, slug, title, "invalid" if status < 500 else "error", None
    )
