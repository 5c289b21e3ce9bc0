"""The verdict's ruling, and what a build shows where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from int8qa.build.report import BuildProgress, show_manifest, write_verdict


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_int8_wins() -> None:
    """Faster than every float at every shape: INT8 it is, with both ratios."""
    recommended, sentence = write_verdict(
        {
            "1x128": {"int8": 10.0, "fp16": 30.0, "fp32": 40.0},
            "8x128": {"int8": 50.0, "fp16": 100.0, "fp32": 200.0},
        },
        0.9987,
        0.004,
    )
    assert recommended == "int8"
    assert sentence == (
        "Verdict: INT8 is faster than every float here (speed of INT8: 1x128 3.00 × "
        "FP16; 8x128 2.00 × FP16) and keeps 99.87 ± 0.40 % of FP32's F1; recommended: "
        "int8."
    )


def test_int8_loses_at_one_shape() -> None:
    """One shape lost is no recommendation; the float with the least total is."""
    recommended, sentence = write_verdict(
        {
            "1x128": {"int8": 10.0, "fp16": 9.0, "fp32": 40.0},
            "8x128": {"int8": 50.0, "fp16": 100.0, "fp32": 200.0},
        },
        1.0,
        0.0,
    )
    assert recommended == "fp16"
    assert "INT8 does not pay at every shape here" in sentence
    assert "1x128 0.90 × FP16" in sentence


def test_a_tie_is_no_gain() -> None:
    """As fast as float is not faster: then the exact one is the better one."""
    recommended, _ = write_verdict(
        {"1x128": {"int8": 10.0, "fp16": 12.0, "fp32": 10.0}}, 1.0, 0.0
    )
    assert recommended == "fp32"


def test_fp16_slower_than_fp32() -> None:
    """INT8 is held against the best float, not only against a slow FP16."""
    recommended, sentence = write_verdict(
        {"1x128": {"int8": 10.0, "fp16": 30.0, "fp32": 8.0}}, 0.995, 0.01
    )
    assert recommended == "fp32"
    assert "1x128 3.00 × FP16, 0.80 × FP32" in sentence
    assert sentence.endswith("keeps 99.50 ± 1.00 % of FP32's F1; recommended: fp32.")


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
        "checkpoint": {"name": "acme/reader"},
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
        "verdict": "Verdict: recommended: int8.",
    }


def test_closing_tables_fit_a_terminal() -> None:
    """A row per precision and table, uncut at 80 columns; remarks; the verdict."""
    console = Console(file=io.StringIO(), width=80)
    show_manifest(_manifest(), console=console)
    lines = shown(console).splitlines()
    assert "acme/reader on Test CPU" in lines[0]
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
        "Verdict: recommended: int8.",
    ]
