"""What the HTTP interface takes and gives: the contract with its clients.

In: nothing. Out: one pydantic model per body, strict in types and closed against
unknown fields, each field with its bounds, unit and an example. Limits that a
setting decides are checked in the pipeline; texts never appear in a message.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

MAX_TOP_K = 100
MAX_ANSWER_TOKENS = 512
MAX_DOC_STRIDE = 4096

EXAMPLE_CONTEXT = (
    "The harbour committee met on 14 March 2024. Ingrid Sørensen presented the new "
    "tide tables, and the members agreed to dredge the east basin before May."
)
EXAMPLE_QUESTION = "Who presented the tide tables?"
_EXAMPLE_ANSWER: JsonDict = {
    "text": "Ingrid Sørensen",
    "start": 44,
    "end": 59,
    "score": 0.93,
}
_EXAMPLE_TIMING: JsonDict = {
    "tokenize": 0.4,
    "queue": 0.6,
    "inference": 6.3,
    "decode": 0.1,
    "total": 7.9,
}


class _Body(BaseModel):
    """A body we receive: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Reply(BaseModel):
    """A body we send."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AnswerRequest(_Body):
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


class BatchRequest(_Body):
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


class Answer(_Reply):
    """A span of the context: ``context[start:end] == text``."""

    text: str = Field(description='the answer as it stands in the context; "" is none')
    start: int = Field(ge=0, description="first character, in Unicode code points")
    end: int = Field(ge=0, description="behind the last character, in code points")
    score: float = Field(
        ge=0,
        description="probability of the span, summed over windows and equal wordings; "
        "above 1 only where overlapping windows agree",
    )


class Timing(_Reply):
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


class PrecisionAnswer(_Reply):
    """One precision's part of a comparison."""

    answer: Answer | None
    alternatives: list[Answer]
    timing_ms: Timing


class Comparison(_Reply):
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


class AnswerResponse(_Reply):
    """The answer to one question."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "answer": _EXAMPLE_ANSWER,
                    "alternatives": [],
                    "precision": "int8",
                    "windows": 1,
                    "timing_ms": _EXAMPLE_TIMING,
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


class FieldError(_Reply):
    """One offending field."""

    field: str = Field(description="its path as the client wrote it, e.g. `context`")
    message: str = Field(description="what is wrong, and what is allowed")


class ProblemDetails(_Reply):
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


class BatchItem(_Reply):
    """What became of one item: a result or an error, never both."""

    index: int = Field(ge=0, description="position in the request's `items`")
    status: int = Field(
        ge=200, le=599, description="the status it would have had by itself"
    )
    result: AnswerResponse | None = None
    error: ProblemDetails | None = None


class BatchResponse(_Reply):
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
                                "answer": _EXAMPLE_ANSWER,
                                "alternatives": [],
                                "precision": "int8",
                                "windows": 1,
                                "timing_ms": _EXAMPLE_TIMING,
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


class HfInputs(_Body):
    """Question and context, as the Hugging Face Inference API names them."""

    question: str = Field(description="the question; not blank")
    context: str = Field(description="the text that holds the answer; not blank")


class HfParameters(_Body):
    """Parameters of the Hugging Face Inference API; null means the default."""

    top_k: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOP_K,
        description="answers wanted, best first; default 1; more than 1 gives a list",
    )
    doc_stride: int | None = Field(
        default=None,
        ge=0,
        le=MAX_DOC_STRIDE,
        description="overlap of windows, tokens; default 128, at most half a window",
    )
    max_answer_len: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ANSWER_TOKENS,
        description="longest answer, tokens; default 15",
    )
    max_question_len: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DOC_STRIDE,
        description="longer questions are cut to this, tokens; by default none is cut, "
        "as in the former pipeline with its fast tokenizers",
    )
    max_seq_len: int | None = Field(
        default=None,
        ge=16,
        le=MAX_DOC_STRIDE,
        description="longest window, tokens; default 384, never more than the model's",
    )
    handle_impossible_answer: bool | None = Field(
        default=None, description="accept that there is no answer; default false"
    )
    align_to_words: bool | None = Field(
        default=None, description="widen answers to whole words; default true"
    )


class HfRequest(_Body):
    """Body of the Hugging Face Inference API's question answering."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": {
                        "question": EXAMPLE_QUESTION,
                        "context": EXAMPLE_CONTEXT,
                    },
                    "parameters": {"top_k": 1, "max_answer_len": 15},
                }
            ]
        }
    )

    inputs: HfInputs
    parameters: HfParameters | None = None
    options: dict[str, Any] | None = Field(
        default=None, description="accepted for old clients, and ignored"
    )


