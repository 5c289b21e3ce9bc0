"""Every metric of the gateway, declared once.

In: what the edges of a request and of a batch observed. Out: the Prometheus text
of ``GET /metrics``, from a registry that belongs to one application. Label values
come from closed sets. Knows no HTTP status and no text of a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder

from int8qa.contract import Contract, Precision
from int8qa.gateway.merging import MergedRegistry

if TYPE_CHECKING:
    from int8qa.gateway.comparison import ComparisonWindow, Pair

SECONDS_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0,
    60.0,
)  # fmt: skip
"""Upper bounds in seconds: a 1 ms GPU answer and a 60 s document both resolve."""

WINDOWS_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
DEVIATION_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_MAX_EXEMPLAR_CHARS = 64
"""Of a request id, which may be longer: OpenMetrics 1.0 allows an exemplar's names and
values 128 characters together."""
RATIO_BUCKETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

SKIP_REASONS = ("busy", "capacity", "too_long")
"""Why a sampled question is not asked again."""
STAGES = ("tokenize", "queue", "inference", "decode")
NO_PRECISION = "none"
"""Precision label of requests that never got as far as choosing one."""
NO_KEY = "-"
"""Key label of requests without a good one; no key may have this name."""
OTHER_ROUTE = "other"
"""Route label of every path that is no route of ours."""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Durations of one request's stages in one precision, in seconds.

    ``queue`` runs from submission to the dispatch of the request's first window,
    ``inference`` from there until the logits of its last window are back: wall
    spans that follow each other, so that the stages add up to the total.
    """

    tokenize: float
    queue: float
    inference: float
    decode: float

    @property
    def total(self) -> float:
        return self.tokenize + self.queue + self.inference + self.decode


@dataclass(slots=True)
class RequestRecord:
    """What one HTTP request is measured and logged by; filled as it goes along."""

    request_id: str
    method: str
    route: str = OTHER_ROUTE
    precision: str = NO_PRECISION
    status: int = 0
    outcome: str = "ok"
    problem: str | None = None
    """Slug of the problem the request ended with."""
    items: int | None = None
    windows: int = 0
    question_chars: int = 0
    context_chars: int = 0
    stages: StageSeconds | None = None
    key: str | None = None
    """Name of the API key it came with, never the key."""
    client: str | None = None
    """Address of whoever came without a good key, where keys are asked for."""
    failure: list[str] | None = None
    """For the log: what went wrong on our side, without a text of a user."""


class _BatchMetrics(NamedTuple):
    """Those of one precision's batches."""

    windows: Histogram
    padding_ratio: Histogram
    tokens: Counter
    padding_tokens: Counter


