"""What a build and a comparison may be told: defaults, and what follows from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from int8qa.build import options as options_module
from int8qa.build import quantization
from int8qa.build.calibration import Calibrator
from int8qa.build.engines.tensorrt_options import Flavour, PlanOptions
from int8qa.build.options import (
    ALL_CALIBRATORS,
    BuildOptions,
    LaboratoryOptions,
    list_advice,
)
from int8qa.build.quantization import RECIPES
from int8qa.build.stored_ranges import StoredRanges
from int8qa.build.subject import data_name, questions_file
from int8qa.errors import BuildError
from tests.build.builds import change_options


def test_advice_names_what_was_not_tried() -> None:
    """The most promising first; nothing that is already done."""
    full = dataclasses.replace(RECIPES["full"], per_channel=False)
    first = list_advice(BuildOptions(smooth=False), full)
    assert [step.split()[:2] for step in first[:2]] == [
        ["--recipe", "gemms"],
        ["--recipe", "linear"],
    ]
    assert [step.split()[0] for step in first[2:6]] == [
        *("--smooth", "--calibrator", "--weights", "--mixed"),
    ]
    assert list_advice(BuildOptions(smooth=False), RECIPES["gemms"])[0] == first[1]
    done = BuildOptions(calibrator=Calibrator("search"), mixed=True)
    last = list_advice(done, RECIPES["linear"])
    assert not any(step.startswith("--") for step in last)
    assert len(last) == 2


def test_demo_is_what_nobody_chose_anything_for(tmp_path: Path) -> None:
    """Any choice but place and force makes a repository its owner's."""
    plain = BuildOptions(model_repository=tmp_path, force=True)
    assert plain.is_default
    others: dict[str, Any] = {
        "checkpoint": "acme/reader",
        "recipe": dataclasses.replace(RECIPES["linear"], share_qkv=True),
        "calibrator": Calibrator("max"),
        "smooth": False,
        "mixed": True,
        "calibration_limit": 10,
        "calibration": tmp_path / "mine.json",
        "evaluation": tmp_path / "mine.json",
        "gate": 0.5,
        "plans": PlanOptions(),
    }
    for name, value in others.items():
        assert not change_options(plain, **{name: value}).is_default, name


def test_own_questions_are_default() -> None:
    """The defaults are the project's questions, told apart from a user's file."""
    sources = BuildOptions().sources
    assert sources.calibration == questions_file("calibration")
    assert data_name(sources.evaluation, "evaluation") == "own"
    # The evaluation file as calibration data is a choice, not the default.
    assert data_name(sources.evaluation, "calibration") != "own"


FINER = Calibrator("percentile", 99.9999)


@pytest.mark.parametrize(
    ("calibrators", "smooth", "smoothed"),
    [
        (ALL_CALIBRATORS, True, ["percentile-99.999", "search"]),
        ((Calibrator("search"), Calibrator("max")), True, ["search"]),
        ((Calibrator(), FINER), True, ["percentile-99.999"]),
        # A method by its name, whatever stands beside it.
        ((Calibrator("search", 99.9),), True, ["search"]),
        ((Calibrator("max"), FINER), True, []),
        (ALL_CALIBRATORS, False, []),
    ],
)
def test_smoothed_are_among_those_compared(
    calibrators: tuple[Calibrator, ...], smooth: bool, smoothed: list[str]
) -> None:
    """SmoothQuant is tried with the default and the search, if they were asked for."""
    options = LaboratoryOptions(calibrators=calibrators, smooth=smooth)
    assert [one.name for one in options.smoothed_calibrators] == smoothed


@pytest.mark.parametrize(
    ("recipe", "softmax", "openvino", "tensorrt"),
    [
        ("full", "UINT8", "full", "linear"),
        ("full", "INT8", "gemms", "full"),
        ("linear", None, "linear", "linear"),
        ("of-ones-own", "UINT8", "gemms", "linear"),
        (None, None, "gemms", "linear"),
    ],
)
def test_recipe_nobody_chose(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str | None,
    softmax: str | None,
    openvino: str,
    tensorrt: str,
) -> None:
    """What was asked for, else what was trained for this target, else its default."""
    grids = {"a.input_quantizer": "INT8"}
    if softmax is not None:
        grids["a.p_bmm_quantizer"] = softmax
    stored = recipe and StoredRanges(recipe, "max", grids, {}, {})
    monkeypatch.setattr(options_module, "read_ranges", lambda _: stored or None)
    monkeypatch.setattr(quantization, "has_vnni", lambda: True)

    def choose(**choice: Any) -> str:
        return BuildOptions(**choice).choose_recipe(tmp_path).name

    plans = PlanOptions()
    assert choose(recipe=RECIPES["linear"]) == "linear"
    assert (choose(), choose(plans=plans)) == (openvino, tensorrt)
    assert choose(keep_trained=False) == "gemms"
    assert choose(keep_trained=False, plans=plans) == "linear"
    monkeypatch.setattr(quantization, "has_vnni", lambda: False)
    assert choose(keep_trained=False) == "linear"


def test_lengths_are_coarser_for_plans() -> None:
    """A GPU pays for calls, a CPU for tokens."""
    assert BuildOptions().bucket_step == 16
    assert BuildOptions(plans=PlanOptions()).bucket_step == 32


def test_target_is_that_of_the_plans() -> None:
    """OpenVINO unless plans are asked for; these are checked with the rest."""
    assert BuildOptions().target == "openvino"
    assert BuildOptions(plans=PlanOptions()).target == "tensorrt"
    assert BuildOptions(plans=PlanOptions(Flavour.RTX)).target == "tensorrt-rtx"
    with pytest.raises(BuildError, match=r"'7\.5' is no compute capability"):
        BuildOptions(plans=PlanOptions(Flavour.RTX, ("7.5",))).check()