class HfAnswer(_Reply):
    """One answer; of ``top_k`` 1 the body is this object, otherwise a list of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"answer": "Ingrid Sørensen", "start": 44, "end": 59, "score": 0.93}
            ]
        }
    )

    answer: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    score: float = Field(ge=0)


class LatencySummary(_Reply):
    """Inference times of one precision; null where nothing was seen."""

    count: int = Field(ge=0)
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class LatencyHistogram(_Reply):
    """Undisturbed pairs by inference time; bin i is from edge i to edge i + 1."""

    edges_ms: list[float] = Field(description="ascending, in equal ratios")
    int8: list[int] = Field(description="pairs per bin; the outer bins hold the rest")
    fp16: list[int]


class ScoreDeviation(_Reply):
    """Difference of the two best answers' scores; null without a pair."""

    mean: float | None = Field(ge=0)
    p95: float | None = Field(ge=0)


class SamplingReport(_Reply):
    """What was asked again in quiet moments."""

    fraction: float = Field(ge=0, le=1, description="share of questions wanted")
    capacity_share: float = Field(ge=0, le=1, description="most of the time allowed")
    spent_share: float = Field(ge=0, description="share of the time since start spent")
    replayed: int = Field(ge=0, description="pairs from asking again, since start")
    waiting: int = Field(ge=0, description="questions that wait for a quiet moment")
    skipped: dict[str, int] = Field(
        description="questions given up, by reason: busy, capacity, too_long"
    )
    disturbed: int = Field(
        ge=0, description="of the replayed, those whose times do not count"
    )


class GuardDescription(_Reply):
    """Whether INT8 still gives FP16's answers."""

    mode: str = Field(description="`off`, `alert` or `fallback`")
    state: str = Field(description="`off`, `collecting`, `ok` or `tripped`")
    agreement: float | None = Field(
        ge=0, le=1, description="over the most recent `needed` pairs"
    )
    pairs: int = Field(ge=0)
    needed: int = Field(ge=1)
    threshold: float = Field(description="trips below")
    recovery: float = Field(description="recovers at or above")
    switches: int = Field(ge=0, description="trips and recoveries since start")
    serving: str = Field(description="what a request that names no precision gets now")


