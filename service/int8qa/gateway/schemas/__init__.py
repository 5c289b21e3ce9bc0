"""What the HTTP interface takes and gives: the contract with its clients.

In: nothing. Out: one pydantic model per body, strict in types and closed against
unknown fields, each field with its bounds, unit and an example. Limits that a
setting decides are checked in the pipeline; texts never appear in a message.
"""

from int8qa.gateway.schemas.answers import (
    Answer,
    AnswerRequest,
    AnswerResponse,
    BatchItem,
    BatchRequest,
    BatchResponse,
    Comparison,
    FieldError,
    PrecisionAnswer,
    ProblemDetails,
    Timing,
)
from int8qa.gateway.schemas.base import (
    EXAMPLE_CONTEXT,
    EXAMPLE_QUESTION,
    MAX_ANSWER_TOKENS,
    MAX_DOC_STRIDE,
    MAX_TOP_K,
)
from int8qa.gateway.schemas.huggingface import (
    HfAnswer,
    HfInputs,
    HfParameters,
    HfRequest,
)
from int8qa.gateway.schemas.reports import (
    ComparisonReport,
    Disagreement,
    DisputedAnswer,
    GuardDescription,
    LatencyHistogram,
    LatencySummary,
    Liveness,
    ModelDescription,
    ModelsReport,
    Readiness,
    SamplingReport,
    ScoreDeviation,
)

__all__ = [
    "EXAMPLE_CONTEXT",
    "EXAMPLE_QUESTION",
    "MAX_ANSWER_TOKENS",
    "MAX_DOC_STRIDE",
    "MAX_TOP_K",
    "Answer",
    "AnswerRequest",
    "AnswerResponse",
    "BatchItem",
    "BatchRequest",
    "BatchResponse",
    "Comparison",
    "ComparisonReport",
    "Disagreement",
    "DisputedAnswer",
    "FieldError",
    "GuardDescription",
    "HfAnswer",
    "HfInputs",
    "HfParameters",
    "HfRequest",
    "LatencyHistogram",
    "LatencySummary",
    "Liveness",
    "ModelDescription",
    "ModelsReport",
    "PrecisionAnswer",
    "ProblemDetails",
    "Readiness",
    "SamplingReport",
    "ScoreDeviation",
    "Timing",
]
