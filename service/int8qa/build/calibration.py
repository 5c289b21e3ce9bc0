"""Activation ranges: how far a tensor reaches, and where to cut it off.

In: a model with ModelOpt's quantizers in it and windows to feed it. Out: an ``amax``
on every enabled quantizer. One pass collects a histogram per activation; a calibrator
then only reads it, so a further method costs no further pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from int8qa.build.feed import run_reader
from int8qa.errors import BuildError
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch

Method = Literal["max", "percentile"]

DEFAULT_PERCENTILE = 99.999
"""Keeps BERT's outliers and cuts the few values that would coarsen the grid for all.
Source: Wu et al. 2020, arXiv:2004.09602, table 6 (BERT: 99.999 % is best)."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """How an activation's histogram becomes its ``amax``."""

    method: Method = "percentile"
    percentile: float = DEFAULT_PERCENTILE
    """Share of absolute values kept, in percent; only for ``percentile``."""

    def __post_init__(self) -> None:
        if self.method == "percentile" and not 50.0 < self.percentile <= 100.0:
            raise BuildError(
                f"percentile is {self.percentile}; allowed: above 50, at most 100 "
                f"(BERT needs 99.99 or more)"
            )

    @property
    def name(self) -> str:
        """As it stands in the manifest and in metrics: ``percentile-99.999``."""
        if self.method == "percentile":
            return f"percentile-{self.percentile:.12g}"
        return self.method

    @property
    def kept_share(self) -> float:
        """Share of absolute values that are not cut off, 0-1."""
        return self.percentile / 100 if self.method == "percentile" else 1.0

    def compute_amax(self, collector: Any) -> torch.Tensor | None:
        """The ``amax`` of one ModelOpt calibrator that has seen the data.

        Weight quantizers collect their exact per-channel maximum, whatever the
        method: their range is known, there is nothing to estimate.
        """
        import torch

        from int8qa.build.histogram import ActivationHistogram

        if not isinstance(collector, ActivationHistogram):
            return collector.compute_amax()
        if not collector.peak:
            return None
        if self.method == "max":
            return torch.tensor(collector.peak)
        return collector.compute_amax("percentile", percentile=self.percentile)


def calibrate(
    reader: torch.nn.Module,
    windows: Iterable[Window],
    calibrator: Calibrator,
    inputs: Sequence[str],
    *,
    on_window: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Feed ``windows`` one by one and set the ``amax`` of every enabled quantizer.

    Windows go in unpadded: the activations of padding are no data, and counted in a
    histogram they would move its percentiles.

    Args:
        reader: takes one tensor per name of ``inputs``; holds the quantizers.
        windows: the calibration set.
        calibrator: how ranges are chosen.
        inputs: names of the model's inputs, in order.
        on_window: called after each window.

    Returns:
        The ``amax`` of each activation quantizer by name.

    Raises:
        BuildError: a quantizer saw no data.
    """
    import torch
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import TensorQuantizer

    enable_stats_collection(reader)
    with torch.no_grad():
        for window in windows:
            try:
                run_reader(reader, window, inputs)
            except FloatingPointError as error:
                raise BuildError(
                    f"calibration met {error}: the checkpoint's weights are damaged, "
                    f"or overflow in float32"
                ) from error
            on_window()

    ranges: dict[str, float] = {}
    for name, module in reader.named_modules():
        if not isinstance(module, TensorQuantizer) or not module._if_calib:  # noqa: SLF001
            continue
        amax = calibrator.compute_amax(module._calibrator)  # noqa: SLF001
        if amax is None or not bool(torch.isfinite(amax).all()):
            raise BuildError(
                f"the quantizer {name} saw no usable data during calibration; "
                f"calibrate with more or other questions"
            )
        module.amax = amax
        module.enable_quant()
        module.disable_calib()
        if amax.numel() == 1:
            ranges[name] = float(amax)
    return ranges
