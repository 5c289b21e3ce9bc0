"""The board *Operations*: is the service well, and if not, where does it hurt.

In: nothing. Out: a dashboard, from promises (top) to causes (bottom): objectives,
traffic, stages of a request, queue and batches, Triton, machines, alerts.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.models import dashboard as model

from boards.engines import list_batches, list_gpus, list_machines, list_triton
from boards.layout import Row, annotate, place_panels
from boards.panels import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    Placed,
    Query,
    draw_heatmap,
    draw_lines,
    draw_states,
    list_labels,
    show_value,
)

UID = "int8qa-operations"
FILENAME = "operations.json"

SINGLE = 'outcome="ok",precision!="none",route=~"/|/v1/answer|/models/.*"'
UP = {"0": ("down", RED), "1": ("up", GREEN)}
READY = {"0": ("not ready", RED), "1": ("ready", GREEN)}
HEALTHY_SHARE = ((None, RED), (0.999, GREEN))


def build_board() -> boards.Dashboard:
    """Build the board."""
    board = (
        boards.Dashboard("int8qa: Operations")
        .uid(UID)
        .description(
            "Objectives, traffic, stages, batches, Triton, machines and alerts. What "
            "to do about each alert: docs/operations.md."
        )
        .tags(["int8qa"])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .annotation(
            annotate(
                "alerts",
                'sum by (alertname) (ALERTS{alertstate="firing"}) > 0',
                RED,
            )
        )
        .annotation(
            annotate(
                "gateway starts",
                'changes(process_start_time_seconds{job="gateway"}[1m]) > 0',
                BLUE,
            )
        )
        .link(
            boards.DashboardLink("INT8 against FP16")
            .type(model.DashboardLinkType.LINK)
            .url("/d/int8qa-precision")
            .keep_time(True)
        )
    )
    rows = [
        Row("At a glance", 4, _glance()),
        Row("Objectives", 8, _objectives()),
        Row("Traffic", 8, _traffic()),
        Row("Stages of a request", 8, _stages()),
        Row("Queue and batches", 8, list_batches()),
        Row("Triton's own figures", 8, list_triton()),
        Row("CPU and memory", 7, list_machines()),
        Row("GPU (empty on a CPU)", 7, list_gpus()),
        Row("Alerts", 8, _alerts()),
    ]
    return place_panels(board, rows)


def _glance() -> list[Placed]:
    return [
        show_value(
            "Gateway",
            "Whether Prometheus reaches every gateway.",
            Query('min(up{job="gateway"})', "gateway"),
            unit="none",
            columns=3,
            words=UP,
        ),
        show_value(
            "Triton",
            "Whether Prometheus reaches every Triton.",
            Query('min(up{job="triton"})', "triton"),
            unit="none",
            columns=3,
            words=UP,
        ),
        show_value(
            "Models",
            "Whether every model answers the gateway's probes and is the one of the "
            "repository's contract.",
            Query("min(int8qa_model_ready)", "models"),
            unit="none",
            columns=3,
            words=READY,
        ),
        show_value(
            "Questions",
            "Requests for answers per second, whatever their outcome.",
            Query(
                'sum(rate(int8qa_request_seconds_count{route=~"/|/v1/answers?|/models/.*"'
                "}[$__rate_interval]))",
                "questions",
            ),
            unit="reqps",
            columns=4,
        ),
        show_value(
            "p99",
            "99th percentile of a single question's time in the gateway, five minutes.",
            Query("max(job_precision:int8qa_request_seconds:p99_rate5m > 0)", "p99"),
            unit="s",
            columns=4,
            steps=((None, GREEN), (1, RED)),
            empty="no traffic",
        ),
        show_value(
            "Availability, 1 h",
            "Share of the questions in order that were answered. Promised: 99.9 %.",
            Query("1 - max(job:int8qa_requests:error_ratio_rate1h)", "availability"),
            unit="percentunit",
            columns=4,
            steps=HEALTHY_SHARE,
            decimals=2,
            empty="no traffic",
        ),
        show_value(
            "Alerts",
            "Alerts that fire now; the table at the bottom names them.",
            Query('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),
            unit="none",
            columns=3,
            steps=((None, GREEN), (1, RED)),
            decimals=0,
        ),
    ]


def _burn(kind: str, budget: str) -> list[Query]:
    return [
        Query(
            f"max(job:int8qa_requests:{kind}_ratio_rate{window}) / {budget}",
            f"over {window}",
        )
        for window in ("5m", "1h", "6h", "3d")
    ]


def _objectives() -> list[Placed]:
    steps = ((None, GREEN), (1, YELLOW), (6, "orange"), (14.4, RED))
    text = (
        "How many times faster than planned the {0} budget of {1} is spent. 1 just "
        "lasts the month; above 14.4 over an hour or 6 over six hours the fast alert "
        "fires, above 1 over three days the slow one."
    )
    return [
        draw_lines(
            "Availability: budget burn",
            text.format("error", "0.1 %"),
            _burn("error", "0.001"),
            unit="suffix: ×",
            columns=12,
            steps=steps,
        ),
        draw_lines(
            "Latency: budget burn",
            text.format("latency", "1 % slower than 1 s"),
            _burn("slow", "0.01"),
            unit="suffix: ×",
            columns=12,
            steps=steps,
        ),
    ]


def _traffic() -> list[Placed]:
    return [
        draw_lines(
            "Requests by route",
            "Requests per second by route, machines' probes left out.",
            [
                Query(
                    "sum by (route) (rate(int8qa_request_seconds_count"
                    '{route!~"/live|/ready|/metrics"}[$__rate_interval]))',
                    "{{route}}",
                )
            ],
            unit="reqps",
            columns=8,
        ),
        draw_lines(
            "Requests by outcome",
            "Requests for answers per second. invalid is the client's fault; "
            "overloaded, unavailable, bad_engine, timeout and error are ours.",
            [
                Query(
                    "sum by (outcome) (rate(int8qa_request_seconds_count"
                    '{route=~"/|/v1/answers?|/models/.*"}[$__rate_interval]))',
                    "{{outcome}}",
                )
            ],
            unit="reqps",
            columns=8,
            stacked=True,
        ),
        draw_lines(
            "Refused questions by reason",
            "Questions refused per second; each item of a batch counts one. queue_full "
            "and overloaded mean more load than capacity.",
            [
                Query(
                    "sum by (reason) (rate(int8qa_rejected_total[$__rate_interval]))",
                    "{{reason}}",
                )
            ],
            unit="ops",
            columns=8,
        ),
        draw_lines(
            "Latency of single questions",
            "Percentiles of the time from a request's head to the end of its response, "
            "all precisions. The dashed line is the promise: 1 s.",
            [
                Query(
                    f"histogram_quantile({quantile}, sum by (le) "
                    f"(rate(int8qa_request_seconds_bucket{{{SINGLE}}}"
                    "[$__rate_interval])))",
                    name,
                )
                for quantile, name in (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))
            ],
            unit="s",
            columns=12,
            steps=((None, GREEN), (1, RED)),
        ),
        draw_heatmap(
            "Latency of single questions: distribution",
            "How the same times are spread. Separate bands are separate kinds of "
            "question: short ones and documents.",
            Query(
                f"sum by (le) (increase(int8qa_request_seconds_bucket{{{SINGLE}}}"
                "[$__rate_interval]))",
                "{{le}}",
            ),
            unit="s",
            columns=12,
            scheme="Blues",
        ),
    ]


def _stages() -> list[Placed]:
    mean = (
        'sum by (stage) (rate(int8qa_stage_seconds_sum{{precision="{0}"}}'
        "[$__rate_interval])) / sum by (stage) "
        '(rate(int8qa_stage_seconds_count{{precision="{0}"}}[$__rate_interval]))'
    )
    return [
        *[
            draw_lines(
                f"{precision.upper()}: mean time by stage",
                f"What an answer in {precision.upper()} spends where, on average; the "
                "stages follow each other, so their sum is the whole. A growing queue "
                "wants capacity, a growing inference a look at the engine.",
                [Query(mean.format(precision), "{{stage}}")],
                unit="s",
                columns=8,
                stacked=True,
            )
            for precision in ("int8", "fp16")
        ],
        draw_lines(
            "Slowest twentieth of each stage",
            "95th percentile by stage and precision, over five minutes.",
            [
                Query(
                    "max by (precision, stage) "
                    "(job_stage_precision:int8qa_stage_seconds:p95_rate5m)",
                    "{{stage}} {{precision}}",
                )
            ],
            unit="s",
            columns=8,
            logarithmic=True,
        ),
    ]


def _alerts() -> list[Placed]:
    return [
        list_labels(
            "Alerts, now",
            "pending waits for its time, firing does not. Meaning and first actions: "
            "docs/operations.md.",
            Query("ALERTS", "{{alertname}}"),
            columns=12,
            labels=["alertname", "alertstate", "severity", "instance", "precision"],
            empty="no alerts",
        ),
        draw_states(
            "Alerts, over time",
            "When each alert fired; a gap is a time without it.",
            [
                Query(
                    'max by (alertname) (ALERTS{alertstate="firing"})', "{{alertname}}"
                )
            ],
            columns=12,
            words={"1": ("fires", RED)},
            empty="no alerts",
        ),
    ]
