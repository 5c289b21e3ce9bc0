"""Every route: request to query, outcome to response.

In: HTTP requests. Out: JSON, one line per item where asked, or an error for the
table of problems. Bodies are read strictly and written directly, so that what is
sent is what ``schemas`` documents and nothing is serialized twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Request
from fastapi import Query as QueryParameter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    InputTooLargeError,
    Int8qaError,
    InvalidInputError,
    UnknownModelError,
)
from int8qa.gateway import schemas
from int8qa.gateway.bodies import read_model, validate_model
from int8qa.gateway.comparison import ComparisonWindow, Percentiles
from int8qa.gateway.edge import ClientGoneError, run_until_gone
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.openapi import describe_body, describe_responses
from int8qa.gateway.pipeline import (
    PAIR,
    AnswerPipeline,
    Outcome,
    PrecisionChoice,
    Query,
    Run,
)
from int8qa.gateway.problems import (
    INTERNAL,
    FieldFault,
    Problem,
    ProblemKind,
    RequestProblemError,
    describe_problem,
)
from int8qa.gateway.telemetry import RequestRecord, StageSeconds, Telemetry
from int8qa.gateway.waiting import finish_within
from int8qa.reader.spans import MAX_ANSWER_TOKENS, Span
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS
from int8qa.settings import Settings

NDJSON_MEDIA_TYPE = "application/x-ndjson"

_MAX_ITEMS_IN_FLIGHT = 64
_MAX_CHARS_IN_FLIGHT = 65_536
"""Items of one request worked on at once: enough to fill batches, too little to fill
the queue, lest a request be refused on its own account."""

_NOT_READY = ProblemKind(503, "not-ready", "Not ready", "unavailable")

_HF_FIELDS = {
    "question": "inputs.question",
    "context": "inputs.context",
    "top_k": "parameters.top_k",
    "doc_stride": "parameters.doc_stride",
    "max_answer_tokens": "parameters.max_answer_len",
    "max_question_tokens": "parameters.max_question_len",
    "max_window_tokens": "parameters.max_seq_len",
}


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the routes work with; ``app.state.gateway``."""

    settings: Settings
    contract: Contract
    pipeline: AnswerPipeline
    telemetry: Telemetry
    comparison: ComparisonWindow
    index_page: str
    index_policy: str
    """The page's Content-Security-Policy."""


