"""Many questions in one request: each gets its own result or its own problem.

In: a list of items. Out: all of them in order, or one line per item as it completes.
Bounded work at a time, so that a large request fills batches and not the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from int8qa.errors import InputTooLargeError, Int8qaError
from int8qa.gateway import schemas
from int8qa.gateway.bodies import validate_model
from int8qa.gateway.edge import ClientGoneError, run_until_gone
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.openapi import describe_body, describe_responses
from int8qa.gateway.problems import INTERNAL, RequestProblemError, describe_problem
from int8qa.gateway.reload import Gateway
from int8qa.gateway.routes import (
    ANSWER_PROBLEMS,
    JsonResponse,
    RequestTimeout,
    build_query,
    compute_deadline,
    dump_outcome,
    get_gateway,
    get_record,
    note_query,
    read_body,
)
from int8qa.gateway.telemetry import RequestRecord

NDJSON_MEDIA_TYPE = "application/x-ndjson"

_MAX_ITEMS_IN_FLIGHT = 64
_MAX_CHARS_IN_FLIGHT = 65_536
"""Items of one request worked on at once: enough to fill batches, too little to fill
the queue, lest a request be refused on its own account."""

router = APIRouter()


@router.post(
    "/v1/answers",
    tags=["answers"],
    summary="Answer many questions",
    responses=describe_responses("BatchResponse", *ANSWER_PROBLEMS),
    openapi_extra=describe_body("BatchRequest"),
)
async def post_answers(
    request: Request, x_request_timeout: RequestTimeout = None
) -> Response:
    """Answer each item by itself: a bad one gets its own problem, the rest answers.

    With `Accept: application/x-ndjson` each item is one line, sent as it completes.
    """
    gateway = get_gateway(request)
    with contextlib.ExitStack() as stack:
        stack.enter_context(gateway.pipeline.admit())
        gateway.pipeline.watch.require_any()
        deadline = compute_deadline(gateway, x_request_timeout)
        body = await read_body(request, schemas.BatchRequest, gateway, deadline)
        record = get_record(request)
        record.items = len(body.items)
        limit = gateway.settings.limits.max_items
        if len(body.items) > limit:
            raise InputTooLargeError(
                "items",
                f"items has {len(body.items)} entries; allowed are {limit}. Send "
                f"several requests, or raise INT8QA_LIMITS__MAX_ITEMS",
            )
        items = answer_items(gateway, body.items, record, deadline)
        if NDJSON_MEDIA_TYPE in request.headers.get("accept", "").lower():
            # The stream outlives this function, and so must its admission.
            return NdjsonResponse(items, stack.pop_all())
        done = await run_until_gone(request.receive, _collect(items))
        return JsonResponse({"items": sorted(done, key=lambda item: item["index"])})


async def answer_items(
    gateway: Gateway, items: Sequence[Any], record: RequestRecord, deadline: float
) -> AsyncIterator[dict[str, Any]]:
    """Yield each item's result or error as it completes; bounded work at a time."""
    pending: dict[asyncio.Task[dict[str, Any]], int] = {}
    waiting = list(enumerate(items))[::-1]
    try:
        while waiting or pending:
            while waiting and len(pending) < _MAX_ITEMS_IN_FLIGHT:
                weight = _measure_item(waiting[-1][1])
                if pending and sum(pending.values()) + weight > _MAX_CHARS_IN_FLIGHT:
                    break
                index, item = waiting.pop()
                work = _answer_item(gateway, index, item, record, deadline)
                pending[asyncio.ensure_future(work)] = weight
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del pending[task]
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _measure_item(item: Any) -> int:
    context = item.get("context") if isinstance(item, dict) else None
    return len(context) if isinstance(context, str) else 0


async def _answer_item(
    gateway: Gateway, index: int, item: Any, record: RequestRecord, deadline: float
) -> dict[str, Any]:
    prefix = f"items.{index}"
    try:
        body = validate_model(item, schemas.AnswerRequest, prefix=prefix)
        query = build_query(gateway, body, record.request_id)
        note_query(record, query)
        outcome = await gateway.pipeline.answer(query, deadline=deadline)
    except (RequestProblemError, Int8qaError) as error:
        problem = describe_problem(error)
        if problem.kind is INTERNAL:
            _log_failure(record, error)
    except Exception as error:  # noqa: BLE001
        # One item's accident must not take the others' answers along.
        _log_failure(record, error)
        problem = describe_problem(error)
    else:
        record.windows += outcome.windows
        return {"index": index, "status": 200, "result": dump_outcome(outcome)}
    if problem.kind.reason is not None:
        gateway.telemetry.count_rejection(problem.kind.reason)
    details = problem.to_dict(record.request_id)
    for fault in details["errors"]:
        if not fault["field"].startswith("items."):
            fault["field"] = f"{prefix}.{fault['field']}"
    return {"index": index, "status": problem.kind.status, "error": details}


def _log_failure(record: RequestRecord, error: BaseException) -> None:
    get_logger().error(
        "item_failed",
        request_id=record.request_id,
        failure=describe_exception(error),
    )


async def _collect(items: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    async with contextlib.aclosing(items) as stream:  # type: ignore[type-var]
        return [item async for item in stream]


class NdjsonResponse(Response):
    """One line per item as it comes; stops working when the client leaves."""

    media_type = NDJSON_MEDIA_TYPE

    def __init__(
        self, items: AsyncIterator[dict[str, Any]], admission: contextlib.ExitStack
    ) -> None:
        super().__init__()
        self._items = items
        self._admission = admission
        del self.headers["content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            try:
                await run_until_gone(receive, self._send_lines(send))
            except OSError as error:
                raise ClientGoneError from error

    async def _send_lines(self, send: Send) -> None:
        async with contextlib.aclosing(self._items) as stream:  # type: ignore[type-var]
            async for item in stream:
                await send(
                    {
                        "type": "http.response.body",
                        "body": orjson.dumps(item) + b"\n",
                        "more_body": True,
                    }
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})
