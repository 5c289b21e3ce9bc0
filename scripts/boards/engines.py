"""Rows of *Operations* below the gateway: batches, Triton, machines, GPUs.

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
)


def list_batches() -> list[Placed]:
    return [
        draw_lines(
            "Queue and requests in flight",
            "Windows that wait for a batch, and accepted requests not yet answered. A "
            "queue that never empties means that more comes than is done.",
            [
                Query("sum(int8qa_queue_windows)", "windows waiting"),
                Query("sum(int8qa_inflight_requests)", "requests in flight"),
            ],
            unit="short",
            columns=6,
        ),
        draw_lines(
            "Batch fill",
            "Windows in a batch, on average. 1 under light load is right: an idle "
            "engine waits for no company. Under heavy load it should rise.",
            [
                Query(
                    "sum by (precision) "
                    "(rate(int8qa_batch_windows_sum[$__rate_interval])) "
                    "/ sum by (precision) "
                    "(rate(int8qa_batch_windows_count[$__rate_interval]))",
                    "{{precision}}",
                )
            ],
            unit="short",
            columns=6,
        ),
        draw_lines(
            "Padding waste",
            "Share of the tokens computed that is padding. Short lone questions pad to "
            "the next length of the contract; mixed lengths in one batch pad more.",
            [
                Query(
                    "sum by (precision) "
                    "(rate(int8qa_batch_padding_tokens_total[$__rate_interval])) "
                    "/ sum by (precision) "
                    "(rate(int8qa_batch_tokens_total[$__rate_interval]))",
                    "{{precision}}",
                )
            ],
            unit="percentunit",
            columns=6,
            largest=1,
        ),
        draw_heatmap(
            "Batch sizes",
            "Windows in a batch, as they are spread, all precisions.",
            Query(
                "sum by (le) (increase(int8qa_batch_windows_bucket[$__rate_interval]))",
                "{{le}}",
            ),
            unit="short",
            columns=6,
            scheme="Purples",
        ),
    ]


def list_triton() -> list[Placed]:
    parts = (
        ("queue", "queue"),
        ("compute_input", "input"),
        ("compute_infer", "inference"),
        ("compute_output", "output"),
    )
    return [
        *[
            draw_lines(
                f"{model_name}: mean time in Triton",
                f"Where a request to {model_name} spends its time inside Triton, on "
                "average; Triton tells no percentiles. Its queue should be near zero: "
                "waiting is the gateway's business. Builds after the first are called "
                f"{model_name}_2 and so on.",
                [
                    Query(
                        f"sum(rate(nv_inference_{part}_duration_us{builds})) / 1e6 "
                        f"/ sum(rate(nv_inference_request_success{builds}))",
                        legend,
                    )
                    for part, legend in parts
                ],
                unit="s",
                columns=8,
                stacked=True,
            )
            for model_name in ("qa_int8", "qa_fp16")
            for builds in (f'{{model=~"{model_name}(_[0-9]+)?"}}[$__rate_interval]',)
        ],
        draw_lines(
            "Executions and windows",
            "Batches that Triton ran and windows in them, per second. Windows over "
            "executions is the batch as the engine saw it.",
            [
                Query(
                    "sum by (model) (rate(nv_inference_exec_count[$__rate_interval]))",
                    "{{model}} executions",
                ),
                Query(
                    "sum by (model) (rate(nv_inference_count[$__rate_interval]))",
                    "{{model}} windows",
                ),
            ],
            unit="ops",
            columns=8,
        ),
        draw_lines(
            "Batch as the engine saw it",
            "Windows per execution, five minutes. Above the gateway's batch fill, "
            "Triton merged batches of several gateways.",
            [
                Query(
                    "max by (model) (job_model:nv_inference_batch_windows:mean_rate5m)",
                    "{{model}}",
                )
            ],
            unit="short",
            columns=8,
        ),
        draw_lines(
            "Pending in Triton",
            "Requests that Triton has taken and not begun. "
            "INT8QA_BATCHER__MAX_IN_FLIGHT bounds what one gateway sends.",
            [Query("sum by (model) (nv_inference_pending_request_count)", "{{model}}")],
            unit="short",
            columns=8,
        ),
        draw_lines(
            "Failures by reason",
            "Requests that failed in Triton, per second. BACKEND is the engine's own "
            "error: look into Triton's log. CANCELED are clients that left.",
            [
                Query(
                    "sum by (model, reason) "
                    "(rate(nv_inference_request_failure[$__rate_interval]))",
                    "{{model}} {{reason}}",
                )
            ],
            unit="ops",
            columns=8,
        ),
    ]


def list_machines() -> list[Placed]:
    return [
        draw_lines(
            "Gateway: CPU",
            "Cores the gateway's process keeps busy. It is one process: near 1, "
            "tokenizing and HTTP have become the bottleneck.",
            [
                Query(
                    'rate(process_cpu_seconds_total{job="gateway"}[$__rate_interval])',
                    "{{instance}}",
                )
            ],
            unit="suffix: cores",
            columns=6,
            steps=((None, GREEN), (1, RED)),
        ),
        draw_lines(
            "Gateway: memory",
            "Resident memory of the gateway's process.",
            [
                Query(
                    'process_resident_memory_bytes{job="gateway"}',
                    "{{instance}}",
                )
            ],
            unit="bytes",
            columns=6,
        ),
        draw_lines(
            "Triton's machine: CPU",
            "Share of all cores in use on the machine, as Triton sees it.",
            [Query("nv_cpu_utilization", "{{instance}}")],
            unit="percentunit",
            columns=6,
            largest=1,
        ),
        draw_lines(
            "Triton's machine: memory",
            "Memory in use on the machine, and all there is.",
            [
                Query("nv_cpu_memory_used_bytes", "{{instance}} used"),
                Query("nv_cpu_memory_total_bytes", "{{instance}} total"),
            ],
            unit="bytes",
            columns=6,
        ),
    ]


def list_gpus() -> list[Placed]:
    return [
        draw_lines(
            "GPU utilization",
            "Share of the time in which the GPU ran anything.",
            [Query("nv_gpu_utilization", "{{gpu_uuid}}")],
            unit="percentunit",
            columns=8,
            largest=1,
        ),
        draw_lines(
            "GPU memory",
            "GPU memory in use, and all there is.",
            [
                Query("nv_gpu_memory_used_bytes", "{{gpu_uuid}} used"),
                Query("nv_gpu_memory_total_bytes", "{{gpu_uuid}} total"),
            ],
            unit="bytes",
            columns=8,
        ),
        draw_lines(
            "GPU power",
            "Power drawn, and the limit at which the GPU slows down.",
            [
                Query("nv_gpu_power_usage", "{{gpu_uuid}} drawn"),
                Query("nv_gpu_power_limit", "{{gpu_uuid}} limit"),
            ],
            unit="watt",
            columns=8,
        ),
    ]
