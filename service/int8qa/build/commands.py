"""The build stage's commands: ``build``, ``calibrate-compare``, ``sensitivity``.

In: arguments. Out: tables or JSON on standard output, progress on standard error. Heavy
imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.settings import load_settings


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
_CALIBRATOR_NAMES = "max, percentile-N, mse, entropy or search"


def add_commands(app: typer.Typer) -> None:
    """Register the build stage's commands with ``app``."""
    app.command()(build)
    app.command()(calibrate_compare)
    app.command()(sensitivity)


def build(
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    target: Annotated[
        TargetName,
        typer.Option(
            help="Engine to build for: openvino on CPUs; tensorrt on the GPU at hand; "
            "tensorrt-rtx ahead of time, on any Linux machine."
        ),
    ] = TargetName.OPENVINO,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="GPUs that --target tensorrt-rtx builds for, by comma.  [default: "
            "sm75,sm80,sm86,sm89,sm120]",
            show_default=False,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder where --target tensorrt keeps the times of kernels; the next "
            "build takes minutes less.  [default: ~/.cache/int8qa/tensorrt]",
            show_default=False,
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="--target tensorrt: plans load in later TensorRTs, too, up to the "
            "next major version. Price: slower, and a runtime inside the plan that "
            "Triton must be told to trust (docs/tensorrt.md).",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="--target tensorrt: plans run on Ampere and all later GPUs. Price: "
            "slower.",
        ),
    ] = False,
    recipe: Annotated[
        str,
        typer.Option(
            help="Which tensors become INT8. linear: the GEMMs with weights; full: "
            "also attention's GEMMs and the residual adds; or a YAML file "
            "(docs/recipes/gentle.yaml)."
        ),
    ] = "linear",
    weights: Annotated[
        WeightScales | None,
        typer.Option(
            help="One scale per output channel or per tensor.  [default: as the "
            "recipe says, per-channel]",
            show_default=False,
        ),
    ] = None,
    share_qkv: Annotated[
        bool | None,
        typer.Option(
            "--share-qkv/--separate-qkv",
            help="One scale for query, key and value, as a fused GEMM needs.  "
            "[default: as the recipe says, separate]",
            show_default=False,
        ),
    ] = None,
    calibrator: Annotated[
        str | None,
        typer.Option(
            help=f"How activation ranges are chosen: {_CALIBRATOR_NAMES}, which tries "
            "several on each tensor and takes what moves the logits least.  "
            "[default: the ranges of `int8qa train --qat` where the checkpoint has "
            "them, else percentile-99.999]",
            show_default=False,
        ),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option(
            help="Share of absolute values that --calibrator percentile keeps, in "
            "percent; the same as percentile-N.  [default: 99.999]",
            min=50.0,
            max=100.0,
            show_default=False,
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option(help="SmoothQuant: move outlier channels into the weights first."),
    ] = True,
    calibration_data: CalibrationDataOption = None,
    calibration_limit: CalibrationLimitOption = None,
    evaluation_data: Annotated[
        Path | None,
        typer.Option(
            help="SQuAD-format questions for gate and report; none may be in the "
            "calibration data.  [default: our own]",
            show_default=False,
        ),
    ] = None,
    evaluation_limit: Annotated[
        int | None, typer.Option(min=1, help="Use only N of them, evenly spaced.")
    ] = None,
    gate: GateOption = 0.99,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="Leave the most sensitive kernels in float until the measured share "
            "reaches the gate, and report what that costs in speed.",
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="List every tensor that could be quantized and what the recipe does "
            "with it; build nothing.",
        ),
    ] = False,
    model_repository: RepositoryOption = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside",
            help="Give the models new names, so that a running service can change to "
            "them without a pause (SIGUSR1).",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Rebuild even if it is current.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into calibrated INT8, FP16 and FP32 engines for Triton."""
    from int8qa.build.options import BuildOptions
    from int8qa.build.pipeline import build_repository
    from int8qa.build.report import show_manifest

    ranges = _choose_calibrator(calibrator or "percentile", percentile)
    chosen = _load_recipe(recipe, weights, share_qkv=share_qkv)
    plans = _choose_plans(
        target,
        compute_capability,
        timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    sources = _sources(
        calibration_data, evaluation_data, calibration_limit, evaluation_limit
    )
    given = {} if checkpoint is None else {"checkpoint": checkpoint}
    if explain:
        files = _resolve(checkpoint, revision)
        blocks = None
        if plans is not None:
            blocks = _find_blocks(files, sources, chosen, smooth=smooth)
        _explain(files, chosen, blocks, as_json=as_json)
        return
    settings = load_settings()
    options = BuildOptions(
        model_repository=model_repository or settings.model_repository,
        revision=revision,
        recipe=chosen,
        calibrator=ranges,
        keep_trained=calibrator is None and percentile is None,
        smooth=smooth,
        sources=sources,
        gate=gate,
        mixed=mixed,
        plans=plans,
        force=force,
        beside=beside,
        **given,
    )
    outcome = build_repository(options)
    if as_json:
        print(json.dumps(outcome.manifest, indent=2, ensure_ascii=False))
        return
    show_manifest(outcome.manifest)
    state = "current, nothing to do" if outcome.cached else "built"
    print(f"{options.model_repository}: {state}", file=sys.stderr, flush=True)


def calibrate_compare(
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    data: DataOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = None,
    calibration_data: CalibrationDataOption = None,
    calibration_limit: CalibrationLimitOption = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, full or a YAML file; repeat for several.  [default: linear "
            "and full]",
            show_default=False,
        ),
    ] = None,
    calibrator: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_CALIBRATOR_NAMES}; repeat for several.  [default: max, four "
            "percentiles, mse, entropy and search]",
            show_default=False,
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option(
            help="Also with SmoothQuant, by percentile-99.999 and search, as far as "
            "--calibrator names them."
        ),
    ] = True,
    sensitivity_questions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Questions for the sensitivity of the last recipe; 0 leaves it out.",
        ),
    ] = 100,
    gate: GateOption = 0.99,
    html: Annotated[
        Path, typer.Option(help="The report, one file that needs no network.")
    ] = Path("int8qa-calibrators.html"),
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every calibrator with every recipe: F1, agreement, latency, size; table and page.

    One calibration pass serves all. On two cores the default takes some 20 minutes
    for 1,000 questions.
    """
    from int8qa.build.comparison.page import write_page
    from int8qa.build.laboratory import compare_calibrators
    from int8qa.build.options import LaboratoryOptions
    from int8qa.build.report import show_comparison
    from int8qa.errors import RepositoryError

    if not html.absolute().parent.is_dir():
        raise RepositoryError(
            f"no such directory for the report: {html.absolute().parent}"
        )
    chosen: dict[str, Any] = {}
    if checkpoint is not None:
        chosen["checkpoint"] = checkpoint
    if recipe:
        chosen["recipes"] = tuple(_load_recipe(name) for name in recipe)
    if calibrator:
        chosen["calibrators"] = tuple(_parse_calibrator(name) for name in calibrator)
    result = compare_calibrators(
        LaboratoryOptions(
            revision=revision,
            sources=_sources(calibration_data, data, calibration_limit, limit),
            smooth=smooth,
            gate=gate,
            sensitivity_questions=sensitivity_questions,
            cache=cache,
            **chosen,
        )
    )
    write_page(result, html)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_comparison(result)
    print(f"report: {html}", file=sys.stderr, flush=True)


