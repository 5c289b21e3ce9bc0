"""What a build shows, with and without a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from int8qa.build.report import (
    BuildProgress,
    show_comparison,
    show_findings,
    show_manifest,
    show_sensitivity,
    show_sites,
)


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_without_a_terminal() -> None:
    """One line per stage, one at each fifth, and no control characters."""
    console = make_console()
    progress = BuildProgress(2, console=console)
    with progress.stage("load [checkpoint]"):
        pass
    with progress.stage("answer", steps=20) as tick:
        for _ in range(20):
            tick()
    progress.say("a [remark]")
    assert shown(console).splitlines() == [
        "[1/2] load [checkpoint]",
        "[2/2] answer",
        *(f"      {n}/20" for n in (4, 8, 12, 16, 20)),
        "a [remark]",
    ]


def test_short_stages_show_no_fifths() -> None:
    """Under ten steps the stage's own line is enough."""
    console = make_console()
    with BuildProgress(1, console=console).stage("few", steps=9) as tick:
        for _ in range(9):
            tick()
    assert shown(console).splitlines() == ["[1/1] few"]


def test_stages_on_a_terminal() -> None:
    """On a terminal each stage leaves one line with its seconds behind."""
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, highlight=False
    )
    with BuildProgress(1, console=console).stage("load", steps=2) as tick:
        tick()
        tick()
    assert "[1/1] load: " in shown(console).splitlines()[-1]


def _manifest() -> dict[str, Any]:
    accuracy = {
        "f1": 75.256,
        "exact_match": 60.5,
        "f1_ratio": 0.9991,
        "f1_ratio_margin": 0.004,
        "agreement": 0.965,
        "max_logit_deviation": 0.4321,
    }
    return {
        "checkpoint": {"name": "acme/[reader]"},
        "device": "Test CPU",
        "latency_ms": {"1x128": {"int8": 10.04, "fp32": 20.06}},
        "models": {
            name: {
                "accuracy": accuracy,
                "execution": execution,
                "size_bytes": size,
            }
            for name, execution, size in (
                ("int8", "i8+f16", 23e6),
                ("fp32", "f32", 90e6),
            )
        },
        "remarks": ["Test CPU has no [f16] kernels"],
        "verdict": "Recommended [default]: INT8.",
    }


def test_closing_tables_fit_a_terminal() -> None:
    """A row per precision and table, uncut at 80 columns; remarks; the verdict."""
    console = Console(file=io.StringIO(), width=80)
    show_manifest(_manifest(), console=console)
    lines = shown(console).splitlines()
    assert "acme/[reader] on Test CPU" in lines[0]
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│ int8")
    ]
    assert rows == [
        ["int8", "75.26", "60.50", "99.91 ± 0.40 %", "96.5 %", "0.432"],
        ["int8", "i8+f16", "23", "10.0"],
    ]
    assert lines[-2:] == [
        "note: Test CPU has no [f16] kernels",
        "Verdict: Recommended [default]: INT8.",
    ]


