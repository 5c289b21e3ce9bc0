"""A whole comparison of a tiny checkpoint, and what its result holds."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from int8qa.build import baseline, laboratory, latency, subject
from int8qa.build.calibration import Calibrator
from int8qa.build.comparison.page import render_page
from int8qa.build.laboratory import (
    FORMAT_VERSION,
    HISTOGRAM_BINS,
    compare_calibrators,
    measure_one,
)
from int8qa.build.options import LaboratoryOptions
from int8qa.build.quantization import RECIPES, Recipe, Rule
from int8qa.build.report import BuildProgress, show_comparison, show_sensitivity
from int8qa.build.sites import TensorClass
from int8qa.build.subject import QuestionSources
from int8qa.errors import BuildError, DataFileError, ParityError

CALIBRATORS = (Calibrator("max"), Calibrator("search"))
"""SmoothQuant is tried with the second alone."""
SHAPES = ["1x32", "2x32"]
GEMMS = 12
TENSORS = 16
"""Per layer what Q, K and V read, Q, K, V, softmax and context, and both inputs of the
feed-forward; residual branches are among them."""
UNITS = 2 * 4 + 2 + 8 + 4
"""Of linear: four kernels in two layers, each layer, each kernel's input and weight in
both layers, each kernel in both."""
VARIANT_KEYS = {
    *("recipe", "calibrator", "smooth", "label", "f1", "exact_match", "f1_ratio"),
    *("f1_ratio_margin", "agreement_fp32", "agreement_fp16", "rms_logit_error"),
    *("max_logit_deviation", "latency_ms", "size_bytes", "execution"),
    *("quantized_gemms", "passes_gate", "pareto"),
}
FLOAT_KEYS = {
    *("f1", "exact_match", "f1_ratio", "agreement_fp32", "rms_logit_error"),
    *("size_bytes", "execution", "latency_ms"),
}
PROVENANCE_KEYS = {
    *("command", "started_at", "seconds", "device", "cores", "versions", "checkpoint"),
    *("checkpoint_sha256", "data", "questions", "calibration_data"),
    *("calibration_windows", "gate", "recipes"),
}


def make_recipe(name: str, *kinds: TensorClass) -> Recipe:
    return Recipe(name, tuple(Rule(enable=True, tensor_class=kind) for kind in kinds))


FFN_IN = make_recipe("ffn_in", TensorClass.FFN_IN_INPUT, TensorClass.FFN_IN_WEIGHT)
FFN_OUT = make_recipe("ffn_out", TensorClass.FFN_OUT_INPUT, TensorClass.FFN_OUT_WEIGHT)


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def read_lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def read_stages(lines: list[str]) -> list[str]:
    """``1/12`` and so on, each once."""
    labels = [line[1 : line.index("]")] for line in lines if line.startswith("[")]
    return list(dict.fromkeys(labels))


def number_stages(count: int) -> list[str]:
    return [f"{n}/{count}" for n in range(1, count + 1)]


@dataclasses.dataclass(frozen=True)
class Compared:
    options: LaboratoryOptions
    result: dict[str, Any]
    lines: list[str]

    @property
    def cache(self) -> Path:
        assert self.options.cache is not None
        return self.options.cache


def compare(options: LaboratoryOptions) -> Compared:
    console = make_console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            laboratory,
            "BuildProgress",
            lambda stages: BuildProgress(stages, console=console),
        )
        result = compare_calibrators(options)
    return Compared(options, result, read_lines(console))


@pytest.fixture(scope="module", autouse=True)
def _hasty() -> Iterator[None]:
    """Small shapes and no time for them: what they take does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "LATENCY_SHAPES", ((1, 32), (2, 32)))
        patch.setattr(laboratory, "LATENCY_BUDGET_S", 0.0)
        patch.setattr(laboratory, "GRID_BATCHES", (1, 2))
        patch.setattr(laboratory, "GRID_LENGTHS", (32, 64, 384))
        patch.setattr(laboratory, "MAX_BATCH_TOKENS", 64)
        yield


@pytest.fixture(scope="module")
def options(
    tiny_checkpoints: dict[str, Path], question_files: tuple[Path, Path]
) -> LaboratoryOptions:
    """The tiny BERT, which answers nonsense: no gate."""
    return LaboratoryOptions(
        checkpoint=str(tiny_checkpoints["bert"]),
        sources=QuestionSources(*question_files),
        gate=0.0,
    )