class Telemetry:
    """The metrics of one application; also the batchers' observer."""

    def __init__(self, contract: Contract, *, leads: bool = True) -> None:
        """Declare them.

        Args:
            contract: of what is served.
            leads: whether to count what all gateway processes do alike, and at once:
                one of them does.
        """
        self._leads = leads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self._request_seconds = Histogram(
            "int8qa_request_seconds",
            "Wall time of one HTTP request, from its head to the end of the response",
            ("route", "precision", "outcome"),
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "int8qa_stage_seconds",
            "Wall time of one stage of one answer",
            ("stage", "precision"),
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._batch_windows = Histogram(
            "int8qa_batch_windows",
            "Windows in one batch sent to the engine",
            ("precision",),
            buckets=WINDOWS_BUCKETS,
            registry=self.registry,
        )
        self._batch_padding_ratio = Histogram(
            "int8qa_batch_padding_ratio",
            "Share of a batch's tokens that is padding",
            ("precision",),
            buckets=RATIO_BUCKETS,
            registry=self.registry,
        )
        self._queue_windows = Gauge(
            "int8qa_queue_windows",
            "Windows waiting for a batch, all precisions together",
            registry=self.registry,
        )
        self._inflight_requests = Gauge(
            "int8qa_inflight_requests",
            "Accepted requests for answers that are not yet answered",
            registry=self.registry,
        )
        self._rejected_total = Counter(
            "int8qa_rejected_total",
            "Questions refused, by reason; items of a batch request count one each",
            ("reason",),
            registry=self.registry,
        )
        self._comparisons_total = Counter(
            "int8qa_comparisons_total",
            "Questions asked of INT8 and FP16 both, by whether the answers agreed",
            ("agreement",),
            registry=self.registry,
        )
        self._comparison_latency_seconds = Histogram(
            "int8qa_comparison_latency_seconds",
            "Inference time of one question asked of both precisions",
            ("precision",),
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._batch_tokens_total = Counter(
            "int8qa_batch_tokens_total",
            "Tokens in the batches sent to the engine, padding included",
            ("precision",),
            registry=self.registry,
        )
        self._batch_padding_tokens_total = Counter(
            "int8qa_batch_padding_tokens_total",
            "Those of them that are padding",
            ("precision",),
            registry=self.registry,
        )
        self._comparison_speedup_ratio = Gauge(
            "int8qa_comparison_speedup_ratio",
            "Median of FP16 time / INT8 time over the recent pairs; NaN without any",
            registry=self.registry,
        )
        self._comparison_agreement_ratio = Gauge(
            "int8qa_comparison_agreement_ratio",
            "Share of the recent pairs with the same answer; NaN without any",
            registry=self.registry,
        )
        self._comparison_score_deviation = Histogram(
            "int8qa_comparison_score_deviation",
            "Difference of INT8's and FP16's score of the best answer",
            buckets=DEVIATION_BUCKETS,
            registry=self.registry,
        )
        self._comparison_disturbed_total = Counter(
            "int8qa_comparison_disturbed_total",
            "Pairs whose latencies do not count, since others came meanwhile",
            registry=self.registry,
        )
        self._comparison_skipped_total = Counter(
            "int8qa_comparison_skipped_total",
            "Sampled questions that were not asked again",
            ("reason",),
            registry=self.registry,
        )
        self._comparison_busy_seconds_total = Counter(
            "int8qa_comparison_busy_seconds_total",
            "Wall time spent on asking again; its rate is the share of capacity",
            registry=self.registry,
        )
        self._guard_tripped = Gauge(
            "int8qa_guard_tripped",
            "1 while INT8 agrees too seldom with FP16, else 0",
            registry=self.registry,
        )
        self._serving_precision = Gauge(
            "int8qa_serving_precision",
            "1 for the precision of requests that name none, else 0",
            ("precision",),
            registry=self.registry,
        )
        self._diversions_total = Counter(
            "int8qa_diversions_total",
            "How often requests that name no precision moved to another",
            ("to",),
            registry=self.registry,
        )
        self._guard_switches_total = Counter(
            "int8qa_guard_switches_total",
            "How often the guard tripped (to fp16) and recovered (to int8); whether "
            "traffic moved, int8qa_diversions_total says",
            ("to",),
            registry=self.registry,
        )
        self._guard_agreement_threshold = Gauge(
            "int8qa_guard_agreement_threshold",
            "Share of equal answers below which the guard trips",
            registry=self.registry,
        )
        self._model_info = Gauge(
            "int8qa_model_info",
            "Always 1; the labels say what is served",
            ("precision", "engine", "checkpoint", "calibrator", "recipe"),
            registry=self.registry,
        )
        self._model_f1 = Gauge(
            "int8qa_model_f1",
            "F1 of the model at build, 0 to 100",
            ("precision",),
            registry=self.registry,
        )
        self._model_ready = Gauge(
            "int8qa_model_ready",
            "1 while the model answers probes and agrees with the contract, else 0",
            ("precision",),
            registry=self.registry,
        )
        self._tritons = Gauge(
            "int8qa_tritons",
            "Tritons behind the gateway by what the last probe found, if several",
            ("precision", "state"),
            registry=self.registry,
        )
        self._key_requests_total = Counter(
            "int8qa_key_requests_total",
            "Requests that need an API key, by the key's name and what became of them",
            ("key", "result"),
            registry=self.registry,
        )
        self._key_file_sound = Gauge(
            "int8qa_key_file_sound",
            "0 while the file of API keys is unusable and the keys before hold, else 1",
            registry=self.registry,
        )
        self._key_file_sound.set(1)
        self._queued: dict[Precision, int] = {}
        self._requests: dict[tuple[str, str, str], Histogram] = {}
        self._stages: dict[Precision, tuple[tuple[str, Histogram], ...]] = {}
        self._batches: dict[Precision, _BatchMetrics] = {}

        self._comparison_speedup_ratio.set(float("nan"))
        self._comparison_agreement_ratio.set(float("nan"))
        for agreement in ("same", "different", "error"):
            self._comparisons_total.labels(agreement)
        for reason in SKIP_REASONS:
            self._comparison_skipped_total.labels(reason)
        for fit in (Precision.INT8, Precision.FP16):
            self._guard_switches_total.labels(fit.value)
            self._comparison_latency_seconds.labels(fit.value)
        self.show_contract(contract)

    def show_contract(self, contract: Contract) -> None:
        """Say what is served, and no longer what was before."""
        self._precisions = tuple(contract.models)
        self._guard_tripped.set(0)
        for of_model in (
            self._model_info,
            self._model_f1,
            self._model_ready,
            self._serving_precision,
            self._tritons,
        ):
            of_model.clear()
        for precision, model in contract.models.items():
            self._model_info.labels(
                precision=precision.value,
                engine=model.engine,
                checkpoint=contract.checkpoint,
                calibrator=model.calibrator,
                recipe=model.recipe,
            ).set(1)
            if model.f1 is not None:
                self._model_f1.labels(precision.value).set(model.f1)
            self._model_ready.labels(precision.value).set(0)
            self._diversions_total.labels(precision.value)
            # Kept: looking a child up by its labels costs more than observing.
            self._stages[precision] = tuple(
                (stage, self._stage_seconds.labels(stage, precision.value))
                for stage in STAGES
            )
            self._batches[precision] = _BatchMetrics(
                self._batch_windows.labels(precision.value),
                self._batch_padding_ratio.labels(precision.value),
                self._batch_tokens_total.labels(precision.value),
                self._batch_padding_tokens_total.labels(precision.value),
            )

    def declare_reasons(self, reasons: frozenset[str]) -> None:
        """Show every reason for a refusal from the start, at zero."""
        for reason in sorted(reasons):
            self._rejected_total.labels(reason)

    # The batchers' observer.

    def on_queue(self, precision: Precision, windows: int) -> None:
        self._queued[precision] = windows
        self._queue_windows.set(sum(self._queued.values()))

    def on_batch(
        self, precision: Precision, windows: int, tokens: int, padding_tokens: int
    ) -> None:
        batches = self._batches[precision]
        batches.windows.observe(windows)
        batches.padding_ratio.observe(padding_tokens / tokens)
        batches.tokens.inc(tokens)
        batches.padding_tokens.inc(padding_tokens)

    # The shadow's observer.

    def on_skip(self, reason: str) -> None:
        self._comparison_skipped_total.labels(reason).inc()

    def on_replay(self, busy_s: float) -> None:
        self._comparison_busy_seconds_total.inc(busy_s)

    # The edges of a request.

    def observe_request(self, record: RequestRecord, seconds: float) -> None:
        labels = record.route, record.precision, record.outcome
        histogram = self._requests.get(labels)
        if histogram is None:
            histogram = self._requests[labels] = self._request_seconds.labels(*labels)
        histogram.observe(seconds)

    def observe_stages(self, precision: Precision, stages: StageSeconds) -> None:
        for stage, histogram in self._stages[precision]:
            histogram.observe(getattr(stages, stage))

    def observe_pair(self, pair: Pair) -> None:
        self._comparisons_total.labels("same" if pair.agreed else "different").inc()
        # The trace of a dispute leads to the log line of its request.
        exemplar = {
            "request_id": pair.request_id[:_MAX_EXEMPLAR_CHARS],
            "windows": str(pair.windows),
            "context_chars": str(pair.context_chars),
        }
        self._comparison_score_deviation.observe(
            pair.score_deviation, exemplar=None if pair.agreed else exemplar
        )
        if not pair.undisturbed:
            self._comparison_disturbed_total.inc()
            return
        seconds = {Precision.INT8: pair.int8_s, Precision.FP16: pair.fp16_s}
        for precision, value in seconds.items():
            self._comparison_latency_seconds.labels(precision.value).observe(value)

    def count_guard_switch(self, *, tripped: bool) -> None:
        fit = Precision.FP16 if tripped else Precision.INT8
        self.set_guard(tripped=tripped)
        if self._leads:
            self._guard_switches_total.labels(fit.value).inc()

    def set_guard(self, *, tripped: bool) -> None:
        self._guard_tripped.set(1 if tripped else 0)

    def set_serving(self, serving: Precision) -> None:
        for precision in self._precisions:
            self._serving_precision.labels(precision.value).set(precision is serving)

    def count_tritons(self, precision: Precision, serving: int, left_out: int) -> None:
        self._tritons.labels(precision.value, "serving").set(serving)
        self._tritons.labels(precision.value, "left_out").set(left_out)

    def count_diversion(self, serving: Precision) -> None:
        if self._leads:
            self._diversions_total.labels(serving.value).inc()

    def set_guard_threshold(self, agreement: float) -> None:
        self._guard_agreement_threshold.set(agreement)

    def count_comparison_error(self) -> None:
        self._comparisons_total.labels("error").inc()

    def count_rejection(self, reason: str) -> None:
        self._rejected_total.labels(reason).inc()

    def count_key_request(self, key: str | None, result: str) -> None:
        self._key_requests_total.labels(key or NO_KEY, result).inc()

    def set_key_file(self, *, sound: bool) -> None:
        self._key_file_sound.set(1 if sound else 0)

    def set_inflight(self, requests: int) -> None:
        self._inflight_requests.set(requests)

    def set_model_ready(self, precision: Precision, *, ready: bool) -> None:
        self._model_ready.labels(precision.value).set(1 if ready else 0)

    def read_comparison(self, window: ComparisonWindow) -> None:
        """Read speed-up and agreement at each scrape from where they are kept."""

        def show(gauge: Gauge, read: Callable[[], float | None]) -> None:
            def read_or_nan() -> float:
                value = read()
                return float("nan") if value is None else value

            gauge.set_function(read_or_nan)

        show(self._comparison_speedup_ratio, window.speedup)
        show(self._comparison_agreement_ratio, window.agreement)

    def render(
        self, accept: str = "", merged: MergedRegistry | None = None
    ) -> tuple[bytes, str]:
        """The metrics and their media type: OpenMetrics where ``accept`` asks for it.

        Only OpenMetrics has exemplars. ``merged``: of all processes, instead of ours.
        """
        encode, media_type = choose_encoder(accept)
        return encode(merged or self.registry), media_type
