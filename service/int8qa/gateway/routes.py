"""Every route: request to query, outcome to response.

In: HTTP requests. Out: JSON, one line per item where asked, or an error for the
table of problems. Bodies are read strictly and written directly, so that what is
sent is what ``schemas`` documents and nothing is serialized twice.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Request
from fastapi import Query as QueryParameter
from pydantic import BaseModel
from starlette.responses import Response

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    InvalidInputError,
    UnknownModelError,
)
from int8qa.gateway import schemas
from int8qa.gateway.bodies import read_model
from int8qa.gateway.direct import DirectRoute
from int8qa.gateway.edge import run_until_gone
from int8qa.gateway.openapi import describe_body, describe_responses
from int8qa.gateway.problems import (
    LATE_BODY,
    RequestProblemError,
)
from int8qa.gateway.query import PAIR, Outcome, PrecisionChoice, Query, Run
from int8qa.gateway.reload import Gateway
from int8qa.gateway.telemetry import RequestRecord, StageSeconds
from int8qa.gateway.waiting import finish_within
from int8qa.reader.spans import MAX_ANSWER_TOKENS, Span
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS

_HF_FIELDS = {
    "question": "inputs.question",
    "context": "inputs.context",
    "top_k": "parameters.top_k",
    "doc_stride": "parameters.doc_stride",
    "max_answer_tokens": "parameters.max_answer_len",
    "max_question_tokens": "parameters.max_question_len",
    "max_window_tokens": "parameters.max_seq_len",
}


def get_gateway(request: Request) -> Gateway:
    """The gateway behind an application."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def get_record(request: Request) -> RequestRecord:
    """What the edge measures a request by."""
    record: RequestRecord = request.state.record
    return record


ANSWER_PROBLEMS = (400, 408, 413, 415, 422, 429, 502, 503, 504)

RequestTimeout = Annotated[
    float | None,
    Header(
        alias="X-Request-Timeout",
        gt=0,
        allow_inf_nan=False,
        description="seconds the client will wait; the service's own limit, if less. "
        "What cannot be answered by then is refused or dropped",
    ),
]

router = APIRouter(route_class=DirectRoute)


# Questions.


@router.post(
    "/v1/answer",
    tags=["answers"],
    summary="Answer one question",
    responses=describe_responses("AnswerResponse", *ANSWER_PROBLEMS),
    openapi_extra=describe_body("AnswerRequest"),
)
async def post_answer(
    request: Request, x_request_timeout: RequestTimeout = None
) -> Response:
    """Find the answer to a question in a text of any length."""
    gateway = get_gateway(request)
    with gateway.pipeline.admit():
        deadline = compute_deadline(gateway, x_request_timeout)
        body = await read_body(request, schemas.AnswerRequest, gateway, deadline)
        record = get_record(request)
        query = build_query(gateway, body, record.request_id)
        note_query(record, query)
        outcome = await run_until_gone(
            request.receive, gateway.pipeline.answer(query, deadline=deadline)
        )
        note_outcome(record, outcome)
        return JsonResponse(dump_outcome(outcome))


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
        *ANSWER_PROBLEMS,
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
    x_request_timeout: RequestTimeout = None,
) -> Response:
    """Speak to `huggingface_hub.InferenceClient(model="http://…")` unchanged.

    Semantics and defaults are those of the former transformers pipeline. `top_k` 1
    gives an object, more gives a list.
    """
    return await _answer_hf(request, precision or x_precision, x_request_timeout)


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
        *ANSWER_PROBLEMS,
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
    x_request_timeout: RequestTimeout = None,
) -> Response:
    """As `POST /`. The id is the checkpoint's, its last part, or `qa_<precision>`."""
    contract = get_gateway(request).contract
    named = resolve_model(contract, model_id)
    asked = precision or x_precision
    name = asked or (named.value if named else None)
    return await _answer_hf(request, name, x_request_timeout)


# Requests to queries.


def build_query(
    gateway: Gateway, body: schemas.AnswerRequest, request_id: str
) -> Query:
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
        null_score_diff_threshold=body.null_score_diff_threshold,
        max_window_tokens=gateway.contract.max_window_tokens,
        request_id=request_id,
    )


def build_hf_query(
    gateway: Gateway,
    body: schemas.HfRequest,
    choice: PrecisionChoice,
    request_id: str,
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
        request_id=request_id,
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


async def _answer_hf(
    request: Request, precision: str | None, timeout_s: float | None
) -> Response:
    gateway = get_gateway(request)
    with gateway.pipeline.admit():
        deadline = compute_deadline(gateway, timeout_s)
        body = await read_body(request, schemas.HfRequest, gateway, deadline)
        record = get_record(request)
        choice = gateway.pipeline.choose_precision(precision)
        query = build_hf_query(gateway, body, choice, record.request_id)
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


async def read_body(
    request: Request,
    model: type[BaseModel],
    gateway: Gateway,
    deadline: float,
) -> Any:
    """Read and check a request's body before its deadline, and in its own time.

    Raises:
        RequestProblemError: it is malformed, invalid or late.
        InputTooLargeError: it is larger than a body may be.
    """
    remaining_s = min(
        deadline - gateway.pipeline.clock(), gateway.settings.limits.receive_timeout_s
    )
    try:
        return await finish_within(read_model(request, model), remaining_s)
    except asyncio.TimeoutError:
        raise RequestProblemError(
            LATE_BODY, f"the body did not arrive within {max(remaining_s, 0):.3g} s"
        ) from None


def compute_deadline(gateway: Gateway, asked_s: float | None) -> float:
    """When a request that comes now must be answered, on the pipeline's clock."""
    allowed_s = gateway.settings.limits.request_timeout_s
    return gateway.pipeline.clock() + min(asked_s or allowed_s, allowed_s)


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


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