def get_gateway(request: Request) -> Gateway:
    """The gateway behind an application."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def get_record(request: Request) -> RequestRecord:
    """What the edge measures a request by."""
    record: RequestRecord = request.state.record
    return record


_ANSWER_PROBLEMS = (400, 413, 415, 422, 429, 502, 503, 504)

router = APIRouter()


# Questions.


@router.post(
    "/v1/answer",
    tags=["answers"],
    summary="Answer one question",
    responses=describe_responses("AnswerResponse", *_ANSWER_PROBLEMS),
    openapi_extra=describe_body("AnswerRequest"),
)
async def post_answer(request: Request) -> Response:
    """Find the answer to a question in a text of any length."""
    gateway = get_gateway(request)
    with gateway.pipeline.admit():
        deadline = _compute_deadline(gateway)
        body = await _read_body(request, schemas.AnswerRequest, gateway, deadline)
        record = get_record(request)
        query = build_query(gateway, body)
        note_query(record, query)
        outcome = await run_until_gone(
            request.receive, gateway.pipeline.answer(query, deadline=deadline)
        )
        note_outcome(record, outcome)
        return JsonResponse(dump_outcome(outcome))


@router.post(
    "/v1/answers",
    tags=["answers"],
    summary="Answer many questions",
    responses=describe_responses("BatchResponse", *_ANSWER_PROBLEMS),
    openapi_extra=describe_body("BatchRequest"),
)
async def post_answers(request: Request) -> Response:
    """Answer each item by itself: a bad one gets its own problem, the rest answers.

    With `Accept: application/x-ndjson` each item is one line, sent as it completes.
    """
    gateway = get_gateway(request)
    with contextlib.ExitStack() as stack:
        stack.enter_context(gateway.pipeline.admit())
        gateway.pipeline.watch.require_any()
        deadline = _compute_deadline(gateway)
        body = await _read_body(request, schemas.BatchRequest, gateway, deadline)
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


@router.post(
    "/",
    tags=["hugging face"],
    summary="Answer one question, Hugging Face schema",
    responses=describe_responses(
        {
            "anyOf": [
                {"$ref": "#/components/schemas/HfAnswer"},
                {
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/HfAnswer"},
                },
            ]
        },
        *_ANSWER_PROBLEMS,
    ),
    openapi_extra=describe_body("HfRequest"),
)
async def post_hf(
    request: Request,
    precision: Annotated[
        str | None, QueryParameter(description="as in `/v1/answer`")
    ] = None,
    x_precision: Annotated[
        str | None, Header(description="likewise; the query parameter wins")
    ] = None,
) -> Response:
    """Speak to `huggingface_hub.InferenceClient(model="http://…")` unchanged.

    Semantics and defaults are those of the former transformers pipeline. `top_k` 1
    gives an object, more gives a list.
    """
    return await _answer_hf(request, precision or x_precision)


@router.post(
    "/models/{model_id:path}",
    tags=["hugging face"],
    summary="Answer one question, Hugging Face schema, model named",
    responses=describe_responses(
        {
            "anyOf": [
                {"$ref": "#/components/schemas/HfAnswer"},
                {
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/HfAnswer"},
                },
            ]
        },
        404,
        *_ANSWER_PROBLEMS,
    ),
    openapi_extra=describe_body("HfRequest"),
)
async def post_hf_model(
    request: Request,
    model_id: str,
    precision: Annotated[
        str | None,
        QueryParameter(
            description="as in `/v1/answer`; left out: what the id names, if anything"
        ),
    ] = None,
    x_precision: Annotated[
        str | None, Header(description="likewise; the query parameter wins")
    ] = None,
) -> Response:
    """As `POST /`. The id is the checkpoint's, its last part, or `qa_<precision>`."""
    contract = get_gateway(request).contract
    named = resolve_model(contract, model_id)
    asked = precision or x_precision
    return await _answer_hf(request, asked or (named.value if named else None))


# What is served, and how well.


@router.get(
    "/v1/comparison",
    tags=["service"],
    summary="INT8 against FP16, recently",
    responses=describe_responses("ComparisonReport", description="the recent window"),
)
async def get_comparison(request: Request) -> Response:
    """Latencies, speed-up and agreement over the recent window."""
    comparison = get_gateway(request).comparison
    pairs = comparison.report_pairs()
    return JsonResponse(
        {
            "window": comparison.size,
            "count": pairs.count,
            "int8": _dump_percentiles(pairs.int8),
            "fp16": _dump_percentiles(pairs.fp16),
            "speedup": pairs.speedup,
            "agreement": pairs.agreement,
            "errors": pairs.errors,
            "unpaired": {
                precision.value: _dump_percentiles(summary)
                for precision, summary in comparison.report_singles().items()
            },
        }
    )


@router.get(
    "/v1/models",
    tags=["service"],
    summary="What is loaded",
    responses=describe_responses("ModelsReport", description="the models"),
)
async def get_models(request: Request) -> Response:
    """Each precision's engine, calibration and accuracy at build; the default and why.

    `recommended` is the build's word, `verdict` its reasons, `default_precision` what
    requests that name none get here.
    """
    gateway = get_gateway(request)
    contract, pipeline = gateway.contract, gateway.pipeline
    return JsonResponse(
        {
            "checkpoint": contract.checkpoint,
            "build_id": contract.build_id,
            "default_precision": pipeline.default_precision.value,
            "recommended": contract.recommended,
            "precisions": pipeline.list_precisions(),
            "max_window_tokens": contract.max_window_tokens,
            "verdict": contract.verdict,
            "models": [
                {
                    "precision": precision.value,
                    **model.model_dump(mode="json"),
                    "checkpoint": contract.checkpoint,
                    "ready": pipeline.watch.is_ready(precision),
                }
                for precision, model in contract.models.items()
            ],
        }
    )