@pytest.fixture(scope="module")
def compared(
    options: LaboratoryOptions, tmp_path_factory: pytest.TempPathFactory
) -> Compared:
    """Two calibrators, both recipes, with and without SmoothQuant; linear dissected."""
    return compare(
        dataclasses.replace(
            options,
            recipes=(RECIPES["full"], RECIPES["linear"]),
            calibrators=CALIBRATORS,
            sensitivity_questions=2,
            cache=tmp_path_factory.mktemp("cache") / "below",
        )
    )


def test_parts(compared: Compared) -> None:
    """Every part there is, of JSON types and of numbers alone."""
    result = compared.result
    assert result.keys() == {
        *("format_version", "provenance", "floats", "variants", "histograms"),
        *("sensitivity", "grid", "best", "verdict"),
    }
    assert result["format_version"] == FORMAT_VERSION
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "INT8" in result["verdict"]


def test_stages(compared: Compared) -> None:
    """The number of stages promised is the number shown."""
    # Load, floats, histograms, ranges, variants, sensitivity, grid; three a recipe.
    assert read_stages(compared.lines) == number_stages(7 + 2 * 3)


def test_provenance(compared: Compared) -> None:
    """Where, when and on what."""
    provenance = compared.result["provenance"]
    assert provenance.keys() == PROVENANCE_KEYS
    assert provenance["checkpoint"] == "tiny-bert"
    assert provenance["data"] == "evaluation.json"
    assert provenance["calibration_data"] == "calibration.json"
    assert (provenance["questions"], provenance["calibration_windows"]) == (2, 3)
    assert provenance["seconds"] > 0
    assert provenance["started_at"].endswith("Z")
    assert [recipe["name"] for recipe in provenance["recipes"]] == ["full", "linear"]
    assert provenance["versions"].keys() >= {"int8qa", "openvino", "torch"}


def test_floats(compared: Compared) -> None:
    """FP32 is what all is held against; FP16 is half its size."""
    floats = compared.result["floats"]
    assert list(floats) == ["fp32", "fp16"]
    for entry in floats.values():
        assert entry.keys() == FLOAT_KEYS
        assert list(entry["latency_ms"]) == SHAPES
        assert all(0 < t["p50"] <= t["p99"] for t in entry["latency_ms"].values())
    fp32, fp16 = floats["fp32"], floats["fp16"]
    assert (fp32["f1_ratio"], fp32["agreement_fp32"]) == (1.0, 1.0)
    assert fp32["rms_logit_error"] == 0.0 < fp16["rms_logit_error"]
    assert fp16["size_bytes"] < 0.6 * fp32["size_bytes"]


def test_variants(compared: Compared) -> None:
    """Each calibrator with each recipe; one more with SmoothQuant; all in INT8."""
    variants = compared.result["variants"]
    plain = [(r, c, False) for r in ("full", "linear") for c in ("max", "search")]
    smooth = [(r, "search", True) for r in ("full", "linear")]
    found = [(v["recipe"], v["calibrator"], v["smooth"]) for v in variants]
    assert found == plain + smooth
    for variant in variants:
        assert variant.keys() == VARIANT_KEYS
        assert variant["quantized_gemms"] == GEMMS
        assert "8" in variant["execution"]
        assert variant["passes_gate"] is True
        assert 0 < variant["rms_logit_error"] <= variant["max_logit_deviation"]
        assert list(variant["latency_ms"]) == SHAPES
        for times in variant["latency_ms"].values():
            assert times.keys() == {"p50", "p99", "p50_fp16", "runs"}
            assert 0 < times["p50"] <= times["p99"]
            assert times["p50_fp16"] > 0
        suffix = " + SmoothQuant" if variant["smooth"] else ""
        assert variant["label"] == variant["calibrator"] + suffix


def test_variants_differ(compared: Compared) -> None:
    """Each is a model of its own: no two have the same errors."""
    errors = [v["rms_logit_error"] for v in compared.result["variants"]]
    assert len(set(errors)) == len(errors)


def read_gain(variant: dict[str, Any]) -> float:
    gains = (t["p50_fp16"] / t["p50"] for t in variant["latency_ms"].values())
    return math.prod(gains) ** (1 / len(SHAPES))


