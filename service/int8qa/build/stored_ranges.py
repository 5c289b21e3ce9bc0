"""Ranges that lie beside a checkpoint's weights, because it was trained with them.

In: a reader with calibrated quantizers; or a checkpoint's directory. Out: one
safetensors file of every ``amax`` and every SmoothQuant scale; or the same back in a
reader, in place of smoothing and calibration. The weights on disk are plain ones: any
program can run them in float.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa.build.calibration import Ranges, set_ranges, share_ranges
from int8qa.build.quantization import Plan, quantizers_by_name
from int8qa.build.sites import TensorClass
from int8qa.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TRAINED = "trained"
"""In place of a calibrator's name, where these ranges are used."""
RANGES_FILENAME = "quantizer_ranges.safetensors"
"""Of the checkpoint's ``*.safetensors``: it is fetched from the hub with the weights,
and part of the checkpoint's hash."""
_METADATA = "int8qa"
_FORMAT = 1
_AMAX = "amax/"
_SCALE = "pre_quant_scale/"
_SOFTMAX_SITE = "p_bmm_quantizer"


@dataclass(frozen=True, slots=True)
class StoredRanges:
    """What a reader was trained with."""

    recipe: str
    """Its name."""
    calibrator: str
    grids: dict[str, str]
    """By site name: see ``Plan.describe_grid``."""
    ranges: Ranges
    scales: dict[str, torch.Tensor]
    """``pre_quant_scale`` [K] by name of the input quantizer; empty if not smoothed."""

    def suits_softmax(self, *, signed: bool) -> bool:
        """Whether an engine whose softmax is ``signed``, or is not, has these grids."""
        grids = {
            grid for name, grid in self.grids.items() if name.endswith(_SOFTMAX_SITE)
        }
        return not grids or ("UINT8" not in grids) == signed

    def explain_difference(
        self,
        plan: Plan,
        *,
        smooth: bool = True,
        leave_out: AbstractSet[TensorClass] = frozenset(),
    ) -> str:
        """Why these ranges are not for a build of ``plan``; empty if they are.

        Args:
            plan: what is to be quantized, on the target's grids.
            smooth: whether SmoothQuant is allowed.
            leave_out: classes that it must leave alone.
        """
        wanted = {site.name: plan.describe_grid(site) for site in plan.sites}
        if wanted != self.grids:
            return self._explain_grids(plan, wanted)
        shared = dict(self.ranges)
        share_ranges(plan, shared)
        single = {n: a for n, a in self.ranges.items() if isinstance(a, float)}
        if any(shared[name] != amax for name, amax in single.items()):
            return (
                "query, key and value were trained with a scale each, not a shared one"
            )
        if self.scales and not smooth:
            return "it was trained with SmoothQuant; leave --no-smooth out to keep them"
        smoothed = {s.tensor_class for s in plan.sites if s.name in self.scales}
        if smoothed & leave_out:
            return (
                f"{', '.join(sorted(smoothed & leave_out))} was smoothed in training, "
                f"which keeps INT8 attention from fusing; train with --target tensorrt "
                f"to keep them"
            )
        return ""

    def _explain_grids(self, plan: Plan, wanted: Mapping[str, str]) -> str:
        more = len(wanted.keys() - self.grids.keys())
        less = len(self.grids.keys() - wanted.keys())
        both = wanted.keys() & self.grids.keys()
        other = sum(wanted[name] != self.grids[name] for name in both)
        advice = (
            f"build with --recipe {self.recipe} to keep them"
            if self.recipe != plan.recipe
            else "train with the recipe and the --target of the build to keep them"
        )
        return (
            f"it was trained with the recipe {self.recipe}; {plan.recipe} quantizes "
            f"{more} more tensors, {less} fewer and {other} on another grid; {advice}"
        )

    def apply(self, model: torch.nn.Module) -> None:
        """Put scales and ranges into a freshly loaded ``model`` with quantizers.

        A weight that grew beyond its range in training is cut off there: that is what
        its grid does, but for the lowest code, -128, which no weight of ours has.

        Raises:
            CheckpointError: the ranges are of another model.
        """
        import torch

        quantizers = quantizers_by_name(model)
        modules = dict(model.named_modules())
        for name, amax in self.ranges.items():
            if name not in quantizers:
                raise _other_model(f"there is no {name} here")
            if not isinstance(amax, float):
                outputs = modules[name.rpartition(".")[0]].weight.shape[0]
                _check_shape(name, amax, (outputs, 1))
        for name, scale in self.scales.items():
            gemm = modules[name.rpartition(".")[0]]
            _check_shape(name, scale, (gemm.weight.shape[1],))
            gemm.weight.data /= scale
            gemm.input_quantizer.pre_quant_scale = scale.clone()
        for name, amax in self.ranges.items():
            if name.endswith(".weight_quantizer"):
                weight = modules[name.rpartition(".")[0]].weight.data
                limit = torch.as_tensor(amax)
                weight.clamp_(-limit, limit)
        set_ranges(model, self.ranges)


