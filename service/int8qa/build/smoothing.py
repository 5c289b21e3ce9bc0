"""SmoothQuant with a searched strength: outlier channels move into the weights.

In: a reader with quantizers, not yet calibrated, a plan, windows. Out: the same
function, with the input channels of each GEMM scaled to a like range and its weights
scaled back, as far as that lowers the GEMM's own INT8 error. GEMMs that read one tensor
(Q, K and V) share one scale, so that one multiplication and one Q/DQ pair serve all.

Source: Xiao et al. 2022, arXiv:2211.10438, equations 3 and 4. Searching the strength by
the error of the layer's output: Lin et al. 2023, arXiv:2306.00978, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from int8qa.build.feed import run_reader
from int8qa.build.projection import INT8_MAX
from int8qa.build.quantization import Plan, quantizers_off
from int8qa.build.sites import TensorClass
from int8qa.errors import BuildError
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Strengths tried beside none: 0 leaves the range where it is, 1 moves all of it."""
ROWS_PER_WINDOW = 24
"""Tokens of each window the error is measured on, the largest ones among them."""
MAX_ROWS = 1024
_PEAK_ROWS = 4
_SMALLEST = 1e-5
"""Ranges below this count as this: a dead channel must not blow up the scale."""
_RESIDUALS = (TensorClass.ATTENTION_RESIDUAL, TensorClass.FFN_RESIDUAL)


