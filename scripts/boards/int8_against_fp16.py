"""The board *INT8 against FP16*: what INT8 gains here, and what it costs.

In: nothing. Out: a dashboard. Speed is judged by pairs alone, one question asked of
both precisions; requests of either precision differ in what they ask.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.models import dashboard as model

from boards.agreement import GUARD_WORDS, PAIRS, list_answers, list_sampling
from boards.layout import Row, annotate, place_panels
from boards.panels import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    Placed,
    Query,
    draw_bars,
    draw_heatmap,
    draw_lines,
    list_labels,
    show_value,
)

UID = "int8qa-precision"
FILENAME = "int8-against-fp16.json"

SINGLE = 'outcome="ok",precision!="none",route=~"/|/v1/answer|/models/.*"'
FASTER = ((None, RED), (1, YELLOW), (1.2, GREEN))
AGREEING = ((None, RED), (0.8, YELLOW), (0.85, GREEN))


def build_board() -> boards.Dashboard:
    """Build the board."""
    board = (
        boards.Dashboard("int8qa: INT8 against FP16")
        .uid(UID)
        .description(
            "Latency of both precisions over the same questions, the speed-up, the "
            "agreement of their answers and the guard. See docs/operations.md."
        )
        .tags(["int8qa"])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .with_variable(
            boards.CustomVariable("window")
            .label("averaged over")
            .description(
                "How much time one point of a line looks back on. Pairs are few: a "
                "short span is ragged, a long one late."
            )
            .values("1m,5m,15m,1h,6h")
            .current(model.VariableOption(selected=True, text="5m", value="5m"))
        )
        .annotation(
            annotate(
                "guard trips or recovers",
                "sum by (instance) (changes(int8qa_guard_tripped[1m])) > 0",
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
            boards.DashboardLink("Operations")
            .type(model.DashboardLinkType.LINK)
            .url("/d/int8qa-operations")
            .keep_time(True)
        )
    )
    return place_panels(board, _list_rows())


def _list_rows() -> list[Row]:
    return [
        Row("At a glance", 4, _glance()),
        Row("Speed-up and quality", 8, _speedup()),
        Row("Like with like: undisturbed pairs, inference alone", 8, _paired()),
        Row("All requests, queueing and everything", 8, _requests()),
        Row("Answers", 8, list_answers()),
        Row("Guard and sampling", 7, list_sampling()),
    ]


def _glance() -> list[Placed]:
    medians = [
        show_value(
            f"{name} median",
            f"Median inference time of {name}, undisturbed pairs of half an hour.",
            Query(
                "job_precision:int8qa_comparison_latency_seconds:p50_rate30m"
                f'{{precision="{precision}"}}',
                precision,
            ),
            unit="s",
            columns=3,
            empty="no pairs",
        )
        for name, precision in (("INT8", "int8"), ("FP16", "fp16"))
    ]
    return [
        show_value(
            "Speed-up",
            "Median of FP16 time / INT8 time over the gateway's recent undisturbed "
            "pairs. Below 1 INT8 is slower and gives nothing for its loss.",
            Query("job:int8qa_comparison_speedup:avg", "speed-up"),
            unit="suffix: ×",
            columns=4,
            steps=FASTER,
            decimals=2,
            empty="no pairs",
        ),
        *medians,
        show_value(
            "Agreement",
            "Share of the recent pairs with the same answer. Colours are the guard's "
            "default thresholds: it trips below 80 % and recovers at 85 %.",
            Query("avg(int8qa_comparison_agreement_ratio >= 0)", "agreement"),
            unit="percentunit",
            columns=3,
            steps=AGREEING,
            decimals=1,
            empty="no pairs",
        ),
        show_value(
            "F1, INT8 against FP16",
            "Points of F1 that INT8 gained or lost at build, on one checkpoint and one "
            "set of questions. The build's gate allows a loss of 1 %.",
            Query(
                'avg(int8qa_model_f1{precision="int8"}) '
                '- avg(int8qa_model_f1{precision="fp16"})',
                "F1 points",
            ),
            unit="none",
            columns=4,
            steps=((None, RED), (-1, YELLOW), (-0.5, GREEN)),
            decimals=2,
        ),
        show_value(
            "Guard",
            "Whether INT8 still gives FP16's answers, over the guard's recent pairs. "
            "With the guard set to fallback, tripped means that FP16 serves.",
            Query("max(int8qa_guard_tripped)", "guard"),
            unit="none",
            columns=3,
            words=GUARD_WORDS,
        ),
        show_value(
            "Pairs",
            "Questions asked of both precisions in the time shown at the top right.",
            Query(f"sum(increase({PAIRS}[$__range]))", "pairs"),
            unit="short",
            columns=4,
            decimals=0,
        ),
    ]


def _speedup() -> list[Placed]:
    return [
        draw_lines(
            "Speed-up over time",
            "FP16 time / INT8 time of undisturbed pairs: the median of each pair's "
            "ratio over the gateway's recent pairs, and the ratio of the means, in "
            "which long questions weigh more. The dashed line at 1 is no gain.",
            [
                Query("avg(int8qa_comparison_speedup_ratio >= 0)", "median of pairs"),
                Query(
                    "sum(rate(int8qa_comparison_latency_seconds_sum"
                    '{precision="fp16"}[$window])) '
                    "/ sum(rate(int8qa_comparison_latency_seconds_sum"
                    '{precision="int8"}[$window]))',
                    "ratio of means",
                ),
            ],
            unit="suffix: ×",
            columns=12,
            steps=((None, GREEN), (1, RED)),
        ),
        draw_bars(
            "F1 at build",
            "F1 of each model on the evaluation questions, measured by the build. The "
            "scale begins at 50: models that know little look it.",
            Query("avg by (precision) (int8qa_model_f1)", "{{precision}}"),
            unit="none",
            columns=5,
            steps=((None, RED), (70, YELLOW), (80, GREEN)),
            smallest=50,
            largest=100,
            decimals=2,
        ),
        list_labels(
            "What is served",
            "Engine, checkpoint, recipe and calibrator of each model, as the build "
            "wrote them.",
            Query(
                "max by (precision, engine, checkpoint, recipe, calibrator) "
                "(int8qa_model_info)",
                "{{precision}}",
            ),
            columns=7,
            labels=["precision", "engine", "recipe", "calibrator", "checkpoint"],
            empty="no models",
        ),
    ]


def _paired() -> list[Placed]:
    lines = [
        draw_lines(
            f"p{percentile}",
            f"{words} of the inference time of the same questions in both precisions, "
            "each alone on an idle engine. The nearer the lines, the less INT8 gains.",
            [
                Query(
                    f"histogram_quantile(0.{percentile:02d}, sum by (precision, le) "
                    "(rate(int8qa_comparison_latency_seconds_bucket[$window])))",
                    "{{precision}}",
                )
            ],
            unit="s",
            columns=8,
        )
        for percentile, words in (
            (50, "Half"),
            (95, "The slowest twentieth"),
            (99, "The slowest hundredth"),
        )
    ]
    maps = [
        draw_heatmap(
            f"{name}: distribution",
            f"Inference times of {name} over undisturbed pairs, as they lie. Two "
            "bands mean short and long questions; a rising band means a slower engine.",
            Query(
                "sum by (le) (increase(int8qa_comparison_latency_seconds_bucket"
                f'{{precision="{precision}"}}[$__rate_interval]))',
                "{{le}}",
            ),
            unit="s",
            columns=12,
            scheme=scheme,
        )
        for name, precision, scheme in (
            ("INT8", "int8", "Greens"),
            ("FP16", "fp16", "Blues"),
        )
    ]
    return [*lines, *maps]


def _requests() -> list[Placed]:
    return [
        draw_lines(
            f"p{percentile} of requests",
            f"The {percentile}th percentile of a single question's whole time in the "
            "gateway, by the precision that answered. Precisions may see unlike "
            "questions: for a fair comparison look at the pairs above.",
            [
                Query(
                    f"histogram_quantile(0.{percentile:02d}, sum by (precision, le) "
                    f"(rate(int8qa_request_seconds_bucket{{{SINGLE}}}[$window])))",
                    "{{precision}}",
                )
            ],
            unit="s",
            columns=8,
            steps=((None, GREEN), (1, RED)),
        )
        for percentile in (50, 95, 99)
    ]