def sensitivity(
    checkpoint: CheckpointOption = None,
    revision: RevisionOption = None,
    data: DataOption = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Use only N questions, evenly spaced.")
    ] = 200,
    calibration_data: CalibrationDataOption = None,
    calibration_limit: CalibrationLimitOption = None,
    recipe: Annotated[str, typer.Option(help="linear, full or a YAML file.")] = "full",
    calibrator: Annotated[
        str, typer.Option(help=f"{_CALIBRATOR_NAMES}.")
    ] = "percentile-99.999",
    smooth: Annotated[bool, typer.Option(help="SmoothQuant first.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """What each kernel of each layer costs in INT8: alone, and left out alone.

    Every measurement is kept at once; a run that was cut short goes on where it
    stopped.
    """
    from int8qa.build.laboratory import measure_one
    from int8qa.build.options import LaboratoryOptions
    from int8qa.build.report import show_sensitivity

    chosen: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    result = measure_one(
        LaboratoryOptions(
            revision=revision,
            sources=_sources(calibration_data, data, calibration_limit, limit),
            recipes=(_load_recipe(recipe),),
            sensitivity_questions=limit,
            cache=cache,
            **chosen,
        ),
        _parse_calibrator(calibrator),
        smooth=smooth,
    )
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_sensitivity(result)


def _load_recipe(
    name: str, weights: WeightScales | None = None, *, share_qkv: bool | None = None
) -> Any:
    from dataclasses import replace

    from int8qa.build.recipe_file import load_recipe

    recipe = load_recipe(name)
    if weights is not None:
        recipe = replace(recipe, per_channel=weights is WeightScales.PER_CHANNEL)
    if share_qkv is not None:
        recipe = replace(recipe, share_qkv=share_qkv)
    return recipe


def _parse_calibrator(name: str) -> Any:
    from int8qa.build.calibration import parse_calibrator

    return parse_calibrator(name)


def _choose_calibrator(name: str, percentile: float | None) -> Any:
    """The build's calibrator: ``percentile-N`` is ``percentile`` with N beside it."""
    from int8qa.build.calibration import Calibrator
    from int8qa.errors import BuildError

    try:
        named = _parse_calibrator(name)
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


def _sources(
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


def _choose_plans(
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


def _resolve(checkpoint: str | None, revision: str | None) -> Any:
    from int8qa.build.checkpoint import demo_checkpoint_directory, resolve_checkpoint

    return resolve_checkpoint(
        checkpoint or str(demo_checkpoint_directory()), revision=revision
    )


def _find_blocks(files: Any, sources: Any, recipe: Any, *, smooth: bool) -> list[str]:
    """Where the graph would keep TensorRT from fusing, a line each."""
    import tempfile

    from int8qa.build.plans import list_fusion_blocks
    from int8qa.build.subject import load_subject
    from int8qa.contract import TOKENIZER_FILENAME

    sources.check()
    with tempfile.TemporaryDirectory() as scratch:
        subject = load_subject(files, sources, Path(scratch) / TOKENIZER_FILENAME)
        found = list_fusion_blocks(subject, recipe, smooth=smooth)
    return [str(finding) for finding in found]


def _explain(
    files: Any, recipe: Any, blocks: list[str] | None, *, as_json: bool
) -> None:
    from int8qa.build.checkpoint import load_checkpoint
    from int8qa.build.export import model_inputs, wrap_model
    from int8qa.build.plans import sign_softmax
    from int8qa.build.quantization import insert_quantizers
    from int8qa.build.report import show_findings, show_sites
    from int8qa.build.sites import find_sites

    loaded = load_checkpoint(files)
    reader = wrap_model(loaded.model)
    insert_quantizers(loaded.model)
    sites = find_sites(reader, model_inputs(takes_token_types=loaded.takes_token_types))
    plan = (recipe if blocks is None else sign_softmax(recipe)).choose(sites)
    rows = [
        {
            "layer": site.layer,
            "class": str(site.tensor_class),
            "quantizer": site.name,
            "grid": plan.describe_grid(site),
        }
        for site in sites
    ]
    if as_json:
        whole = rows if blocks is None else {"sites": rows, "findings": blocks}
        print(json.dumps(whole, indent=2))
        return
    show_sites(rows, title=f"{files.name}, recipe {recipe.name}")
    if blocks is not None:
        show_findings(blocks)
