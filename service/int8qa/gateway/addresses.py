"""Which paths are served where, and which of them need a key.

In: a request's path and the local port that it came to. Out: a word on each, and a 404
for what is served at the other address only. With ``INT8QA_ADMIN__PORT`` one process
listens at two addresses: one for clients, one for operators.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from int8qa.gateway.problems import describe_problem
from int8qa.gateway.telemetry import RequestRecord

_HEALTH = frozenset({"/live", "/ready"})
_DOCS = frozenset({"/docs", "/docs/oauth2-redirect", "/openapi.json"})
_DOCS_FILES = "/static-offline-docs/"
_STATUS = frozenset({"/v1/models", "/v1/comparison"})

_ADMIN_FLAG = "int8qa.admin"


def is_operators(path: str) -> bool:
    """Whether a path is served to operators alone, where they have an address."""
    return path == "/metrics" or _is_docs(path)


def needs_key(scope: Scope) -> bool:
    """Whether a path needs a key where there are keys: everything but a few.

    Probes have none. The page must be seen before a key can be typed into it, and the
    API's description holds nothing of anybody.
    """
    path, method = scope["path"], scope["method"]
    if method not in {"GET", "HEAD"}:
        return True
    is_page = path == "/" or path.startswith("/static/")
    return not (path in _HEALTH or is_page or _is_docs(path))


def is_admin(scope: Scope) -> bool:
    """Whether a request came to the operators' address."""
    return scope.get(_ADMIN_FLAG) is True


class AddressSplit:
    """ASGI middleware: each address serves its own paths; one per application."""

    def __init__(self, app: ASGIApp, *, admin_port: int) -> None:
        self._app = app
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Of the socket, and no word of the client's.
        port = (scope.get("server") or (None, None))[1]
        path = scope["path"]
        scope[_ADMIN_FLAG] = port == self._admin_port
        if is_admin(scope):
            served = is_operators(path) or path in _HEALTH or path in _STATUS
        else:
            served = not is_operators(path)
        if served:
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        problem = describe_problem(HTTPException(404))
        record.outcome, record.problem = problem.kind.outcome, problem.kind.slug
        await problem.to_response(record.request_id)(scope, receive, send)


def _is_docs(path: str) -> bool:
    return path in _DOCS or path.startswith(_DOCS_FILES)
