"""The table of variants: what a calibrator comparison measured, row by row.

In: the result of ``int8qa calibrate-compare``. Out: texts, with what to sort them by.
"""

from __future__ import annotations

from dataclasses import dataclass

from int8qa.build.comparison.pareto import mean_speed, shape_speed
from int8qa.build.comparison.parts import Json, format_number, format_percent


@dataclass(frozen=True)
class Cell:
    """One cell of the table of variants."""

    text: str
    detail: str = ""
    sort: float | str | None = None
    verdict: str = ""
    """``passes`` or ``fails`` in the cell of the gate."""


@dataclass(frozen=True)
class Row:
    """One line of the table of variants."""

    name: str
    cells: tuple[Cell, ...]
    best: bool = False
    pareto: bool = False
    fails: bool = False


def find_best(result: Json) -> Json | None:
    """The variant that the result calls best; None if it names none."""
    keys = ("recipe", "calibrator", "smooth")
    best = result.get("best") or {}
    for variant in result["variants"]:
        if best and all(variant[key] == best.get(key) for key in keys):
            found: Json = variant
            return found
    return None


def list_columns(shapes: list[str]) -> list[dict[str, str]]:
    """Headers after the first; ``first`` is the direction of the first click."""
    up, down = "ascending", "descending"
    columns = [
        ("Recipe", up, ""),
        ("Gate", down, ""),
        ("F1", down, "share of the words found, 0-100, ± what chance explains"),
        ("EM", down, "answers found to the letter, 0-100"),
        ("% of FP32", down, "F1 as a share of FP32's"),
        ("Same as FP16", down, "share of equal answers"),
        ("Logit error", up, "root mean square against FP32"),
        *((f"{show_shape(s)} ms", up, "median / 99th percentile") for s in shapes),
        ("Speed", down, "against FP16, geometric mean of the shapes"),
        ("MB", up, ""),
    ]
    return [{"label": c, "first": first, "title": t} for c, first, t in columns]


def make_row(model: Json, result: Json, shapes: list[str]) -> Row:
    """A line of the table; floats lack most keys of a variant."""
    fp16, fp32 = result["floats"]["fp16"], result["floats"]["fp32"]
    latency = model["latency_ms"]
    margin = model.get("f1_ratio_margin")
    points = None if margin is None else margin * fp32["f1"]
    ratio = model.get("f1_ratio")
    speed = mean_speed(latency, fp16["latency_ms"])
    same = model.get("agreement_fp16")
    rms = model.get("rms_logit_error")
    passes = model.get("passes_gate")
    gate = Cell("–")
    if passes is not None:
        verdict = "passes" if passes else "fails"
        mark = "✓" if passes else "✗"
        gate = Cell(f"{mark} {verdict}", sort=int(passes), verdict=verdict)
    timings = []
    for shape in shapes:
        times = latency.get(shape) or {}
        p50, p99 = times.get("p50"), times.get("p99")
        against = shape_speed(latency, fp16["latency_ms"], shape)
        timings.append(
            Cell(f"{format_ms(p50)} / {format_ms(p99)}", format_speed(against), p50)
        )
    return Row(
        name=model.get("label", ""),
        cells=(
            Cell(model.get("recipe", "float"), sort=model.get("recipe", "")),
            gate,
            Cell(
                _fixed(model["f1"]),
                "" if points is None else f"± {points:.1f}",
                model["f1"],
            ),
            Cell(_fixed(model["exact_match"]), sort=model["exact_match"]),
            Cell(format_percent(ratio), sort=ratio),
            Cell(format_percent(same), sort=same),
            Cell(format_number(rms), sort=rms),
            *timings,
            Cell(format_speed(speed), sort=speed),
            Cell(f"{model['size_bytes'] / 1e6:.0f}", sort=model["size_bytes"]),
        ),
        best=model is find_best(result),
        pareto=bool(model.get("pareto")),
        fails=passes is False,
    )


def list_floats(result: Json, shapes: list[str]) -> list[Row]:
    """The lines of FP32 and FP16, which stay on top."""
    rows = []
    fp32 = result["floats"]["fp32"]
    agreement = result["floats"]["fp16"]["agreement_fp32"]
    for name, model in result["floats"].items():
        shown = {
            "label": name.upper(),
            "f1_ratio": model["f1"] / fp32["f1"] if fp32["f1"] else None,
            # Agreement is symmetric.
            "agreement_fp16": agreement if name == "fp32" else None,
        }
        rows.append(make_row({**model, **shown}, result, shapes))
    return rows


def show_shape(shape: str) -> str:
    """``1×128`` for ``1x128``."""
    return shape.replace("x", "×")


def format_speed(speed: float | None) -> str:
    """How many times as fast; a dash if it was not measured."""
    return "–" if speed is None else f"{speed:.2f}×"


def format_ms(value: float | None) -> str:
    """Milliseconds; a dash if they were not measured."""
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
