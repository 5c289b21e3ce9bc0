"""SmoothQuant: the same function, less INT8 error, one scale per shared tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from int8qa.build.calibration import (
    Calibrator,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.census import take_census
from int8qa.build.export import export_onnx
from int8qa.build.feed import window_feed
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    insert_quantizers,
    quantizers_by_name,
    quantizers_off,
    switch_quantizers,
)
from int8qa.build.sites import Site, TensorClass, find_sites
from int8qa.build.smoothing import (
    _search_scale,
    smooth_activations,
    smoothable_gemms,
)
from int8qa.errors import BuildError
from int8qa.reader.windows import Window
from tests.build.tiny import ARCHITECTURES, TinyReader, insert_and_find, make_reader


@dataclass(frozen=True)
class Uneven:
    """A tiny BERT with one outlier channel in each LayerNorm's output."""

    reader: TinyReader
    sites: list[Site]

    def plan(self, recipe: str) -> Plan:
        plan = RECIPES[recipe].choose(self.sites)
        switch_quantizers(self.reader.model, plan)
        return plan

    def smooth(
        self,
        windows: list[Window],
        plan: Plan,
        on_window: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        return smooth_activations(
            self.reader.wrapped, windows, plan, self.reader.inputs, on_window=on_window
        )

    def calibrate(self, windows: list[Window], plan: Plan) -> dict[str, object]:
        """Ranges by max."""
        reader = self.reader
        found = collect_histograms(reader.wrapped, windows, plan, reader.inputs)
        ranges = choose_ranges(reader.model, plan, found, Calibrator("max"))
        set_ranges(reader.model, ranges)
        return ranges

    def logits(self, windows: list[Window]) -> np.ndarray:
        return np.concatenate(
            [
                np.concatenate(
                    self.reader.run_torch(window_feed(w, self.reader.inputs))
                )
                for w in windows
            ],
            axis=1,
        )

    def float_logits(self, windows: list[Window]) -> np.ndarray:
        with quantizers_off(self.reader.model):
            return self.logits(windows)


def make_uneven() -> Uneven:
    reader = make_reader("bert")
    for name, module in reader.model.named_modules():
        if "LayerNorm" in name:
            module.weight.data[3] *= 40.0
    insert_quantizers(reader.model)
    return Uneven(reader, find_sites(reader.wrapped, reader.inputs))


@pytest.fixture
def uneven() -> Uneven:
    return make_uneven()


@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
def test_smoothing_keeps_the_float_function(
    uneven: Uneven, windows: list[Window], recipe: str
) -> None:
    """Without quantization the smoothed model gives the same logits."""
    before = uneven.float_logits(windows)
    plan = uneven.plan(recipe)
    chosen = uneven.smooth(windows, plan)
    assert any(chosen.values())
    after = uneven.float_logits(windows)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


def test_smoothing_lowers_the_int8_error(windows: list[Window]) -> None:
    """With an outlier channel, smoothed INT8 is nearer to float than plain INT8."""
    errors = []
    for smooth in (False, True):
        subject = make_uneven()
        exact = subject.float_logits(windows)
        plan = subject.plan("linear")
        if smooth:
            subject.smooth(windows, plan)
        subject.calibrate(windows, plan)
        errors.append(float(np.square(subject.logits(windows) - exact).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_query_key_and_value_share_one_scale_and_one_pair(
    uneven: Uneven, windows: list[Window]
) -> None:
    """The graph has one product and one Q/DQ pair where three GEMMs read."""
    plan = uneven.plan("linear")
    ticks: list[None] = []
    chosen = uneven.smooth(windows, plan, lambda: ticks.append(None))
    assert len(ticks) == len(windows)
    quantizers = quantizers_by_name(uneven.reader.model)
    for layer in (0, 1):
        names = [
            f"bert.encoder.layer.{layer}.attention.self.{part}"
            for part in ("query", "key", "value")
        ]
        assert len({chosen[name] for name in names}) == 1
        assert chosen[names[0]] > 0
        scales = [
            quantizers[f"{name}.input_quantizer"].pre_quant_scale for name in names
        ]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        # The outlier is divided most.
        assert scales[0].argmin() == 3
    ranges = uneven.calibrate(windows, plan)
    exported = export_onnx(uneven.reader.wrapped, uneven.reader.inputs)
    graph = QuantizedGraph(exported, plan).project(plan, ranges)
    census = take_census(graph, plan, uneven.sites, ranges)
    # Per layer: QKV, attention output, intermediate, output.
    assert census.quantize_nodes == 2 * 4
    assert census.quantized_matmuls == 2 * 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_can_be_smoothed(name: str) -> None:
    """GEMMs by the tensor they read, but for tensors that residual adds read too."""
    sites = insert_and_find(name)[1]
    classes = {site.name.rpartition(".")[0]: site.tensor_class for site in sites}
    kinds = {
        recipe: [
            [str(classes[gemm]) for gemm in group]
            for group in smoothable_gemms(RECIPES[recipe].choose(sites))
        ]
        for recipe in ("linear", "full")
    }
    qkv = [str(TensorClass.QKV_WEIGHT)] * 3
    output = [str(TensorClass.ATTENTION_OUTPUT_WEIGHT)]
    ffn_in = [str(TensorClass.FFN_IN_WEIGHT)]
    ffn_out = [str(TensorClass.FFN_OUT_WEIGHT)]
    outside = [[str(TensorClass.PROJECTION_WEIGHT)]] if name == "electra" else []
    assert sorted(kinds["linear"]) == sorted(
        2 * [qkv, output, ffn_in, ffn_out] + outside
    )
    assert sorted(kinds["full"]) == sorted(2 * [output, ffn_out] + outside)


def test_gemms_in_float_are_left_alone(uneven: Uneven, windows: list[Window]) -> None:
    """No scale where the plan leaves the weight or the input in float."""
    plan = uneven.plan("linear")
    gone = frozenset(
        site.name
        for site in plan.sites
        if (site.tensor_class, site.layer)
        in {(TensorClass.FFN_IN_WEIGHT, 0), (TensorClass.FFN_OUT_INPUT, 1)}
    )
    assert len(gone) == 2
    left = {name.rpartition(".")[0] for name in gone}
    smaller = plan.without(gone)
    switch_quantizers(uneven.reader.model, smaller)
    weights = {
        name: uneven.reader.model.get_submodule(name).weight.detach().clone()
        for name in left
    }
    chosen = uneven.smooth(windows, smaller)
    assert len(chosen) == 12 - 2
    assert not left & chosen.keys()
    quantizers = quantizers_by_name(uneven.reader.model)
    for name, weight in weights.items():
        assert torch.equal(uneven.reader.model.get_submodule(name).weight, weight)
        assert quantizers[f"{name}.input_quantizer"].pre_quant_scale is None


def test_search_leaves_even_channels_alone_and_scales_uneven_ones() -> None:
    """A scale is chosen only where it lowers the error of the product."""
    torch.manual_seed(1)
    rows = torch.randn(200, 16)
    weight = torch.randn(8, 16)
    rows[:, 5] *= 100.0
    alpha, scale = _search_scale(rows, [weight], keep=1.0)
    assert alpha > 0
    assert scale is not None
    assert scale.argmax() == 5
    # Powers of two lose nothing in INT8: no scale can do better.
    alpha, scale = _search_scale(torch.eye(4), [torch.eye(4)], keep=1.0)
    assert (alpha, scale) == (0.0, None)


def test_smoothing_without_windows_is_an_error(uneven: Uneven) -> None:
    """No data, no ranges."""
    with pytest.raises(BuildError, match="at least one"):
        uneven.smooth([], uneven.plan("linear"))


def test_tensors_left_out(uneven: Uneven, windows: list[Window]) -> None:
    """What an engine wants unsmoothed keeps its channels; the others do not mind."""
    plan = uneven.plan("full")
    out = frozenset({TensorClass.CONTEXT})
    chosen = smooth_activations(
        uneven.reader.wrapped, windows, plan, uneven.reader.inputs, leave_out=out
    )
    whole = {name for group in smoothable_gemms(plan) for name in group}
    left = {name for name in whole if "attention.output.dense" in name}
    assert len(left) == 2
    assert chosen.keys() == whole - left
    quantizers = quantizers_by_name(uneven.reader.model)
    for name in left:
        assert quantizers[f"{name}.input_quantizer"].pre_quant_scale is None