def test_pareto(compared: Compared) -> None:
    """On the front is what nothing, floats included, beats in speed and in F1."""
    result = compared.result
    fp16 = result["floats"]["fp16"]["latency_ms"]
    points = [
        (
            math.prod(fp16[s]["p50"] / entry["latency_ms"][s]["p50"] for s in SHAPES)
            ** (1 / len(SHAPES)),
            entry["f1_ratio"],
        )
        for entry in result["floats"].values()
    ] + [(read_gain(variant), variant["f1_ratio"]) for variant in result["variants"]]
    for variant in result["variants"]:
        own = (read_gain(variant), variant["f1_ratio"])
        beaten = any(
            other != own and other[0] >= own[0] and other[1] >= own[1]
            for other in points
        )
        assert variant["pareto"] is not beaten


def test_histograms(compared: Compared) -> None:
    """One per tensor, however many read it, with every calibrator's cut."""
    histograms = compared.result["histograms"]
    assert len(histograms) == TENSORS
    assert len({entry["name"] for entry in histograms}) == TENSORS
    for entry in histograms:
        assert entry.keys() == {
            *("name", "place", "tensor_class", "layer", "peak", "upper"),
            *("counts", "amax"),
        }
        assert entry["place"] == f"layer {entry['layer']} {entry['tensor_class']}"
        assert entry["layer"] in {0, 1}
        assert len(entry["counts"]) <= HISTOGRAM_BINS
        assert sum(entry["counts"]) > 0
        assert entry["peak"] <= entry["upper"] * (1 + 1e-6)
        assert list(entry["amax"]) == ["max", "search"]
        assert entry["amax"]["max"] == pytest.approx(entry["peak"])
        assert 0 < entry["amax"]["search"] <= entry["amax"]["max"] * (1 + 1e-6)


def test_sensitivity(compared: Compared) -> None:
    """The last recipe's units by the search, the worst first."""
    sensitivity = compared.result["sensitivity"]
    assert sensitivity["recipe"] == "linear"
    assert sensitivity["calibrator"] == "search"
    assert (sensitivity["smooth"], sensitivity["questions"]) == (False, 2)
    units = sensitivity["units"]
    assert len({unit["name"] for unit in units}) == len(units) == UNITS
    keys = {"rms_logit_error", "f1_ratio", "agreement_fp32"}
    for unit in units:
        assert unit.keys() == {
            *("name", "layer", "kernel", "tensor_class", "group"),
            *("only", "all_but"),
        }
        assert unit["only"].keys() == unit["all_but"].keys() == keys
        assert unit["only"]["rms_logit_error"] > 0
    errors = [unit["only"]["rms_logit_error"] for unit in units]
    assert errors == sorted(errors, reverse=True)
    assert Counter(unit["group"] for unit in units) == {
        "kernel": 8,
        "layer": 2,
        "tensor class": 8,
        "kernel of all layers": 4,
    }
    # Of two layers, the one alone is the other left out.
    by_name = {unit["name"]: unit for unit in units}
    assert by_name["layer 0"]["only"] == by_name["layer 1"]["all_but"]
    parts = ("layer", "kernel", "tensor_class")
    for name, found in {
        "layer 1 ffn_out": (1, "ffn_out", None),
        "layer 1": (1, None, None),
        "every ffn_out_input": (None, None, "ffn_out_input"),
        "all ffn_out": (None, "ffn_out", None),
    }.items():
        assert tuple(by_name[name][part] for part in parts) == found


def test_grid(compared: Compared) -> None:
    """Every batch at every length the model reads, null where none is served."""
    result = compared.result
    best, grid = result["best"], result["grid"]
    (chosen,) = [
        variant
        for variant in result["variants"]
        if all(variant[key] == best[key] for key in best)
    ]
    assert best.keys() == {"recipe", "calibrator", "smooth"}
    assert grid["variant"] == f"{chosen['recipe']}, {chosen['label']}"
    assert (grid["batches"], grid["lengths"]) == ([1, 2], [32, 64])
    assert list(grid["ms"]) == ["int8", "fp32", "fp16"]
    for rows in grid["ms"].values():
        assert [[ms is not None for ms in row] for row in rows] == [
            [True, True],
            [True, False],
        ]
        assert all(ms > 0 for row in rows for ms in row if ms is not None)


