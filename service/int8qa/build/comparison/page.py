"""One HTML page of a calibrator comparison, which opens without a network.

In: the result of ``int8qa calibrate-compare``. Out: a document that holds its scripts,
its figures and the result itself. Measures nothing, decides nothing. Everything taken
from the result is escaped: by Jinja2 in HTML and in JSON, by the modules of the
figures in what plotly reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int8qa.build.comparison.frame import (
    bundle,
    drop_nonfinite,
    list_grids,
    render_frame,
)
from int8qa.build.comparison.histograms import (
    find_telling,
    plot_amax,
    plot_histograms,
)
from int8qa.build.comparison.pareto import name_variant, plot_pareto, shape_speed
from int8qa.build.comparison.parts import Json, format_percent
from int8qa.build.comparison.sensitivity import plot_sensitivity
from int8qa.build.comparison.table import (
    find_best,
    format_speed,
    list_columns,
    list_floats,
    make_row,
    show_shape,
)


def render_page(result: Mapping[str, Any]) -> str:
    """The whole document.

    Args:
        result: as ``int8qa calibrate-compare`` writes it; NaN and infinity count as
            not measured.
    """
    clean = drop_nonfinite(result)
    shapes = list(clean["floats"]["fp32"]["latency_ms"])
    histograms = plot_histograms(clean)
    telling = find_telling(clean["histograms"])
    amax = plot_amax(clean)
    classes = [choice.label for choice in amax]
    figures = {
        "pareto": bundle(plot_pareto(clean)),
        "histogram": bundle(histograms, telling),
        "amax": bundle(
            amax,
            classes.index(clean["histograms"][telling]["tensor_class"])
            if classes and clean["histograms"][telling]["tensor_class"] in classes
            else 0,
        ),
        "sensitivity": bundle(plot_sensitivity(clean)),
    }
    return render_frame(
        Path(__file__).with_name("page.html"),
        result=clean,
        filename="int8qa-comparison.json",
        verdict=clean["verdict"],
        provenance=clean["provenance"],
        facts=_list_facts(clean["provenance"]),
        tiles=_list_tiles(clean, shapes),
        columns=list_columns(shapes),
        floats=list_floats(clean, shapes),
        variants=[make_row(v, clean, shapes) for v in clean["variants"]],
        figures=figures,
        grids=list_grids(clean["grid"]),
        contents=_list_contents(clean),
    )


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Render and write the page, UTF-8."""
    path.write_text(render_page(result), encoding="utf-8")


def _list_facts(provenance: Json) -> list[tuple[str, str]]:
    versions = ", ".join(f"{k} {v}" for k, v in provenance["versions"].items())
    seconds = provenance["seconds"]
    took = "" if seconds is None else f", took {seconds / 60:.1f} minutes"
    windows = f"{provenance['calibration_windows']:,} windows"
    return [
        ("Machine", f"{provenance['device']}, {provenance['cores']} cores"),
        ("Versions", versions),
        (
            "Checkpoint",
            f"{provenance['checkpoint']}, SHA-256 {provenance['checkpoint_sha256']}",
        ),
        (
            "Measured on",
            f"{provenance['data']}, {provenance['questions']:,} questions",
        ),
        ("Calibrated on", f"{provenance['calibration_data']}, {windows}"),
        ("Started", f"{provenance['started_at']}{took}"),
    ]


def _list_tiles(result: Json, shapes: list[str]) -> list[dict[str, Any]]:
    best = find_best(result)
    fp16 = result["floats"]["fp16"]
    if best is None:
        return [
            {"label": "INT8", "values": [("–", "")], "detail": "no best variant"},
            {
                "label": "FP16: same answers as FP32",
                "values": [(format_percent(fp16["agreement_fp32"]), "")],
                "detail": "",
            },
        ]
    gate = "passes" if best["passes_gate"] else "fails"
    speeds = [
        (
            format_speed(shape_speed(best["latency_ms"], fp16["latency_ms"], s)),
            show_shape(s),
        )
        for s in shapes
    ]
    return [
        {
            "label": "Best INT8: F1 against FP32",
            "values": [(format_percent(best["f1_ratio"]), "")],
            "detail": f"± {format_percent(best['f1_ratio_margin'])}; {gate} the gate "
            f"of {100 * result['provenance']['gate']:g} %",
        },
        {
            "label": "Its speed against FP16",
            "values": speeds,
            "detail": "batch × tokens, median",
        },
        {
            "label": "Same answers as FP16",
            "values": [(format_percent(best["agreement_fp16"]), "")],
            "detail": f"as FP32: {format_percent(best['agreement_fp32'])}",
        },
        {
            "label": "Size",
            "values": [(f"{best['size_bytes'] / 1e6:.0f} MB", "")],
            "detail": f"FP16 {fp16['size_bytes'] / 1e6:.0f} MB, FP32 "
            f"{result['floats']['fp32']['size_bytes'] / 1e6:.0f} MB",
        },
    ]


def _list_contents(result: Json) -> list[tuple[str, str]]:
    """What the embedded JSON holds."""
    sensitivity = result["sensitivity"]
    grid = result["grid"]
    return [
        ("floats", f"{len(result['floats'])} models"),
        ("variants", f"{len(result['variants'])} INT8 models, {_best_name(result)}"),
        ("histograms", f"{len(result['histograms'])} tensors"),
        (
            "sensitivity",
            f"{len(sensitivity['units'])} units" if sensitivity else "not measured",
        ),
        (
            "grid",
            f"{len(grid['batches'])} batches × {len(grid['lengths'])} lengths"
            if grid
            else "not measured",
        ),
    ]


def _best_name(result: Json) -> str:
    best = find_best(result)
    return f"best: {name_variant(best)}" if best else "none recommended"