def _other_model(fault: str) -> CheckpointError:
    return CheckpointError(
        f"{RANGES_FILENAME} is of another model: {fault}. Delete it to calibrate anew"
    )


def _check_shape(name: str, found: torch.Tensor, expected: tuple[int, ...]) -> None:
    shape = tuple(found.shape)
    if shape != expected:
        raise _other_model(f"{name} has the shape {shape}, expected {expected}")


def take_ranges(model: torch.nn.Module, plan: Plan, calibrator: str) -> StoredRanges:
    """The ranges and scales that ``model`` computes with now."""
    quantizers = quantizers_by_name(model)
    ranges: Ranges = {}
    scales = {}
    for site in plan.sites:
        quantizer = quantizers[site.name]
        amax = quantizer.amax.detach().float().cpu()
        per_channel = plan.per_channel[site.name]
        ranges[site.name] = amax.clone() if per_channel else amax.item()
        scale = getattr(quantizer, "pre_quant_scale", None)
        if scale is not None:
            scales[site.name] = scale.detach().float().cpu().clone()
    return StoredRanges(
        recipe=plan.recipe,
        calibrator=calibrator,
        grids={site.name: plan.describe_grid(site) for site in plan.sites},
        ranges=ranges,
        scales=scales,
    )


def write_ranges(directory: Path, stored: StoredRanges) -> Path:
    """Write ``quantizer_ranges.safetensors`` into ``directory``."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        _AMAX + name: torch.as_tensor(amax, dtype=torch.float32)
        for name, amax in stored.ranges.items()
    } | {_SCALE + name: scale for name, scale in stored.scales.items()}
    about = {
        "format": _FORMAT,
        "recipe": stored.recipe,
        "calibrator": stored.calibrator,
        "grids": stored.grids,
    }
    path = directory / RANGES_FILENAME
    # One entry: safetensors writes several in random order, and the file is hashed.
    save_file(tensors, path, {_METADATA: json.dumps(about)})
    return path


def has_ranges(directory: Path) -> bool:
    """Whether the checkpoint in ``directory`` was trained with ranges."""
    return (directory / RANGES_FILENAME).is_file()


def read_ranges(directory: Path) -> StoredRanges | None:
    """What ``directory`` holds of ranges; None if the checkpoint has none.

    Raises:
        CheckpointError: the file is there, but damaged or of another format.
    """
    path = directory / RANGES_FILENAME
    if not has_ranges(directory):
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has the format {about['format']!r}; known is {_FORMAT}. "
                f"Delete it to calibrate anew"
            )
        grids = {str(name): str(grid) for name, grid in about["grids"].items()}
        stored = StoredRanges(
            recipe=str(about["recipe"]),
            calibrator=str(about["calibrator"]),
            grids=grids,
            ranges={
                name: _as_range(tensors[_AMAX + name], grid)
                for name, grid in grids.items()
            },
            scales={
                name: _positive(tensors[_SCALE + name])
                for name in grids
                if _SCALE + name in tensors
            },
        )
    except (
        AttributeError,
        OSError,
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); delete it to calibrate anew"
        ) from error
    return stored


def choose_stored(
    directory: Path,
    plan: Plan,
    *,
    calibrator: str | None,
    smooth: bool,
    leave_out: AbstractSet[TensorClass] = frozenset(),
) -> tuple[StoredRanges | None, str]:
    """The ranges a build is to use; else None, and why not those that are there.

    Args:
        directory: of the checkpoint.
        plan: see :meth:`StoredRanges.explain_difference`, as ``smooth``, ``leave_out``.
        calibrator: asked for by name; None if none was.
        smooth: see ``plan``.
        leave_out: see ``plan``.

    Raises:
        CheckpointError: there are ranges, but damaged or of another format.
    """
    if not has_ranges(directory):
        return None, ""
    if calibrator is not None:
        return None, f"--calibrator {calibrator} was asked for"
    stored = read_ranges(directory)
    assert stored is not None
    difference = stored.explain_difference(plan, smooth=smooth, leave_out=leave_out)
    return (None, difference) if difference else (stored, "")


def _as_range(tensor: torch.Tensor, grid: str) -> Any:
    amax = _positive(tensor)
    return amax if grid.endswith("per channel") else amax.item()


def _positive(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel() or not bool((tensor > 0).all()):
        raise ValueError("a range that is not above zero")
    if not math.isfinite(float(tensor.max())):
        raise ValueError("a range without end")
    return tensor.float()