def test_result_can_be_shown(compared: Compared) -> None:
    """The page and the table take what the laboratory gives."""
    page = render_page(compared.result)
    assert "search + SmoothQuant" in page
    assert "max + SmoothQuant" not in page
    assert "layer 0 ffn_out" in page
    console = make_console()
    show_comparison(compared.result, console=console)
    lines = read_lines(console)
    assert sum("+ SmoothQuant" in line and "│" in line for line in lines) == 2
    assert sum("→" in line for line in lines) == 1
    assert any(f"the first 10 of {UNITS}" in line for line in lines)


def test_findings_are_kept(compared: Compared) -> None:
    """Measured once: the same recipe alone, later, reads what the comparison wrote."""
    (file,) = compared.cache.iterdir()
    before = file.read_bytes()
    console = make_console()
    options = dataclasses.replace(compared.options, recipes=(RECIPES["linear"],))
    result = measure_one(
        options,
        Calibrator("search"),
        smooth=False,
        progress=BuildProgress(5, console=console),
    )
    # Each unit both ways, but one layer alone is the other left out.
    known = 2 * UNITS - 2
    assert f"      {known} plans are known already" in read_lines(console)
    assert [path.name for path in compared.cache.iterdir()] == [file.name]
    assert file.read_bytes() == before
    provenance = result.pop("provenance")
    assert result == compared.result["sensitivity"]
    assert provenance.keys() == PROVENANCE_KEYS
    assert provenance["seconds"] > 0
    assert provenance["started_at"]


def count_known(console: Console) -> int:
    """Plans that a run found in the cache."""
    found = [line.split()[0] for line in read_lines(console) if "known" in line]
    return int(found[0]) if found else 0


@pytest.mark.slow
def test_findings_of_other_questions_are_not_taken(
    options: LaboratoryOptions, tmp_path: Path
) -> None:
    """A text edited under its old id, of either set, is another subject."""
    texts = {
        name: getattr(options.sources, name).read_text()
        for name in ("calibration", "evaluation")
    }

    def measure(**changed: str) -> int:
        paths = {}
        for name, text in (texts | changed).items():
            paths[name] = tmp_path / f"{name}.json"
            paths[name].write_text(text)
        console = make_console()
        measure_one(
            dataclasses.replace(
                options,
                recipes=(FFN_IN,),
                sources=QuestionSources(**paths),
                cache=tmp_path / "cache",
            ),
            Calibrator("max"),
            smooth=False,
            progress=BuildProgress(5, console=console),
        )
        return count_known(console)

    assert [measure(), measure()] == [0, 6]
    assert measure(evaluation=texts["evaluation"].replace("When does", "When did")) == 0
    assert measure(calibration=texts["calibration"].replace("200", "201")) == 0
    assert measure() == 6


