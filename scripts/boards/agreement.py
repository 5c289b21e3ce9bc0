"""Rows of *INT8 against FP16* about answers: agreement, guard, sampling.

In: nothing. Out: panels; the board puts them in their order.
"""

from __future__ import annotations

from boards.panels import (
    GREEN,
    RED,
    Placed,
    Query,
    draw_heatmap,
    draw_lines,
    draw_states,
)

PAIRS = 'int8qa_comparisons_total{agreement=~"same|different"}'
GUARD_WORDS = {"0": ("agrees", GREEN), "1": ("tripped", RED)}


def list_answers() -> list[Placed]:
    return [
        draw_lines(
            "Agreement and threshold",
            "Share of the pairs with the same answer, beside the threshold below which "
            "the guard trips.",
            [
                Query(
                    'sum(rate(int8qa_comparisons_total{agreement="same"}[$window])) '
                    f"/ sum(rate({PAIRS}[$window]))",
                    "agreement",
                ),
                Query("avg(int8qa_comparison_agreement_ratio >= 0)", "recent window"),
                Query("max(int8qa_guard_agreement_threshold)", "guard trips below"),
            ],
            unit="percentunit",
            columns=8,
            largest=1,
        ),
        draw_heatmap(
            "Score deviation",
            "How far INT8's score of its best answer lies from FP16's, over "
            "all pairs. Dots are pairs that disagreed; their request_id is in the log.",
            Query(
                "sum by (le) (increase(int8qa_comparison_score_deviation_bucket"
                "[$__rate_interval]))",
                "{{le}}",
                exemplars=True,
            ),
            unit="none",
            columns=8,
            scheme="Oranges",
        ),
        draw_lines(
            "Score deviation: mean and p95",
            "Mean and 95th percentile of the same deviation. It grows before answers "
            "begin to differ.",
            [
                Query(
                    "sum(rate(int8qa_comparison_score_deviation_sum[$window])) "
                    "/ sum(rate(int8qa_comparison_score_deviation_count[$window]))",
                    "mean",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) "
                    "(rate(int8qa_comparison_score_deviation_bucket[$window])))",
                    "p95",
                ),
            ],
            unit="none",
            columns=8,
        ),
    ]


def list_sampling() -> list[Placed]:
    return [
        draw_states(
            "Guard",
            "When each gateway's guard was tripped.",
            [Query("max by (instance) (int8qa_guard_tripped)", "{{instance}}")],
            columns=6,
            words=GUARD_WORDS,
        ),
        draw_lines(
            "Guard switches",
            "How often the guard moved traffic, or would have: to fp16 when it trips, "
            "to int8 when it recovers.",
            [
                Query(
                    "sum by (to) (increase(int8qa_guard_switches_total[$window]))",
                    "to {{to}}",
                )
            ],
            unit="short",
            columns=6,
        ),
        draw_lines(
            "Pairs by outcome",
            "Questions asked of both precisions, by whether the answers agreed, and "
            "those of them whose latencies do not count because others came meanwhile.",
            [
                Query(
                    "sum by (agreement) (rate(int8qa_comparisons_total[$window]))",
                    "{{agreement}}",
                ),
                Query(
                    "sum(rate(int8qa_comparison_disturbed_total[$window]))", "disturbed"
                ),
            ],
            unit="ops",
            columns=6,
        ),
        draw_lines(
            "Sampled but not asked again",
            "busy: no quiet moment came in time. capacity: the allowed share is used. "
            "too_long: more windows than INT8QA_COMPARISON__MAX_WINDOWS.",
            [
                Query(
                    "sum by (reason) (rate(int8qa_comparison_skipped_total[$window]))",
                    "{{reason}}",
                )
            ],
            unit="ops",
            columns=6,
        ),
        draw_lines(
            "Share of time spent on comparing",
            "Wall time of replays per second, for each gateway. "
            "INT8QA_COMPARISON__CAPACITY_SHARE bounds it; the dashed line is the "
            "default, 5 %.",
            [
                Query(
                    "sum by (instance) "
                    "(rate(int8qa_comparison_busy_seconds_total[$window]))",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            columns=24,
            steps=((None, GREEN), (0.05, RED)),
        ),
    ]