class DisputedAnswer(_Reply):
    """Where one precision saw the answer; code points of the request's context."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    score: float = Field(ge=0)


class Disagreement(_Reply):
    """A recent pair that differed: ids and sizes, never texts."""

    request_id: str = Field(description="as in `X-Request-Id` and the log")
    age_s: float = Field(ge=0)
    windows: int = Field(ge=1)
    question_chars: int = Field(ge=0)
    context_chars: int = Field(ge=0)
    int8: DisputedAnswer | None = Field(description="null: no answer")
    fp16: DisputedAnswer | None


class ComparisonReport(_Reply):
    """INT8 against FP16 over the recent window.

    ``count``, ``agreement`` and ``score_deviation`` speak of pairs: the same question
    asked of both. ``int8``, ``fp16``, ``speedup`` and ``latency_histogram`` speak of
    those in which each ran by itself on an idle engine, so that their ratio is fair.
    ``unpaired`` holds every precision's own recent requests; each saw other questions,
    so do not divide one by the other.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "window": 2000,
                    "count": 2,
                    "int8": {"count": 2, "p50_ms": 6.3, "p95_ms": 6.9, "p99_ms": 6.9},
                    "fp16": {
                        "count": 2,
                        "p50_ms": 19.1,
                        "p95_ms": 20.2,
                        "p99_ms": 20.2,
                    },
                    "speedup": 3.0,
                    "agreement": 1.0,
                    "errors": 0,
                    "unpaired": {
                        "int8": {
                            "count": 3,
                            "p50_ms": 6.3,
                            "p95_ms": 6.9,
                            "p99_ms": 6.9,
                        },
                        "fp16": {
                            "count": 2,
                            "p50_ms": 19.1,
                            "p95_ms": 20.2,
                            "p99_ms": 20.2,
                        },
                    },
                    "latency_histogram": {
                        "edges_ms": [5.0, 10.0, 20.0, 40.0],
                        "int8": [2, 0, 0],
                        "fp16": [0, 1, 1],
                    },
                    "score_deviation": {"mean": 0.02, "p95": 0.03},
                    "sampling": {
                        "fraction": 0.1,
                        "capacity_share": 0.05,
                        "spent_share": 0.01,
                        "replayed": 2,
                        "waiting": 0,
                        "skipped": {"busy": 0, "capacity": 0, "too_long": 0},
                        "disturbed": 0,
                    },
                    "guard": {
                        "mode": "alert",
                        "state": "collecting",
                        "agreement": 1.0,
                        "pairs": 2,
                        "needed": 100,
                        "threshold": 0.8,
                        "recovery": 0.85,
                        "switches": 0,
                        "serving": "int8",
                    },
                    "disagreements": [],
                }
            ]
        }
    )

    window: int = Field(ge=1, description="most observations kept, of each kind")
    count: int = Field(ge=0, description="pairs in the window")
    int8: LatencySummary
    fp16: LatencySummary
    speedup: float | None = Field(
        description="median over the undisturbed pairs of FP16 time / INT8 time"
    )
    agreement: float | None = Field(
        ge=0, le=1, description="share of pairs with the same answer"
    )
    errors: int = Field(
        ge=0, description="pairs in which a precision failed, since start"
    )
    unpaired: dict[str, LatencySummary]
    latency_histogram: LatencyHistogram
    score_deviation: ScoreDeviation
    sampling: SamplingReport
    guard: GuardDescription
    disagreements: list[Disagreement] = Field(
        max_length=10, description="most convinced first"
    )


class ModelDescription(_Reply):
    """One served model."""

    precision: str
    name: str = Field(description="the model's name in Triton")
    engine: str
    checkpoint: str
    calibrator: str
    recipe: str
    f1: float | None = Field(description="F1 at build, 0 to 100")
    exact_match: float | None = Field(description="exact match at build, 0 to 100")
    size_bytes: int
    execution: str = Field(
        description="types the engine's GEMMs really ran in where it was built"
    )
    ready: bool


class ModelsReport(_Reply):
    """What is loaded, and what a request may ask for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "checkpoint": "minilm-squad",
                    "build_id": "3f9a1c",
                    "default_precision": "int8",
                    "recommended": "int8",
                    "precisions": ["int8"],
                    "max_window_tokens": 384,
                    "verdict": "On this machine, INT8 (linear, percentile-99.99) "
                    "is faster than FP16 at 1×128 (2.87×), batch × tokens.",
                    "models": [
                        {
                            "precision": "int8",
                            "name": "qa_int8",
                            "engine": "openvino",
                            "checkpoint": "minilm-squad",
                            "calibrator": "percentile",
                            "recipe": "linear",
                            "f1": 86.1,
                            "exact_match": 77.9,
                            "size_bytes": 23000000,
                            "execution": "i8",
                            "ready": True,
                        }
                    ],
                }
            ]
        }
    )

    checkpoint: str
    build_id: str
    default_precision: str = Field(
        description="what requests that name no precision get: "
        "`INT8QA_DEFAULT_PRECISION`, or what the build recommends where that is `auto`"
    )
    recommended: str | None = Field(
        description="the precision that the build recommends on the machine it ran on; "
        "null where it says none"
    )
    precisions: list[str] = Field(description="allowed values of `precision`")
    max_window_tokens: int
    verdict: str = Field(
        description="one paragraph of the build: what INT8 gains and costs, and why "
        "`recommended` is so; empty where it says nothing"
    )
    models: list[ModelDescription]


class Liveness(_Reply):
    """The process answers."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "live"}]})

    status: str


class Readiness(_Reply):
    """Whether questions can be answered now, and what stands in the way."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"status": "ready", "parts": {"int8": "ready", "fp16": "ready"}}
            ]
        }
    )

    status: str = Field(description="`ready` or `not ready`")
    parts: dict[str, str] = Field(description="`ready`, or why not, by part")
