"""Activation ranges: how far a tensor reaches, and where to cut it off.

In: a model with ModelOpt's quantizers in it and windows to feed it. Out: an ``amax``
for every site of a plan. One pass collects a histogram per tensor; a calibrator then
only reads it, so a further method costs no further pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from int8qa.build.feed import run_reader
from int8qa.build.quantization import Plan, quantizers_by_name
from int8qa.build.sites import Site, TensorClass
from int8qa.errors import BuildError
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch

    from int8qa.build.histogram import ActivationHistogram

Method = Literal["max", "percentile", "mse", "entropy", "search"]

DEFAULT_PERCENTILE = 99.999
"""Keeps BERT's outliers and cuts the few values that would coarsen the grid for all.
Source: Wu et al. 2020, arXiv:2004.09602, table 6 (BERT: 99.999 % is best)."""

Ranges = dict[str, Any]
"""``amax`` by site name: a float, or float32 [outputs, 1] for per-channel weights."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """How an activation's histogram becomes its ``amax``.

    ``search`` is none of itself: it takes, tensor by tensor, what another calibrator
    gives (range_search.py).
    """

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
        """Share of absolute values that are known not to be cut off, 0-1."""
        return self.percentile / 100 if self.method == "percentile" else 1.0

    def compute_amax(self, histogram: ActivationHistogram) -> float | None:
        """The ``amax`` of one tensor, None if it saw nothing but zeros."""
        if not histogram.peak:
            return None
        if self.method == "search":
            raise BuildError("the range search reads logits, not one histogram")
        if self.method == "max":
            return histogram.peak
        if self.method == "percentile":
            found = histogram.compute_amax("percentile", percentile=self.percentile)
        else:
            found = histogram.compute_amax(self.method)
        return None if found is None else float(found)


def parse_calibrator(name: str) -> Calibrator:
    """A calibrator from its name: ``max``, ``percentile-99.99``, ``search``.

    Raises:
        BuildError: no calibrator is called so.
    """
    method, _, share = name.partition("-")
    try:
        if method == "percentile":
            return Calibrator("percentile", float(share or DEFAULT_PERCENTILE))
    except ValueError:
        pass
    else:
        for known in get_args(Method):
            if name == known:
                return Calibrator(known)
    raise BuildError(
        f"no calibrator is called {name!r}; known are max, percentile-N with N in "
        f"percent (percentile-99.99), mse, entropy and search"
    )


class Histograms:
    """What the calibration windows showed of every activation of a plan."""

    def __init__(self, by_site: Mapping[str, ActivationHistogram]) -> None:
        self.by_site = by_site
        """Sites that read one tensor share one histogram."""
        self._known: dict[tuple[int, str], float | None] = {}

    def compute_amax(self, site: Site, calibrator: Calibrator) -> float:
        """The ``amax`` of one activation; remembered, as mse and entropy search.

        Raises:
            BuildError: the site saw no data.
        """
        histogram = self.by_site.get(site.name)
        key = (id(histogram), calibrator.name)
        if histogram is not None and key not in self._known:
            self._known[key] = calibrator.compute_amax(histogram)
        amax = self._known.get(key)
        if amax is None or not amax > 0.0:
            raise BuildError(
                f"{site.place} ({site.name}) saw no usable data during calibration; "
                f"calibrate with more or other questions"
            )
        return amax


def collect_histograms(
    reader: torch.nn.Module,
    windows: Iterable[Window],
    plan: Plan,
    inputs: Sequence[str],
    *,
    on_window: Callable[[], None] = lambda: None,
) -> Histograms:
    """Feed ``windows`` one by one, in float, and count what passes each site.

    Windows go in unpadded: the activations of padding are no data, and counted in a
    histogram they would move its percentiles.

    Args:
        reader: takes one tensor per name of ``inputs``; its quantizers are switched
            as the plan says, before and after.
        windows: the calibration set.
        plan: whose activations are looked at.
        inputs: names of the model's inputs, in order.
        on_window: called after each window.

    Raises:
        BuildError: the model computes NaN or infinity.
    """
    import torch

    quantizers = quantizers_by_name(reader.model)
    active = [quantizers[name] for name in plan.names]
    first: dict[tuple[int, bool], str] = {}
    by_site: dict[str, ActivationHistogram] = {}
    for site in plan.activations:
        quantizer = quantizers[site.name]
        # A smoothed tensor is another tensor than the one it was made from.
        smoothed = getattr(quantizer, "pre_quant_scale", None) is not None
        name = first.setdefault((site.tensor, smoothed), site.name)
        by_site[site.name] = quantizers[name]._calibrator  # noqa: SLF001
    for quantizer in active:
        quantizer.disable_quant()
    for name in first.values():
        quantizers[name]._calibrator.reset()  # noqa: SLF001
        quantizers[name].enable_calib()
    try:
        with torch.no_grad():
            for window in windows:
                run_reader(reader, window, inputs)
                on_window()
    except FloatingPointError as error:
        raise BuildError(
            f"calibration met {error}: the checkpoint's weights are damaged, "
            f"or overflow in float32"
        ) from error
    finally:
        for quantizer in active:
            quantizer.disable_calib()
            quantizer.enable_quant()
    return Histograms(by_site)


def choose_ranges(
    model: torch.nn.Module,
    plan: Plan,
    histograms: Histograms,
    calibrator: Calibrator,
) -> Ranges:
    """The ``amax`` of every site of ``plan``.

    A weight's range is known, there is nothing to estimate: whatever the calibrator,
    it is the largest absolute value of its channel, or of the whole tensor.

    Raises:
        BuildError: a site saw no data.
    """
    ranges: Ranges = {}
    for site in plan.sites:
        if site.is_weight:
            weight = model.get_submodule(site.name.rpartition(".")[0]).weight.detach()
            per_channel = plan.per_channel[site.name]
            peaks = weight.abs().amax(1, keepdim=True)
            if not per_channel:
                peaks = peaks.max()
            # Zeros alone (a pruned channel) are exact on any grid; no engine takes
            # a scale of zero.
            peaks = peaks.masked_fill(peaks == 0.0, 1.0)
            ranges[site.name] = peaks if per_channel else float(peaks)
        else:
            ranges[site.name] = histograms.compute_amax(site, calibrator)
    share_ranges(plan, ranges)
    return ranges


_FUSED = (
    frozenset({TensorClass.QUERY, TensorClass.KEY, TensorClass.VALUE}),
    frozenset({TensorClass.QKV_WEIGHT}),
)


def share_ranges(plan: Plan, ranges: Ranges) -> None:
    """If the recipe shares: one range for Q, K and V, one for per-tensor weights."""
    if not plan.share_qkv:
        return
    groups: dict[tuple[int | None, int], list[str]] = {}
    for site in plan.sites:
        for index, classes in enumerate(_FUSED):
            single = isinstance(ranges[site.name], float)
            if site.tensor_class in classes and single:
                groups.setdefault((site.layer, index), []).append(site.name)
    for names in groups.values():
        widest = max(ranges[name] for name in names)
        ranges.update(dict.fromkeys(names, widest))


def set_ranges(model: torch.nn.Module, ranges: Ranges) -> None:
    """Hand every ``amax`` to its quantizer."""
    quantizers = quantizers_by_name(model)
    for name, amax in ranges.items():
        set_amax(quantizers[name], amax)


def set_amax(quantizer: Any, amax: Any) -> None:
    """Hand one quantizer its ``amax``, of whatever shape the last one was."""
    import torch

    # ModelOpt refuses an amax of another shape (per channel after per tensor), and its
    # reset_amax would empty the histogram as well.
    if hasattr(quantizer, "_amax"):
        del quantizer._amax  # noqa: SLF001
    quantizer.amax = torch.as_tensor(amax, dtype=torch.float32)
