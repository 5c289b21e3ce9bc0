"""What the service says of itself: models, comparison, health.

In: nothing. Out: one pydantic model per body of ``/v1/models``, ``/v1/comparison``,
``/live`` and ``/ready``.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from int8qa.gateway.schemas.base import Reply


class LatencySummary(Reply):
    """Inference times of one precision; null where nothing was seen."""

    count: int = Field(ge=0)
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class LatencyHistogram(Reply):
    """Undisturbed pairs by inference time; bin i is from edge i to edge i + 1."""

    edges_ms: list[float] = Field(description="ascending, in equal ratios")
    int8: list[int] = Field(description="pairs per bin; the outer bins hold the rest")
    fp16: list[int]


class ScoreDeviation(Reply):
    """Difference of the two best answers' scores; null without a pair."""

    mean: float | None = Field(ge=0)
    p95: float | None = Field(ge=0)


class SamplingReport(Reply):
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


class GuardDescription(Reply):
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


class DisputedAnswer(Reply):
    """Where one precision saw the answer; code points of the request's context."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    score: float = Field(ge=0)


class Disagreement(Reply):
    """A recent pair that differed: ids and sizes, never texts."""

    request_id: str = Field(description="as in `X-Request-Id` and the log")
    age_s: float = Field(ge=0)
    windows: int = Field(ge=1)
    question_chars: int = Field(ge=0)
    context_chars: int = Field(ge=0)
    int8: DisputedAnswer | None = Field(description="null: no answer")
    fp16: DisputedAnswer | None


class ComparisonReport(Reply):
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


class ModelDescription(Reply):
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


class ModelsReport(Reply):
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
                    "verdict": "On this machine, INT8 (gemms, percentile-99.99) "
                    "is faster than FP16 at 1×128 (2.87×), batch × tokens.",
                    "models": [
                        {
                            "precision": "int8",
                            "name": "qa_int8",
                            "engine": "openvino",
                            "checkpoint": "minilm-squad",
                            "calibrator": "percentile",
                            "recipe": "gemms",
                            "f1": 86.1,
                            "exact_match": 77.9,
                            "size_bytes": 23000000,
                            "execution": "u8+f32",
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


class Liveness(Reply):
    """The process answers."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "live"}]})

    status: str


class Readiness(Reply):
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