def read_rows(console: Console) -> list[list[str]]:
    """The cells of every row of every table shown, headings left out."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in shown(console).splitlines()
        if line.startswith("│")
    ]


def read_headings(console: Console) -> list[str]:
    line = next(line for line in shown(console).splitlines() if line.startswith("┃"))
    return [cell.strip() for cell in line.strip("┃").split("┃")]


def _float(p50: tuple[float, float], **others: Any) -> dict[str, Any]:
    return {
        "f1": 70.0,
        "exact_match": 57.25,
        "f1_ratio": 1.0,
        "agreement_fp32": 1.0,
        "rms_logit_error": 0.0,
        "size_bytes": 90e6,
        "execution": "f32",
        "latency_ms": {
            shape: {"p50": time, "p99": 2 * time}
            for shape, time in zip(("1x128", "8x128"), p50, strict=True)
        },
        **others,
    }


def _variant(
    calibrator: str, smooth: bool, p50: float, **others: Any
) -> dict[str, Any]:
    return {
        "recipe": "linear",
        "calibrator": calibrator,
        "smooth": smooth,
        "label": calibrator + (" + SmoothQuant" if smooth else ""),
        "f1": 69.4,
        "exact_match": 57.0,
        "f1_ratio": 0.9969,
        "f1_ratio_margin": 0.002,
        "agreement_fp32": 0.921,
        "agreement_fp16": 0.918,
        "rms_logit_error": 0.1234,
        "max_logit_deviation": 2.1,
        "latency_ms": {
            "1x128": {"p50": p50, "p99": 7.0, "p50_fp16": 10.0},
            "8x128": {"p50": 4 * p50, "p99": 30.0, "p50_fp16": 80.0},
        },
        "size_bytes": 59e6,
        "execution": "i8+bf16",
        "quantized_gemms": 36,
        "passes_gate": True,
        "pareto": True,
        **others,
    }


def _unit(name: str, error: float) -> dict[str, Any]:
    finding = {"rms_logit_error": error, "f1_ratio": 0.985, "agreement_fp32": 0.75}
    return {
        "name": name,
        "layer": 3,
        "kernel": "ffn_out",
        "tensor_class": None,
        "group": "kernel",
        "only": finding,
        "all_but": {**finding, "rms_logit_error": 0.5},
    }


def _sensitivity(count: int) -> dict[str, Any]:
    return {
        "recipe": "my [own]",
        "calibrator": "search",
        "smooth": False,
        "questions": 200,
        "units": [_unit(f"layer {n} ffn_out", 1.0 / (n + 1)) for n in range(count)],
    }


def _comparison(**others: Any) -> dict[str, Any]:
    return {
        "provenance": {
            "checkpoint": "acme/[reader]",
            "device": "Test CPU",
            "questions": 1000,
            "data": "dev.json",
            "seconds": 512.3,
        },
        "floats": {
            "fp32": _float((20.0, 160.0)),
            "fp16": _float((10.0, 80.0), execution="bf16", f1_ratio=1.0012),
        },
        "variants": [
            _variant("search", False, 5.0, recipe="my [own]", passes_gate=False),
            _variant("search", True, 4.0),
            _variant("max", False, 10.0),
        ],
        "sensitivity": None,
        "best": {"recipe": "linear", "calibrator": "search", "smooth": True},
        "verdict": "INT8 [default] is best.",
        **others,
    }


def test_comparison() -> None:
    """Floats first, then every variant; speed by the FP16 timed beside it."""
    console = make_console()
    show_comparison(_comparison(), console=console)
    assert "acme/[reader] on Test CPU: 1000 questions of dev.json" in shown(console)
    assert read_headings(console) == [
        *("recipe", "calibrator", "F1", "EM", "of FP32's F1", "same as FP16"),
        *("RMS |Δ|", "1x128 ms", "8x128 ms", "× FP16", "MB", "gate"),
    ]
    start = ["69.40", "57.00", "99.69 ± 0.20 %", "91.8 %", "0.123"]
    fp32 = ["70.00", "57.25", "100.00 %", "", "0.000"]
    fp16 = ["70.00", "57.25", "100.12 %", "", "0.000"]
    smooth = "→ search + SmoothQuant"
    assert read_rows(console) == [
        ["fp32", "(f32)", *fp32, "20.0", "160.0", "0.50", "90", ""],
        ["fp16", "(bf16)", *fp16, "10.0", "80.0", "1.00", "90", ""],
        ["my [own]", "search", *start, "5.0", "20.0", "2.83", "59", "FAILS"],
        ["linear", smooth, *start, "4.0", "16.0", "3.54", "59", "passes"],
        ["linear", "max", *start, "10.0", "40.0", "1.41", "59", "passes"],
    ]
    assert shown(console).splitlines()[-2:] == [
        "Verdict: INT8 [default] is best.",
        "512 s",
    ]


def test_comparison_with_sensitivity() -> None:
    """Only the worst ten units follow: the page has all."""
    console = make_console()
    show_comparison(_comparison(sensitivity=_sensitivity(12)), console=console)
    assert len([row for row in read_rows(console) if "ffn_out" in row[0]]) == 10
    assert "200 questions, the first 10 of 12" in shown(console)


def test_sensitivity() -> None:
    """In the order given; both ways beside each other."""
    console = make_console()
    show_sensitivity(_sensitivity(3), console=console)
    both = ["98.50 %", "75.0 %"]
    assert read_rows(console) == [
        [f"layer {n} ffn_out", error, *both, "0.500", *both]
        for n, error in enumerate(("1.000", "0.500", "0.333"))
    ]
    assert shown(console).splitlines()[0].strip() == (
        "sensitivity of my [own] (search), 200 questions"
    )
    console = make_console()
    show_sensitivity(_sensitivity(3), limit=2, console=console)
    assert len(read_rows(console)) == 2
    assert "the first 2 of 3" in shown(console)


def test_sites() -> None:
    """A row per tensor; outside of the layers the number is missing, not None."""
    console = make_console()
    rows = [
        {"layer": None, "class": "embedding_weight", "quantizer": "e", "grid": "float"},
        {"layer": 0, "class": "qkv_input", "quantizer": "layer[0].q", "grid": "INT8"},
    ]
    show_sites(rows, title="acme/[reader], linear", console=console)
    assert read_headings(console) == ["layer", "class", "quantizer", "grid"]
    assert read_rows(console) == [
        ["", "embedding_weight", "e", "float"],
        ["0", "qkv_input", "layer[0].q", "INT8"],
    ]
    assert "acme/[reader], linear" in shown(console)


def test_tables_go_to_standard_output_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal nothing is wrapped to 80 columns."""
    show_comparison(_comparison(sensitivity=_sensitivity(1)))
    captured = capsys.readouterr()
    assert "→ search + SmoothQuant" in captured.out
    assert "99.69 ± 0.20 %" in captured.out
    assert not captured.err


def test_engines_that_were_not_run() -> None:
    """Without times the table says so, and has no column for any."""
    console = make_console()
    manifest = _manifest() | {"latency_ms": {}}
    show_manifest(manifest, console=console)
    assert "engines, not run here" in shown(console)
    assert "milliseconds" not in shown(console)


def test_findings() -> None:
    """A line each as it stands, or the word that there are none."""
    console = make_console()
    show_findings(["a/[b]: rule", "c: rule"], console=console)
    assert shown(console).splitlines() == [
        "2 places may keep TensorRT from fusing:",
        *("a/[b]: rule", "c: rule"),
    ]
    console = make_console()
    show_findings([], console=console)
    assert shown(console).startswith("Nothing in the graph is known to keep TensorRT")