@router.get(
    "/live",
    tags=["service"],
    summary="Whether the process answers",
    responses=describe_responses("Liveness", description="it does"),
)
async def get_live() -> Response:
    """Always 200; restart the process if it does not come."""
    return JsonResponse({"status": "live"})


@router.get(
    "/ready",
    tags=["service"],
    summary="Whether questions can be answered",
    responses=describe_responses("Readiness", 503, description="all parts are ready"),
)
async def get_ready(request: Request) -> Response:
    """200, or a 503 problem whose `errors` name each part that is not ready."""
    parts = get_gateway(request).pipeline.report_parts()
    faults = [FieldFault(part, why) for part, why in parts.items() if why is not None]
    if not faults:
        return JsonResponse({"status": "ready", "parts": dict.fromkeys(parts, "ready")})
    record = get_record(request)
    problem = Problem(
        _NOT_READY,
        f"not ready: {', '.join(fault.field for fault in faults)}",
        tuple(faults),
        retry_after_s=1,
    )
    record.outcome, record.problem = _NOT_READY.outcome, _NOT_READY.slug
    return problem.to_response(record.request_id)


@router.get(
    "/metrics",
    tags=["service"],
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text format",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
async def get_metrics(request: Request) -> Response:
    """The gateway's metrics; Triton has its own."""
    return Response(
        get_gateway(request).telemetry.render(), media_type=CONTENT_TYPE_LATEST
    )


@router.get("/", include_in_schema=False)
async def get_index(request: Request) -> Response:
    """A page for people."""
    base_url = html.escape(str(request.base_url).rstrip("/"), quote=True)
    page = get_gateway(request).index_page.replace("{{base_url}}", base_url)
    return HTMLResponse(
        page, headers={"Content-Security-Policy": get_gateway(request).index_policy}
    )


# Requests to queries.


def build_query(gateway: Gateway, body: schemas.AnswerRequest) -> Query:
    """Resolve one request's precision and limits.

    Raises:
        InvalidInputError: the precision is not served here.
    """
    return Query(
        question=body.question,
        context=body.context,
        choice=gateway.pipeline.choose_precision(body.precision),
        top_k=body.top_k,
        max_answer_tokens=body.max_answer_tokens,
        doc_stride=body.doc_stride,
        allow_no_answer=body.allow_no_answer,
        max_window_tokens=gateway.contract.max_window_tokens,
    )


def build_hf_query(
    gateway: Gateway, body: schemas.HfRequest, choice: PrecisionChoice
) -> Query:
    """Apply the defaults of the former transformers pipeline.

    Source: transformers 5.2.0, ``pipelines/question_answering.py``. There
    ``max_question_len`` had no effect with fast tokenizers; here it has when given.
    """
    given = body.parameters or schemas.HfParameters()
    longest = gateway.contract.max_window_tokens
    window_tokens = min(given.max_seq_len or MAX_WINDOW_TOKENS, longest)
    doc_stride = given.doc_stride
    if doc_stride is None:
        doc_stride = min(DOC_STRIDE_TOKENS, window_tokens // 2)
    return Query(
        question=body.inputs.question,
        context=body.inputs.context,
        choice=choice,
        top_k=given.top_k or 1,
        max_answer_tokens=given.max_answer_len or MAX_ANSWER_TOKENS,
        doc_stride=doc_stride,
        allow_no_answer=bool(given.handle_impossible_answer),
        max_window_tokens=window_tokens,
        max_question_tokens=given.max_question_len,
        align_to_words=given.align_to_words is not False,
    )


def resolve_model(contract: Contract, model_id: str) -> Precision | None:
    """The precision that a model id names, None if it names the checkpoint.

    Raises:
        UnknownModelError: it names nothing that is served here.
    """
    for precision, model in contract.models.items():
        if model_id in (model.name, precision.value):
            return precision
    if model_id in (contract.checkpoint, contract.checkpoint.rpartition("/")[2]):
        return None
    served = [contract.checkpoint, *(model.name for model in contract.models.values())]
    raise UnknownModelError(f"no such model; served here: {', '.join(served)}")


async def _answer_hf(request: Request, precision: str | None) -> Response:
    gateway = get_gateway(request)
    with gateway.pipeline.admit():
        deadline = _compute_deadline(gateway)
        body = await _read_body(request, schemas.HfRequest, gateway, deadline)
        record = get_record(request)
        choice = gateway.pipeline.choose_precision(precision)
        query = build_hf_query(gateway, body, choice)
        note_query(record, query)
        try:
            outcome = await run_until_gone(
                request.receive, gateway.pipeline.answer(query, deadline=deadline)
            )
        except InvalidInputError as error:
            name = _HF_FIELDS.get(error.field, error.field)
            raise type(error)(name, str(error)) from error
        note_outcome(record, outcome)
        answers = [
            {
                "answer": span.text,
                "start": span.start,
                "end": span.end,
                "score": span.score,
            }
            for span in outcome.run.spans
        ]
        return JsonResponse(answers[0] if query.top_k == 1 else answers)


async def _read_body(
    request: Request,
    model: type[BaseModel],
    gateway: Gateway,
    deadline: float,
) -> Any:
    remaining_s = deadline - gateway.pipeline.clock()
    try:
        return await finish_within(read_model(request, model), remaining_s)
    except asyncio.TimeoutError:
        raise RequestProblemError(
            ProblemKind(408, "request-timeout", "Request timeout", "timeout"),
            "the body did not arrive before the request's deadline",
        ) from None


def _compute_deadline(gateway: Gateway) -> float:
    return gateway.pipeline.clock() + gateway.settings.limits.request_timeout_s


# Items of a batch request.


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
        query = build_query(gateway, body)
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


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


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


# Outcomes to bodies, metrics and log lines.


def note_query(record: RequestRecord, query: Query) -> None:
    """Add a question's sizes to its request's record."""
    record.question_chars += len(query.question)
    record.context_chars += len(query.context)
    if record.items is None:
        record.precision = query.choice.label


def note_outcome(record: RequestRecord, outcome: Outcome) -> None:
    """Add an answer's figures to its request's record."""
    record.windows += outcome.windows
    record.stages = outcome.stages


def dump_outcome(outcome: Outcome) -> dict[str, Any]:
    """The body of ``AnswerResponse``."""
    body: dict[str, Any] = {
        **_dump_answers(outcome.run),
        "precision": outcome.choice.label,
        "windows": outcome.windows,
        "timing_ms": _dump_stages(outcome.stages),
    }
    if outcome.agreement is not None:
        body["comparison"] = {
            **{
                precision.value: {
                    **_dump_answers(outcome.runs[precision]),
                    "timing_ms": _dump_stages(outcome.runs[precision].stages),
                }
                for precision in PAIR
            },
            "agreement": outcome.agreement,
            "speedup": outcome.speedup,
        }
    return body


def _dump_answers(run: Run) -> dict[str, Any]:
    return {
        "answer": None if run.best is None else _dump_span(run.best),
        "alternatives": [_dump_span(span) for span in run.spans[1:]],
    }


def _dump_span(span: Span) -> dict[str, Any]:
    return {
        "text": span.text,
        "start": span.start,
        "end": span.end,
        "score": span.score,
    }


def _dump_stages(stages: StageSeconds) -> dict[str, float]:
    return {
        stage: round(getattr(stages, stage) * 1e3, 3)
        for stage in ("tokenize", "queue", "inference", "decode", "total")
    }


def _dump_percentiles(summary: Percentiles) -> dict[str, Any]:
    def to_ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e3, 3)

    return {
        "count": summary.count,
        "p50_ms": to_ms(summary.p50_s),
        "p95_ms": to_ms(summary.p95_s),
        "p99_ms": to_ms(summary.p99_s),
    }
