"""INT8's rounding in a reader that is being trained.

In: a float reader, a recipe, windows to calibrate on. Out: the same reader with
ModelOpt's quantizers, calibrated as the build does it; gradients pass the rounding
straight through. After training: plain weights, and the ranges they were trained with.

ModelOpt's QATTrainer is not used; docs/decisions/0015-training.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from int8qa.build.calibration import set_ranges
from int8qa.build.plans import choose_unsmoothed
from int8qa.build.quantization import (
    Recipe,
    insert_quantizers,
    switch_quantizers,
)
from int8qa.build.quantized import QuantizedReader
from int8qa.build.report import BuildProgress
from int8qa.build.sites import find_sites
from int8qa.build.stored_ranges import StoredRanges, take_ranges
from int8qa.build.subject import CALIBRATION_WINDOWS
from int8qa.reader.windows import Window
from int8qa.training.options import FakeQuantization

if TYPE_CHECKING:
    import torch


def choose_calibration(windows: Sequence[Window]) -> list[Window]:
    """As many windows as the build calibrates on, evenly spaced."""
    return list(windows[:: -(-len(windows) // CALIBRATION_WINDOWS)])


def count_stages(options: FakeQuantization) -> int:
    """Stages of :func:`calibrate`."""
    return 1 + options.smooth + (options.calibrator.method == "search")


def calibrate(
    reader: torch.nn.Module,
    windows: Sequence[Window],
    inputs: Sequence[str],
    options: FakeQuantization,
    progress: BuildProgress,
) -> StoredRanges:
    """Quantizers into ``reader``, in place, smoothed and with ranges.

    Raises:
        RecipeError: the recipe does not fit the model.
        BuildError: a tensor saw no usable data.
    """
    quantized = QuantizedReader(reader, windows, inputs, [options.grids])
    if options.smooth:
        sites = quantized.plan.sites
        leave_out = choose_unsmoothed(sites) if options.tensorrt else frozenset()
        with progress.stage("smooth outliers", steps=len(windows)) as tick:
            quantized.smooth(options.calibrator, tick, leave_out=leave_out)
    name = f"calibrate ({options.recipe.name}, {options.calibrator.name})"
    with progress.stage(name, steps=len(windows)) as tick:
        quantized.collect(tick)
        if options.calibrator.method != "search":
            ranges = quantized.choose(options.calibrator)
    if options.calibrator.method == "search":
        tensors = quantized.count_tensors()
        with progress.stage("search ranges by logit error", steps=tensors) as tick:
            ranges = quantized.choose(options.calibrator, on_tensor=tick)
    set_ranges(reader.model, ranges)
    return take_ranges(reader.model, quantized.plan, options.calibrator.name)


def restore(
    reader: torch.nn.Module,
    inputs: Sequence[str],
    recipe: Recipe,
    stored: StoredRanges,
) -> None:
    """Quantizers into a freshly loaded ``reader``, with ranges known already.

    Raises:
        CheckpointError: the ranges are of another model.
    """
    insert_quantizers(reader.model)
    plan = recipe.choose(find_sites(reader, inputs))
    switch_quantizers(reader.model, plan)
    stored.apply(reader.model)


def plain_weights(model: torch.nn.Module) -> dict[str, Any]:
    """The weights of ``model`` without quantizers, SmoothQuant's scales taken back.

    Both float functions are the same: (X / s)(s W) = X W.
    """
    weights = {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if "_quantizer." not in name
    }
    for name in list(weights):
        gemm, _, kind = name.rpartition(".")
        quantizer = getattr(model.get_submodule(gemm), "input_quantizer", None)
        scale = getattr(quantizer, "pre_quant_scale", None)
        if kind == "weight" and scale is not None:
            weights[name] *= scale.detach().cpu()
    return weights
