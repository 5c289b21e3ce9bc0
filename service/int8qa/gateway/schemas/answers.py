"""Questions and answers: one, many, and what is said where there is no answer.

In: nothing. Out: one pydantic model per body of ``/v1/answer`` and ``/v1/answers``,
and RFC 9457's problem. Limits that a setting decides are checked in the pipeline.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from int8qa.gateway.schemas.base import (
    EXAMPLE_ANSWER,
    EXAMPLE_CONTEXT,
    EXAMPLE_QUESTION,
    EXAMPLE_TIMING,
    MAX_ANSWER_TOKENS,
    MAX_DOC_STRIDE,
    MAX_NULL_SCORE_DIFF,
    MAX_TOP_K,
    Body,
    Reply,
)


class AnswerRequest(Body):
    """One question on one context."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"question": EXAMPLE_QUESTION, "context": EXAMPLE_CONTEXT},
                {
                    "question": EXAMPLE_QUESTION,
                    "context": EXAMPLE_CONTEXT,
                    "precision": "both",
                    "top_k": 3,
                    "max_answer_tokens": 30,
                    "doc_stride": 128,
                    "allow_no_answer": False,
                },
            ]
        }
    )

    question: str = Field(
        description="the question; not blank", examples=[EXAMPLE_QUESTION]
    )
    context: str = Field(
        description="the text that holds the answer, of any number of windows; not "
        "blank",
        examples=[EXAMPLE_CONTEXT],
    )
    precision: str | None = Field(
        default=None,
        description="the engine's precision; `both` asks INT8 and FP16 one after the "
        "other and compares them; left out or null: the service's default, which is "
        "the `default_precision` of `/v1/models`",
        examples=["int8"],
    )
    top_k: int = Field(
        default=1,
        ge=1,
        le=MAX_TOP_K,
        description="answers wanted, best first; fewer where the context has fewer",
        examples=[3],
    )
    max_answer_tokens: int = Field(
        default=30,
        ge=1,
        le=MAX_ANSWER_TOKENS,
        description="longest answer, tokens",
        examples=[30],
    )
    doc_stride: int = Field(
        default=128,
        ge=0,
        le=MAX_DOC_STRIDE,
        description="overlap of neighbouring windows of a long context, tokens; less "
        "than the room that the question leaves in a window",
        examples=[128],
    )
    allow_no_answer: bool = Field(
        default=False,
        description="also weigh the answer that the context holds none",
        examples=[False],
    )
    null_score_diff_threshold: float = Field(
        default=0.0,
        ge=-MAX_NULL_SCORE_DIFF,
        le=MAX_NULL_SCORE_DIFF,
        allow_inf_nan=False,
        description="with `allow_no_answer`: how far the natural logarithm of the null "
        "answer's score must exceed that of the best other to win; below 0 the reader "
        "abstains sooner. Choose it on questions of your own",
        examples=[0.0],
    )


class BatchRequest(Body):
    """Many questions at once.

    Each item is one body of ``POST /v1/answer``. It is validated by itself, so that
    one bad item spoils no other.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"question": EXAMPLE_QUESTION, "context": EXAMPLE_CONTEXT},
                        {
                            "question": "When did the committee meet?",
                            "context": EXAMPLE_CONTEXT,
                            "precision": "fp16",
                        },
                    ]
                }
            ]
        }
    )

    items: list[Any] = Field(
        min_length=1,
        description="questions, at least one",
        json_schema_extra={"items": {"$ref": "#/components/schemas/AnswerRequest"}},
    )


class Answer(Reply):
    """A span of the context: ``context[start:end] == text``."""

    text: str = Field(description='the answer as it stands in the context; "" is none')
    start: int = Field(ge=0, description="first character, in Unicode code points")
    end: int = Field(ge=0, description="behind the last character, in code points")
    score: float = Field(
        ge=0,
        description="probability of the span, summed over windows and equal wordings; "
        "above 1 only where overlapping windows agree",
    )


class Timing(Reply):
    """Wall times of the stages in milliseconds; they follow each other."""

    tokenize: float = Field(ge=0, description="both texts to windows, ms")
    queue: float = Field(
        ge=0, description="until the first window went to the engine, ms"
    )
    inference: float = Field(
        ge=0,
        description="from there until the last window's logits were back, ms; of a "
        "long context this includes waiting between its batches",
    )
    decode: float = Field(ge=0, description="logits to answers, ms")
    total: float = Field(ge=0, description="all of it, ms")


class PrecisionAnswer(Reply):
    """One precision's part of a comparison."""

    answer: Answer | None
    alternatives: list[Answer]
    timing_ms: Timing


