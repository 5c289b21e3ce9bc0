"""What the build stage's commands are told, and what that means.

In: arguments as typed. Out: option types that several commands share; recipe,
calibrator, question files and plans made of them. Heavy imports wait until they are
used, so that ``--help`` answers at once.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class TargetName(str, Enum):
    """Engines the build offers."""

    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class WeightScales(str, Enum):
    """How fine the grid of a weight is."""

    PER_CHANNEL = "per-channel"
    PER_TENSOR = "per-tensor"


RepositoryOption = Annotated[
    Path | None,
    typer.Option(
        "--model-repository",
        help="Directory of the Triton model repository.  [default: model_repository, "
        "or INT8QA_MODEL_REPOSITORY]",
        show_default=False,
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="Hub id or directory of a question answering checkpoint.  "
        "[default: the demo checkpoint in the package]",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.")
]
CalibrationDataOption = Annotated[
    Path | None,
    typer.Option(
        help="SQuAD-format questions to calibrate on.  [default: our own]",
        show_default=False,
    ),
]
CalibrationLimitOption = Annotated[
    int | None, typer.Option(min=1, help="Use only N of them, evenly spaced.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="SQuAD-format questions to measure on; none may be in the calibration "
        "data.  [default: our own]",
        show_default=False,
    ),
]
GateOption = Annotated[
    float,
    typer.Option(
        help="Least share of FP32's F1 that INT8 must keep, but for what chance "
        "explains; 0 switches it off.",
        min=0.0,
        max=1.0,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        help="Where sensitivity findings are kept, to go on after a break.  "
        "[default: ~/.cache/int8qa]",
        show_default=False,
    ),
]
CALIBRATOR_NAMES = "max, percentile-N, mse, entropy or search"


def load_recipe_argument(name: str) -> Any:
    from int8qa.build.recipe_file import load_recipe

    return load_recipe(name)


def adjust_recipe(
    recipe: Any, weights: WeightScales | None, *, share_qkv: bool | None
) -> Any:
    """The recipe with scales as asked for, where something was."""
    from dataclasses import replace

    if weights is not None:
        recipe = replace(recipe, per_channel=weights is WeightScales.PER_CHANNEL)
    if share_qkv is not None:
        recipe = replace(recipe, share_qkv=share_qkv)
    return recipe


def parse_calibrator_argument(name: str) -> Any:
    from int8qa.build.calibration import parse_calibrator

    return parse_calibrator(name)


def choose_calibrator(name: str, percentile: float | None) -> Any:
    """The build's calibrator: ``percentile-N`` is ``percentile`` with N beside it."""
    from int8qa.build.calibration import Calibrator
    from int8qa.errors import BuildError

    try:
        named = parse_calibrator_argument(name)
    except BuildError as error:
        raise typer.BadParameter(str(error), param_hint="--calibrator") from error
    if percentile is None:
        return named
    given = Calibrator("percentile", percentile)
    if name != "percentile" and named != given:
        raise typer.BadParameter(
            f"{percentile:g} contradicts --calibrator {name}; give only one of them, "
            f"or --calibrator percentile",
            param_hint="--percentile",
        )
    return given


def make_sources(
    calibration: Path | None,
    evaluation: Path | None,
    calibration_limit: int | None,
    evaluation_limit: int | None,
) -> Any:
    from int8qa.build.subject import QuestionSources

    given = {"calibration": calibration, "evaluation": evaluation}
    return QuestionSources(
        calibration_limit=calibration_limit,
        evaluation_limit=evaluation_limit,
        **{name: path for name, path in given.items() if path is not None},
    )


def choose_plans(
    target: TargetName,
    compute_capability: str | None,
    timing_cache: Path | None,
    *,
    version_compatible: bool,
    hardware_compatible: bool,
) -> Any:
    """How TensorRT's plans are to be built; None for OpenVINO."""
    from int8qa.build.engines.tensorrt_options import (
        RTX_CAPABILITIES,
        Flavour,
        PlanOptions,
    )
    from int8qa.errors import BuildError

    given = {
        "--compute-capability": compute_capability,
        "--timing-cache": timing_cache,
        "--version-compatible": version_compatible,
        "--hardware-compatible": hardware_compatible,
    }
    if target is TargetName.OPENVINO:
        for name, value in given.items():
            if value:
                takers = "tensorrt-rtx" if value is compute_capability else "tensorrt"
                raise typer.BadParameter(
                    f"only --target {takers} takes it; this build is for openvino",
                    param_hint=name,
                )
        return None
    flavour = Flavour(target.value)
    capabilities = tuple(filter(None, (compute_capability or "").split(",")))
    if flavour is Flavour.RTX:
        capabilities = capabilities or RTX_CAPABILITIES
    else:
        from int8qa.build.sensitivity import default_cache

        timing_cache = timing_cache or default_cache() / "tensorrt"
    options = PlanOptions(
        flavour,
        capabilities,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    try:
        options.check()
    except BuildError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from error
    return options


def resolve_argument(checkpoint: str | None, revision: str | None) -> Any:
    from int8qa.build.checkpoint import demo_checkpoint_directory, resolve_checkpoint

    return resolve_checkpoint(
        checkpoint or str(demo_checkpoint_directory()), revision=revision
    )
