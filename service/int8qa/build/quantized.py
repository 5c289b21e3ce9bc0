"""A reader on its way to INT8: quantizers in, smoothed, looked at, exported.

In: a float reader, calibration windows, a recipe. Out: histograms of its activations,
ranges by any calibrator, and one exported graph from which every smaller plan can be
projected. The order of the methods is the order they are called in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from int8qa.build.calibration import (
    Calibrator,
    Histograms,
    Ranges,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.export import export_onnx
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import (
    Plan,
    Recipe,
    insert_quantizers,
    join_plans,
    switch_quantizers,
)
from int8qa.build.range_search import search_ranges, shared_tensors
from int8qa.build.sites import TensorClass, find_sites
from int8qa.build.smoothing import smooth_activations
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch

Tick = Callable[[], None]


def _ignore() -> None:
    """No progress wanted."""


class QuantizedReader:
    """One reader and the tensors that some recipes want; changed in place."""

    def __init__(
        self,
        reader: torch.nn.Module,
        windows: Sequence[Window],
        inputs: Sequence[str],
        recipes: Sequence[Recipe],
    ) -> None:
        self.reader = reader
        self.windows = list(windows)
        self.inputs = tuple(inputs)
        insert_quantizers(reader.model)
        self.sites = find_sites(reader, inputs)
        self.plans: dict[str, Plan] = {
            recipe.name: recipe.choose(self.sites) for recipe in recipes
        }
        self.plan = join_plans(list(self.plans.values()))
        """All that any of the recipes quantizes."""
        switch_quantizers(reader.model, self.plan)
        self.histograms = Histograms({})
        self.chosen: dict[str, str] = {}
        """Candidate the range search took, by activation site."""

    def smooth(
        self,
        calibrator: Calibrator,
        on_window: Tick = _ignore,
        *,
        leave_out: AbstractSet[TensorClass] = frozenset(),
    ) -> dict[str, float]:
        """SmoothQuant, before anything is collected: strengths by GEMM."""
        return smooth_activations(
            self.reader,
            self.windows,
            self.plan,
            self.inputs,
            keep=calibrator.kept_share,
            leave_out=leave_out,
            on_window=on_window,
        )

    def collect(self, on_window: Tick = _ignore) -> None:
        """Histograms of every activation of the plan, in one pass."""
        self.histograms = collect_histograms(
            self.reader, self.windows, self.plan, self.inputs, on_window=on_window
        )

    def count_tensors(self, plan: Plan | None = None) -> int:
        """Different activations of a plan: steps of a range search."""
        return len(shared_tensors(plan or self.plan, self.histograms))

    def choose(
        self,
        calibrator: Calibrator,
        *,
        plan: Plan | None = None,
        on_tensor: Tick = _ignore,
    ) -> Ranges:
        """The range of every site of ``plan``, by default of the whole plan."""
        plan = plan or self.plan
        if calibrator.method != "search":
            return choose_ranges(self.reader.model, plan, self.histograms, calibrator)
        ranges, chosen = search_ranges(
            self.reader,
            self.windows,
            plan,
            self.histograms,
            self.inputs,
            on_tensor=on_tensor,
        )
        self.chosen |= chosen
        return ranges

    def export(self, ranges: Ranges) -> QuantizedGraph:
        """The Q/DQ graph of the whole plan; the ranges are replaced when projecting."""
        set_ranges(self.reader.model, ranges)
        return QuantizedGraph(export_onnx(self.reader, self.inputs), self.plan)
