"""The OpenAPI document: what routes take and give, and this service's own limits.

In: the routes and the schemas. Out: ``/openapi.json``. Bodies are read and written
without FastAPI's help, so their schemas are put in here; a test runs the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from int8qa.gateway import schemas
from int8qa.gateway.addresses import needs_key
from int8qa.gateway.problems import PROBLEM_MEDIA_TYPE
from int8qa.settings import LimitSettings

_BODIES: tuple[type[BaseModel], ...] = (
    schemas.AnswerRequest,
    schemas.AnswerResponse,
    schemas.BatchRequest,
    schemas.BatchResponse,
    schemas.HfRequest,
    schemas.HfAnswer,
    schemas.ComparisonReport,
    schemas.ModelsReport,
    schemas.Liveness,
    schemas.Readiness,
    schemas.ProblemDetails,
)


def describe_body(model: str) -> dict[str, Any]:
    """The OpenAPI request body of a schema."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    }


def describe_responses(
    ok: str | dict[str, Any], *statuses: int, description: str = "answered"
) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of a route: one success, and problems."""
    schema = {"$ref": f"#/components/schemas/{ok}"} if isinstance(ok, str) else ok
    return {
        200: {
            "description": description,
            "content": {"application/json": {"schema": schema}},
        },
        **{status: _describe_problem(status) for status in statuses},
    }


def _describe_problem(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _STATUS_NOTES[status],
        "content": {
            PROBLEM_MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/ProblemDetails"}
            }
        },
    }
    if status in (429, 503):
        response["headers"] = {
            "Retry-After": {
                "description": "when to ask again, seconds",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    if status in (401, 403):
        response["headers"] = {
            "WWW-Authenticate": {
                "description": "what is wanted, as RFC 6750 has it",
                "schema": {"type": "string"},
            }
        }
    return response


_STATUS_NOTES = {
    400: "the body is no JSON",
    401: "the API key is missing or unknown",
    403: "the API key is for something else",
    404: "the model is not served here",
    408: "the body did not arrive in time",
    413: "the body, a text or the number of windows or items is too large",
    415: "the body is declared as something else than JSON",
    422: "a field is missing, unknown, of the wrong type or out of range",
    429: "the queue or the memory for bodies is full, or the API key is at its limit",
    502: "Triton answered nonsense",
    503: "Triton is not there, the service is shutting down, or the queue ahead takes "
    "longer than the deadline",
    504: "not answered within the deadline",
}


def describe_api(
    app: FastAPI,
    *,
    limits: LimitSettings,
    precisions: Sequence[str],
    default_precision: str,
    keyed: bool,
) -> dict[str, Any]:
    """The document, built once; ``keyed`` says whether API keys are asked for."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in _BODIES],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components["schemas"] = definitions["$defs"]

    for body in ("AnswerRequest", "HfInputs"):
        fields = components["schemas"][body]["properties"]
        for name, limit in (
            ("question", limits.max_question_chars),
            ("context", limits.max_context_chars),
        ):
            fields[name].update(minLength=1, maxLength=limit)
    precision = components["schemas"]["AnswerRequest"]["properties"]["precision"]
    precision["anyOf"][0]["enum"] = list(precisions)
    precision["default"] = default_precision
    precision["description"] += f": {default_precision} here"
    for operations in document["paths"].values():
        for parameter in operations.get("post", {}).get("parameters", ()):
            if parameter["name"] == "precision":
                parameter["description"] += f"; the default is {default_precision} here"
    items = components["schemas"]["BatchRequest"]["properties"]["items"]
    items["maxItems"] = limits.max_items
    if keyed:
        _add_keys(document)
    app.openapi_schema = document
    return document


def _add_keys(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "an API key of this service, from its operator",
        }
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if needs_key({"path": path, "method": method.upper()}):
                operation["security"] = [{"key": []}]
                for status in (401, 403, 429):
                    operation["responses"].setdefault(
                        str(status), _describe_problem(status)
                    )