class Comparison(Reply):
    """INT8 beside FP16 on one question, asked one after the other.

    Which goes first alternates from request to request, so that neither always finds
    the caches warm.
    """

    int8: PrecisionAnswer
    fp16: PrecisionAnswer
    agreement: bool = Field(description="whether both gave the same text, or none")
    speedup: float | None = Field(
        description="FP16 inference time / INT8 inference time; above 1, INT8 is faster"
    )


class AnswerResponse(Reply):
    """The answer to one question."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "answer": EXAMPLE_ANSWER,
                    "alternatives": [],
                    "precision": "int8",
                    "windows": 1,
                    "timing_ms": EXAMPLE_TIMING,
                }
            ]
        }
    )

    answer: Answer | None = Field(
        description="the best answer; null where none was found, or none is likelier"
    )
    alternatives: list[Answer] = Field(
        description="the answers after the first, best first; with `allow_no_answer` "
        'one of them may be the empty text at [0, 0), "no answer" with its score'
    )
    precision: str = Field(
        description="what was asked, or the service's default where nothing was; with "
        "`both`, `answer` is the default precision's, INT8's where that is FP32"
    )
    windows: int = Field(ge=1, description="windows the context was split into")
    timing_ms: Timing = Field(description="with `both`, the sums over both precisions")
    comparison: Comparison | None = Field(
        default=None, description="only with `both`; otherwise left out"
    )


class FieldError(Reply):
    """One offending field."""

    field: str = Field(description="its path as the client wrote it, e.g. `context`")
    message: str = Field(description="what is wrong, and what is allowed")


class ProblemDetails(Reply):
    """RFC 9457 problem details."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:int8qa:problem:invalid",
                    "title": "Invalid request",
                    "status": 422,
                    "detail": "top_k: Input should be less than or equal to 100",
                    "instance": "0f8b2c6d5e7a4b53a1c9d2e3f4a5b6c7",
                    "errors": [
                        {
                            "field": "top_k",
                            "message": "Input should be less than or equal to 100",
                        }
                    ],
                }
            ]
        }
    )

    type: str = Field(description="identifies the kind of problem")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str = Field(description="what happened, what is allowed, what to do next")
    instance: str = Field(description="the request id, also in `X-Request-Id`")
    errors: list[FieldError] = Field(description="offending fields; may be empty")


class BatchItem(Reply):
    """What became of one item: a result or an error, never both."""

    index: int = Field(ge=0, description="position in the request's `items`")
    status: int = Field(
        ge=200, le=599, description="the status it would have had by itself"
    )
    result: AnswerResponse | None = None
    error: ProblemDetails | None = None


class BatchResponse(Reply):
    """All items in the order of the request.

    As ``application/x-ndjson``: one item per line, in the order of completion.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "index": 0,
                            "status": 200,
                            "result": {
                                "answer": EXAMPLE_ANSWER,
                                "alternatives": [],
                                "precision": "int8",
                                "windows": 1,
                                "timing_ms": EXAMPLE_TIMING,
                            },
                        },
                        {
                            "index": 1,
                            "status": 422,
                            "error": {
                                "type": "urn:int8qa:problem:invalid",
                                "title": "Invalid request",
                                "status": 422,
                                "detail": "question is empty; send at least one word",
                                "instance": "0f8b2c6d5e7a4b53a1c9d2e3f4a5b6c7",
                                "errors": [
                                    {
                                        "field": "items.1.question",
                                        "message": "question is empty; send at least "
                                        "one word",
                                    }
                                ],
                            },
                        },
                    ]
                }
            ]
        }
    )

    items: list[BatchItem]
