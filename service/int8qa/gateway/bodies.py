"""Request bodies: bytes to JSON to a validated model, strictly.

In: a request. Out: an instance of the model, or a problem that names the field and
quotes no value. What the standard parser lets pass (NaN, a key twice, another
encoding) is refused here, and what makes it fail oddly is caught.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from int8qa.gateway.problems import (
    MALFORMED,
    MEDIA_TYPE,
    FieldFault,
    RequestProblemError,
    build_field_problem,
    collect_faults,
)

Model = TypeVar("Model", bound=BaseModel)

MAX_MEMBERS = 64
"""Members of one object; several times what any body of ours has."""


async def read_model(request: Request, model: type[Model]) -> Model:
    """Read and validate a JSON body.

    Raises:
        RequestProblemError: 400 no JSON, 415 another media type, 422 another shape.
        InputTooLargeError: from the body limit, while reading.
    """
    check_media_type(request.headers.get("content-type"))
    return validate_model(parse_json(await request.body()), model)


def check_media_type(content_type: str | None) -> None:
    """Take JSON, or no declared type at all.

    Form types are refused, since browsers send them across sites unasked.

    Raises:
        RequestProblemError: 415.
    """
    if content_type is None:
        return
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        return
    raise RequestProblemError(
        MEDIA_TYPE,
        "the body must be JSON: send the header Content-Type: application/json",
    )


def parse_json(body: bytes) -> Any:
    """Parse one JSON text in UTF-8; a byte order mark is skipped.

    Raises:
        RequestProblemError: 400; says where, and quotes nothing.
    """
    if not body:
        raise RequestProblemError(MALFORMED, "the body is empty; send a JSON object")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestProblemError(
            MALFORMED, f"the body is not UTF-8, from byte {error.start} on"
        ) from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_build_object,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise RequestProblemError(
            MALFORMED,
            f"the body is not JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}",
        ) from None
    except RecursionError:
        raise RequestProblemError(
            MALFORMED, "the body is nested too deeply; two levels are enough"
        ) from None
    except ValueError:
        # An integer of more digits than Python converts.
        raise RequestProblemError(
            MALFORMED, "the body holds a number with too many digits"
        ) from None


def validate_model(value: Any, model: type[Model], *, prefix: str = "") -> Model:
    """Validate parsed JSON.

    Raises:
        RequestProblemError: 422 with one fault per offending field, or a single one
            for an object of more than ``MAX_MEMBERS``.
    """
    _check_member_counts(value, model, prefix)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # `from None`: the original error carries the values.
        raise build_field_problem(
            collect_faults(error, prefix=prefix, allowed=list(model.model_fields))
        ) from None


def _check_member_counts(value: Any, model: type[BaseModel], prefix: str) -> None:
    # Before pydantic, which would make a finding of each unknown field: our models
    # are two objects deep, so this bounds how many findings there can be.
    if not isinstance(value, dict):
        return
    _check_member_count(value, prefix or "body")
    for name in model.model_fields.keys() & value.keys():
        if isinstance(value[name], dict):
            _check_member_count(value[name], f"{prefix}.{name}" if prefix else name)


def _check_member_count(value: dict[str, Any], where: str) -> None:
    if len(value) > MAX_MEMBERS:
        message = f"has {len(value)} members; allowed are {MAX_MEMBERS}"
        raise build_field_problem([FieldFault(where, message)])


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise RequestProblemError(
            MALFORMED, "the body names a field twice in one object"
        )
    return built


def _refuse_constant(_name: str) -> NoReturn:
    raise RequestProblemError(
        MALFORMED, "the body holds NaN or Infinity, which JSON does not have"
    )