@pytest.mark.slow
def test_checkpoint_is_loaded_once_a_group(
    options: LaboratoryOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floats are the model that the subject holds, which nothing changes."""
    import torch

    loaded: list[Any] = []
    load = subject.load_checkpoint

    def count(files: Any) -> Any:
        loaded.append(load(files))
        return loaded[-1]

    monkeypatch.setattr(subject, "load_checkpoint", count)
    compare(
        dataclasses.replace(
            options,
            recipes=(FFN_IN,),
            calibrators=CALIBRATORS[1:],
            sensitivity_questions=0,
        )
    )
    # Its own, one for the plain variants, one for the smoothed.
    assert len(loaded) == 3
    kept, quantized, smoothed = (one.model for one in loaded)
    fresh = load(loaded[0].files).model.state_dict()
    assert kept.state_dict().keys() == fresh.keys()
    assert all(
        torch.equal(value, fresh[name]) for name, value in kept.state_dict().items()
    )
    # Of the others neither is what it was.
    assert quantized.state_dict().keys() > fresh.keys()
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(smoothed.state_dict()[weight], fresh[weight])


def test_smoothquant_with_none_of_those_compared(
    options: LaboratoryOptions, tmp_path: Path
) -> None:
    """Where neither the default nor the search is compared, nothing is smoothed."""
    found = compare(
        dataclasses.replace(
            options,
            recipes=(FFN_IN,),
            calibrators=CALIBRATORS[:1],
            sensitivity_questions=0,
        )
    )
    assert read_stages(found.lines) == number_stages(6)
    assert [one["label"] for one in found.result["variants"]] == ["max"]


@pytest.mark.slow
def test_sensitivity_alone(options: LaboratoryOptions, tmp_path: Path) -> None:
    """A recipe of one kernel, smoothed: quantizing nothing at all is measured too."""
    console = make_console()
    result = measure_one(
        dataclasses.replace(
            options, recipes=(FFN_IN,), sensitivity_questions=1, cache=tmp_path
        ),
        Calibrator("max"),
        smooth=True,
        progress=BuildProgress(5, console=console),
    )
    assert read_stages(read_lines(console)) == number_stages(5)
    assert (result["recipe"], result["calibrator"]) == ("ffn_in", "max")
    assert (result["smooth"], result["questions"]) == (True, 1)
    units = {unit["name"]: unit for unit in result["units"]}
    assert units.keys() == {
        *("layer 0 ffn_in", "layer 1 ffn_in", "all ffn_in"),
        *("every ffn_in_input", "every ffn_in_weight"),
    }
    everything = units["all ffn_in"]
    # All but everything is nothing in INT8; the rest is what bf16 or f16 rounds.
    assert (
        everything["all_but"]["rms_logit_error"]
        < (everything["only"]["rms_logit_error"])
    )
    console = make_console()
    show_sensitivity(result, console=console)
    assert any("all ffn_in" in line for line in read_lines(console))
    (file,) = tmp_path.iterdir()
    # The key, and six plans: each layer, each operand, all, none.
    assert len([line for line in file.read_text().splitlines() if line]) == 1 + 6


def test_least_comparison(options: LaboratoryOptions, tmp_path: Path) -> None:
    """Recipes that share nothing, one calibrator: no cache, and still a page."""
    found = compare(
        dataclasses.replace(
            options,
            recipes=(FFN_IN, FFN_OUT),
            calibrators=CALIBRATORS[:1],
            smooth=False,
            sensitivity_questions=0,
            cache=tmp_path,
        )
    )
    assert read_stages(found.lines) == number_stages(6)
    variants = found.result["variants"]
    assert [variant["recipe"] for variant in variants] == ["ffn_in", "ffn_out"]
    assert [variant["quantized_gemms"] for variant in variants] == [2, 2]
    histograms = found.result["histograms"]
    classes = [entry["tensor_class"] for entry in histograms]
    assert sorted(classes) == 2 * ["ffn_in_input"] + 2 * ["ffn_out_input"]
    assert all(list(entry["amax"]) == ["max"] for entry in histograms)
    assert found.result["sensitivity"] is None
    assert not list(tmp_path.iterdir())
    assert "ffn_out" in render_page(found.result)


def test_faithless_half_precision(
    options: LaboratoryOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks in FP16 already is not measured in INT8."""
    strict = dataclasses.replace(baseline.HALF, agreement=1.1)
    monkeypatch.setattr(baseline, "HALF", strict)
    with pytest.raises(ParityError, match=strict.conversion):
        compare(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ()}, "nothing to compare"),
        ({"calibrators": ()}, "nothing to compare"),
        ({"recipes": (FFN_IN, FFN_IN)}, "two recipes have the same name"),
        ({"calibrators": (*CALIBRATORS, Calibrator("max"))}, "max is given twice"),
        # The percentile means nothing to it.
        (
            {"calibrators": (Calibrator("mse"), Calibrator("mse", 99.9))},
            "mse is given twice",
        ),
        (
            {"calibrators": (Calibrator(), Calibrator("percentile", 99.999))},
            r"percentile-99\.999 is given twice",
        ),
    ],
)
def test_options_are_checked_first(
    options: LaboratoryOptions, change: dict[str, Any], message: str
) -> None:
    """Before anything is loaded: here the checkpoint does not even exist."""
    wrong = dataclasses.replace(options, checkpoint="./none", **change)
    with pytest.raises(BuildError, match=message):
        compare(wrong)
    if "recipes" in change:
        with pytest.raises(BuildError, match=message):
            measure_one(wrong, Calibrator("max"), smooth=False)


def test_missing_questions(options: LaboratoryOptions, tmp_path: Path) -> None:
    """The same for a file that is not there."""
    sources = QuestionSources(tmp_path / "none.json", options.sources.evaluation)
    with pytest.raises(DataFileError, match=r"no such file.*none\.json"):
        compare(dataclasses.replace(options, checkpoint="./none", sources=sources))
