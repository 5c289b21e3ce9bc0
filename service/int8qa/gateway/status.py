"""Routes that say what is served, how well, and whether: for people and probes.

In: GET requests. Out: the comparison, the models, liveness, readiness, metrics. Nothing
here waits for an engine. Of several gateway processes whichever answers speaks for all;
of liveness and readiness, for itself.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from int8qa.gateway.comparison import (
    HISTOGRAM_EDGES_S,
    Pair,
    PairedAnswer,
    Percentiles,
    ShadowReport,
)
from int8qa.gateway.merging import MergedRegistry, ProcessState, merge_states
from int8qa.gateway.openapi import describe_responses
from int8qa.gateway.problems import FieldFault, Problem, ProblemKind
from int8qa.gateway.reload import Gateway
from int8qa.gateway.routes import JsonResponse, get_gateway, get_record

_NOT_READY = ProblemKind(503, "not-ready", "Not ready", "unavailable")

router = APIRouter()


@router.get(
    "/v1/comparison",
    tags=["service"],
    summary="INT8 against FP16, recently",
    responses=describe_responses("ComparisonReport", description="the recent window"),
)
async def get_comparison(request: Request) -> Response:
    """Latencies, speed-up, agreement and the guard over the recent window.

    Pairs come from requests with `precision: both`, and from a share of all answered
    questions that is asked again in quiet moments.
    """
    gateway = get_gateway(request)
    merged = await _gather(request)
    if merged is None:
        return JsonResponse(dump_comparison(gateway, gateway.pipeline.shadow.report()))
    return JsonResponse(dump_comparison(gateway, merged.shadow))


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
            "default_precision": pipeline.serving_precision.value,
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
    """The gateway's metrics, of all its processes; Triton has its own.

    As OpenMetrics, with exemplars, where `Accept` asks for it.
    """
    accept = request.headers.get("accept", "")
    merged = await _gather(request)
    registry = None if merged is None else MergedRegistry(merged.metrics)
    body, media_type = get_gateway(request).telemetry.render(accept, registry)
    return Response(body, media_type=media_type)


async def _gather(request: Request) -> ProcessState | None:
    """All gateway processes together; None where there is one."""
    crew = request.app.state.crew
    return None if crew is None else merge_states(await crew.gather())


def dump_comparison(gateway: Gateway, shadow: ShadowReport) -> dict[str, Any]:
    """The body of ``ComparisonReport``."""
    comparison, pipeline = gateway.comparison, gateway.pipeline
    settings = gateway.settings.comparison
    pairs = comparison.report_pairs()
    guard = pipeline.guard.report()
    now_s = pipeline.clock()
    return {
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
        "latency_histogram": {
            "edges_ms": [round(edge * 1e3, 4) for edge in HISTOGRAM_EDGES_S],
            **{
                precision.value: counts
                for precision, counts in comparison.count_latencies().items()
            },
        },
        "score_deviation": {"mean": pairs.mean_deviation, "p95": pairs.p95_deviation},
        "sampling": {
            "fraction": settings.fraction,
            "capacity_share": settings.capacity_share,
            "spent_share": shadow.spent_share,
            "replayed": shadow.replayed,
            "waiting": shadow.waiting,
            "skipped": shadow.skipped,
            "disturbed": shadow.disturbed,
        },
        "guard": {
            "mode": settings.guard,
            "state": guard.state,
            "agreement": guard.agreement,
            "pairs": guard.pairs,
            "needed": guard.needed,
            "threshold": settings.guard_agreement,
            "recovery": settings.guard_recovery,
            "switches": guard.switches,
            "serving": pipeline.serving_precision.value,
        },
        "disagreements": [
            _dump_disagreement(pair, now_s) for pair in comparison.list_disagreements()
        ],
    }


def _dump_disagreement(pair: Pair, now_s: float) -> dict[str, Any]:
    def place(answer: PairedAnswer | None) -> dict[str, Any] | None:
        if answer is None:
            return None
        return {"start": answer.start, "end": answer.end, "score": answer.score}

    return {
        "request_id": pair.request_id,
        "age_s": round(now_s - pair.seen_s, 1),
        "windows": pair.windows,
        "question_chars": pair.question_chars,
        "context_chars": pair.context_chars,
        "int8": place(pair.int8),
        "fp16": place(pair.fp16),
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
