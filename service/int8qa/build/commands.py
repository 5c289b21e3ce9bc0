"""The build stage's first command: ``build``.

In: arguments. Out: tables or JSON on standard output, progress on standard error. Heavy
imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from int8qa.build.arguments import (
    CALIBRATOR_NAMES,
    CalibrationDataOption,
    CalibrationLimitOption,
    CheckpointOption,
    GateOption,
    JsonOption,
    RepositoryOption,
    RevisionOption,
    TargetName,
    WeightScales,
    adjust_recipe,
    choose_calibrator,
    choose_plans,
    load_recipe_argument,
    make_sources,
    resolve_argument,
)
from int8qa.settings import load_settings


def add_commands(app: typer.Typer) -> None:
    """Register the build stage's command with ``app``."""
    app.command()(build)


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
        str | None,
        typer.Option(
            help="Which tensors become INT8. linear: the GEMMs with weights; gemms: "
            "also attention's GEMMs; full: also the residual adds; or a YAML file "
            "(docs/recipes/gentle.yaml).  [default: what the checkpoint was trained "
            "with by `int8qa train --qat`, else gemms on CPUs with VNNI, else linear]",
            show_default=False,
        ),
    ] = None,
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
            help=f"How activation ranges are chosen: {CALIBRATOR_NAMES}, which tries "
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

    ranges = choose_calibrator(calibrator or "percentile", percentile)
    plans = choose_plans(
        target,
        compute_capability,
        timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    sources = make_sources(
        calibration_data, evaluation_data, calibration_limit, evaluation_limit
    )
    given = {} if checkpoint is None else {"checkpoint": checkpoint}
    settings = load_settings()
    options = BuildOptions(
        model_repository=model_repository or settings.model_repository,
        revision=revision,
        recipe=None if recipe is None else load_recipe_argument(recipe),
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
    if weights is not None or share_qkv is not None:
        asked = options.recipe
        if asked is None:
            files = resolve_argument(checkpoint, revision)
            asked = options.choose_recipe(files.directory)
        asked = adjust_recipe(asked, weights, share_qkv=share_qkv)
        options = replace(options, recipe=asked)
    if explain:
        files = resolve_argument(checkpoint, revision)
        asked = options.choose_recipe(files.directory)
        blocks = None if plans is None else _find_blocks(files, options, asked)
        _explain(files, asked, blocks, as_json=as_json)
        return
    outcome = build_repository(options)
    if as_json:
        print(json.dumps(outcome.manifest, indent=2, ensure_ascii=False))
        return
    show_manifest(outcome.manifest)
    state = "current, nothing to do" if outcome.cached else "built"
    print(f"{options.model_repository}: {state}", file=sys.stderr, flush=True)


def _find_blocks(files: Any, options: Any, recipe: Any) -> list[str]:
    """Where the graph would keep TensorRT from fusing, a line each."""
    import tempfile

    from int8qa.build.plans import list_fusion_blocks
    from int8qa.build.subject import load_subject
    from int8qa.contract import TOKENIZER_FILENAME

    options.sources.check()
    with tempfile.TemporaryDirectory() as scratch:
        subject = load_subject(
            files,
            options.sources,
            Path(scratch) / TOKENIZER_FILENAME,
            bucket_step=options.bucket_step,
        )
        found = list_fusion_blocks(subject, recipe, smooth=options.smooth)
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
