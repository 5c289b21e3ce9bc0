"""The range of each tensor by what it does to the logits.

In: a reader with quantizers, histograms, a few windows. Out: for every activation the
``amax`` that, with this tensor alone quantized, moves the logits least. No fixed rule
suits all tensors of a BERT: the input of QKV must keep its largest values, which sit on
the few tokens that attention parks on; the output of the FFN must lose them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from int8qa.build.calibration import (
    Calibrator,
    Histograms,
    Ranges,
    choose_ranges,
    set_amax,
    share_ranges,
)
from int8qa.build.feed import window_feed
from int8qa.build.quantization import Plan, quantizers_by_name, quantizers_off
from int8qa.errors import BuildError
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch

CANDIDATES = (
    Calibrator("percentile", 99.999),
    Calibrator("percentile", 99.9999),
    Calibrator("percentile", 99.99),
    Calibrator("max"),
)
"""Entropy and lower percentiles lose on every BERT tensor we measured; mse is rarely
best, never by much, and slow to compute (docs/quantization.md)."""
PROBE_WINDOWS = 8
"""Windows the error is measured on, evenly spaced over those given."""


class LogitProbe:
    """What quantizing some tensors does to the logits of a few windows.

    In float32 torch with ModelOpt's fake quantization: exact arithmetic around the
    quantizers, so that what is seen is theirs alone.
    """

    def __init__(
        self,
        reader: torch.nn.Module,
        windows: Sequence[Window],
        plan: Plan,
        inputs: Sequence[str],
    ) -> None:
        if not windows:
            raise BuildError("a probe of the logits needs at least one window")
        self._reader = reader
        self._inputs = inputs
        self._windows = list(windows[:: -(-len(windows) // PROBE_WINDOWS)])
        self._quantizers = quantizers_by_name(reader.model)
        self._layers = EncoderLayers(reader.model, plan)
        with _no_gradients(), quantizers_off(reader.model), self._layers.recording():
            self._exact = list(self._run())
        self._values = sum(exact.numel() for exact in self._exact)

    def measure(self, ranges: Mapping[str, Any], *, limit: float = math.inf) -> float:
        """Root mean square of the logits' error with only these sites quantized.

        Args:
            ranges: ``amax`` by site name.
            limit: an error known to be too large; infinity is returned as soon as
                it is certain to be passed.
        """
        most = limit * limit * self._values
        squares = 0.0
        with _no_gradients(), quantizers_off(self._reader.model):
            for name, amax in ranges.items():
                set_amax(self._quantizers[name], amax)
                self._quantizers[name].enable()
            try:
                with self._layers.replaying(list(ranges)):
                    for found, exact in zip(self._run(), self._exact, strict=True):
                        squares += float((found - exact).square().sum())
                        if not squares <= most:
                            return math.inf
            finally:
                for name in ranges:
                    self._quantizers[name].disable()
        return math.sqrt(squares / self._values)

    def _run(self) -> Iterator[Any]:
        """Start and end logits of each window in turn, float32 [2, S]."""
        import torch

        for window in self._windows:
            feed = window_feed(window, self._inputs)
            start, end = self._reader(
                *(torch.from_numpy(feed[name]) for name in self._inputs)
            )
            yield torch.cat((start, end))


def search_ranges(
    reader: torch.nn.Module,
    windows: Sequence[Window],
    plan: Plan,
    histograms: Histograms,
    inputs: Sequence[str],
    *,
    on_tensor: Callable[[], None] = lambda: None,
) -> tuple[Ranges, dict[str, str]]:
    """The range of every site of ``plan``, activations by their logit error.

    Args:
        reader: holds the quantizers, switched as ``plan`` says.
        windows: the calibration set; a few of them are used.
        plan: what is quantized.
        histograms: of its activations.
        inputs: names of the model's inputs, in order.
        on_tensor: called after each tensor.

    Returns:
        The ranges, and the name of the candidate chosen by activation site.

    Raises:
        BuildError: no window was given, or a site saw no data.
    """
    ranges = choose_ranges(reader.model, plan, histograms, Calibrator("max"))
    probe = LogitProbe(reader, windows, plan, inputs)
    sites = {site.name: site for site in plan.sites}
    chosen: dict[str, str] = {}
    for names in shared_tensors(plan, histograms):
        amaxes: dict[float, str] = {}
        for candidate in CANDIDATES:
            amax = histograms.compute_amax(sites[names[0]], candidate)
            amaxes.setdefault(amax, candidate.name)
        best = float("inf")
        for amax, candidate_name in amaxes.items():
            error = probe.measure(dict.fromkeys(names, amax), limit=best)
            if error < best:
                best = error
                ranges.update(dict.fromkeys(names, amax))
                chosen.update(dict.fromkeys(names, candidate_name))
        on_tensor()
    share_ranges(plan, ranges)
    return ranges, chosen


class EncoderLayers:
    """Spares a forward pass the layers before the one that changed.

    While recording, each encoder layer's outputs are kept, call by call. While
    replaying for some sites, the layers before the first of them answer from what
    was kept, as long as the calls come in the same order.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan) -> None:
        self._modules = _find_layers(model, plan)
        self._outputs: list[list[Any]] = [[] for _ in self._modules]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what every layer answers."""

        def make_hook(kept: list[Any]) -> Any:
            def hook(_module: Any, _arguments: Any, output: Any) -> None:
                kept.append(output)

            return hook

        hooks = []
        for kept, (_, module) in zip(self._outputs, self._modules, strict=True):
            kept.clear()
            hooks.append(module.register_forward_hook(make_hook(kept)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def replaying(self, sites: Sequence[str]) -> Iterator[None]:
        """Run only from the first layer on that holds one of ``sites``."""
        first = next(
            (
                index
                for index, (name, _) in enumerate(self._modules)
                if any(site.startswith(f"{name}.") for site in sites)
            ),
            0,
        )
        if any(
            not any(site.startswith(f"{name}.") for name, _ in self._modules)
            for site in sites
        ):
            first = 0  # a site outside the encoder: before it, or behind it
        skipped = self._modules[:first]
        for kept, (_, module) in zip(self._outputs, skipped, strict=False):
            answers = iter(kept)
            module.forward = lambda *_args, _answers=answers, **_kwargs: next(_answers)
        try:
            yield
        finally:
            for _, module in skipped:
                del module.forward


def _find_layers(model: torch.nn.Module, plan: Plan) -> list[tuple[str, Any]]:
    """The encoder's layers, if each is one module of a list and called once."""
    import torch

    names = [site.name for site in plan.sites if site.layer is not None]
    for prefix, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) < 2:
            continue
        inside = [name for name in names if name.startswith(f"{prefix}.")]
        count = len({site.layer for site in plan.sites if site.layer is not None})
        if inside and len(module) == count:
            return [(f"{prefix}.{index}", child) for index, child in enumerate(module)]
    return []


def shared_tensors(plan: Plan, histograms: Histograms) -> list[list[str]]:
    """Activation sites of ``plan``, grouped by the tensor they read."""
    groups: dict[int, list[str]] = {}
    for site in plan.activations:
        groups.setdefault(id(histograms.by_site[site.name]), []).append(site.name)
    return list(groups.values())


@contextlib.contextmanager
def _no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield
