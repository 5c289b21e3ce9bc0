"""Routes that FastAPI describes and, where nothing is to be resolved, does not touch.

In: endpoints that take a request and optional parameters. Out: the same routes in the
same OpenAPI document. A request that brings none of the parameters goes straight to its
endpoint: on a CPU that also computes the answer, resolving nothing was a tenth of what
the gateway did for a question.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class DirectRoute(APIRoute):
    """For coroutines that give a ``Response`` and name their request ``request``.

    FastAPI resolves what a request brings: a query string, one of the headers that the
    endpoint takes. A route whose path has parameters, whose endpoint needs one, or that
    has dependencies is FastAPI's altogether.
    """

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, or one that asks it only if need be."""
        resolve = super().get_route_handler()
        taken = self.dependant
        parameters = [*taken.query_params, *taken.header_params]
        if (
            taken.path_params
            or taken.cookie_params
            or taken.body_params
            or taken.dependencies
            or taken.request_param_name != "request"
            or any(parameter.field_info.is_required() for parameter in parameters)
        ):
            return resolve
        headers = frozenset(
            parameter.alias.lower().encode() for parameter in taken.header_params
        )
        endpoint: Callable[..., Awaitable[Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            scope = request.scope
            if scope["query_string"] or any(
                name in headers for name, _ in scope["headers"]
            ):
                return await resolve(request)
            return await endpoint(request)

        return handle