def smooth_activations(
    reader: torch.nn.Module,
    windows: Iterable[Window],
    plan: Plan,
    inputs: Sequence[str],
    *,
    keep: float = 1.0,
    leave_out: AbstractSet[TensorClass] = frozenset(),
    on_window: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Scale the input channels of quantized GEMMs, in place, where that helps.

    With s_j = max|X_j|**alpha / max|W_j|**(1 - alpha) for input channel j, the GEMM
    X W becomes (X / s)(s W). The division is ModelOpt's ``pre_quant_scale``, an
    elementwise product that engines fuse with the quantization behind it.

    Args:
        reader: takes one tensor per name of ``inputs``; holds the quantizers.
        windows: what ranges and errors are measured on; at least one.
        plan: what is quantized; its quantizers are switched on.
        inputs: names of the model's inputs, in order.
        keep: share of absolute values the calibrator will keep, 0-1; the search
            cuts its ranges off likewise.
        leave_out: inputs that stay as they are.
        on_window: called after each window.

    Returns:
        The strength chosen by GEMM, 0.0 where none was best.

    Raises:
        BuildError: no window was given.
    """
    groups = smoothable_gemms(plan, leave_out)
    samples = _sample_inputs(
        reader, windows, inputs, [names[0] for names in groups], on_window
    )
    chosen: dict[str, float] = {}
    for names in groups:
        gemms = [reader.model.get_submodule(name) for name in names]
        alpha, scale = _search_scale(
            samples[names[0]], [gemm.weight.detach() for gemm in gemms], keep
        )
        chosen |= dict.fromkeys(names, alpha)
        if scale is None:
            continue
        for gemm in gemms:
            gemm.weight.data *= scale
            gemm.input_quantizer.pre_quant_scale = 1.0 / scale
    return chosen


def _search_scale(
    rows: torch.Tensor, weights: list[torch.Tensor], keep: float
) -> tuple[float, torch.Tensor | None]:
    """The strength, and its scale [K], that lowers the INT8 error of X W most.

    Args:
        rows: samples of X, float32 [N, K].
        weights: of the GEMMs that read X, each [outputs, K].
        keep: see :func:`smooth_activations`.
    """
    import torch

    weight = torch.cat(weights)
    exact = rows @ weight.T
    peaks = rows.abs().amax(0).clamp(min=_SMALLEST)
    reach = weight.abs().amax(0).clamp(min=_SMALLEST)

    def error(scale: torch.Tensor) -> float:
        activation = rows / scale
        found = _fake_quantize(activation, _kept_range(activation, keep))
        scaled = weight * scale
        return float(
            (found @ _fake_quantize(scaled, scaled.abs().amax(1, keepdim=True)).T)
            .sub_(exact)
            .square_()
            .mean()
        )

    best = (error(torch.ones_like(peaks)), 0.0, None)
    for alpha in ALPHAS:
        scale = peaks**alpha / reach ** (1.0 - alpha)
        # Only the ratios matter; a geometric mean of 1 keeps the numbers readable.
        scale = scale / scale.log().mean().exp()
        candidate = error(scale)
        if candidate < best[0]:
            best = (candidate, alpha, scale)
    return best[1], best[2]


def _fake_quantize(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Symmetric INT8 and back: round(x * 127 / amax), clipped, times amax / 127."""
    step = amax.clamp(min=_SMALLEST * _SMALLEST) / INT8_MAX
    return (values / step).round_().clamp_(-INT8_MAX, INT8_MAX) * step


def _kept_range(values: torch.Tensor, keep: float) -> torch.Tensor:
    """The value below which a share ``keep`` of the absolute values lies."""
    magnitudes = values.abs().flatten()
    rank = min(math.ceil(keep * len(magnitudes)), len(magnitudes))
    return magnitudes.kthvalue(max(rank, 1)).values


def smoothable_gemms(
    plan: Plan, leave_out: AbstractSet[TensorClass] = frozenset()
) -> list[list[str]]:
    """Quantized GEMMs of ``plan``, grouped by the tensor they read.

    A tensor that a residual branch reads on the same grid is left out: smoothed for
    the GEMM it would need a second grid, and an add of two INT8 tensors no longer
    shares its input with the GEMM.
    """
    residual = {
        site.tensor for site in plan.activations if site.tensor_class in _RESIDUALS
    }
    groups: dict[int, list[str]] = {}
    for site in plan.activations:
        if site.tensor_class in leave_out:
            continue
        gemm, _, kind = site.name.rpartition(".")
        weighed = f"{gemm}.weight_quantizer" in plan.names
        if kind == "input_quantizer" and weighed and site.tensor not in residual:
            groups.setdefault(site.tensor, []).append(gemm)
    return list(groups.values())


def _sample_inputs(
    reader: torch.nn.Module,
    windows: Iterable[Window],
    inputs: Sequence[str],
    gemms: Sequence[str],
    on_window: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Rows of each GEMM's input, float32 [N, K].

    Runs in float. Each window gives its largest rows (outliers sit on few tokens) and
    evenly spaced others.
    """
    import torch

    parts: dict[str, list[torch.Tensor]] = {name: [] for name in gemms}

    def make_hook(kept: list[torch.Tensor]) -> Callable[[Any, Any], None]:
        def hook(_module: Any, arguments: Any) -> None:
            rows = arguments[0].detach().flatten(0, -2)
            peaks = rows.abs().amax(1).topk(min(_PEAK_ROWS, len(rows))).indices
            spread = torch.linspace(
                0, len(rows) - 1, min(ROWS_PER_WINDOW - _PEAK_ROWS, len(rows))
            )
            picked = torch.cat((peaks, spread.long())).unique()
            kept.append(rows[picked])

        return hook

    hooks = [
        reader.model.get_submodule(name).register_forward_pre_hook(make_hook(kept))
        for name, kept in parts.items()
    ]
    try:
        with torch.no_grad(), quantizers_off(reader.model):
            for window in windows:
                run_reader(reader, window, inputs)
                on_window()
    finally:
        for hook in hooks:
            hook.remove()
    samples = {}
    for name, found in parts.items():
        if not found:
            raise BuildError("SmoothQuant needs at least one calibration window")
        rows = torch.cat(found)
        step = max(1, len(rows) // MAX_ROWS)
        samples[name] = rows[::step][:MAX_ROWS]
    return samples
