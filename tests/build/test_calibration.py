"""Ranges against numpy on data that is known; what is fed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from int8qa.build.calibration import (
    Calibrator,
    Histograms,
    Ranges,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.feed import window_feed
from int8qa.build.histogram import ActivationHistogram
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    Recipe,
    insert_quantizers,
    quantizers_by_name,
    switch_quantizers,
)
from int8qa.build.sites import Site, TensorClass
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.errors import BuildError
from int8qa.reader.windows import Window
from tests.build.tiny import CalibratedReader, make_reader, quantize_reader

INPUTS = (INPUT_IDS, ATTENTION_MASK)
READ = Site("gemm.input_quantizer", TensorClass.QKV_INPUT, 0, 0)
WEIGHT = Site("gemm.weight_quantizer", TensorClass.QKV_WEIGHT, 0, -1, 3)
PLAN = Plan("test", (READ, WEIGHT), {READ.name: False, WEIGHT.name: True})

Calibrated = Callable[[str], CalibratedReader]


def make_window(ids: np.ndarray) -> Window:
    """A window of the given ids, read-only as real ones are."""
    ids = ids.astype(np.int32)
    ids.setflags(write=False)
    nothing = np.zeros((0, 2), np.int32)
    return Window(0, ids, np.zeros_like(ids), 0, 0, nothing, nothing[:, 0])


def make_probe() -> Any:
    """A reader whose only GEMM reads the token ids themselves, as floats."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gemm = torch.nn.Linear(1, 3)

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.seen: list[tuple[Any, Any]] = []

        def forward(self, ids: Any, mask: Any) -> Any:
            self.seen.append((ids.numpy().copy(), mask.numpy().copy()))
            return self.model.gemm(ids[..., None].float())

    probe = Probe()
    insert_quantizers(probe.model)
    switch_quantizers(probe.model, PLAN)
    return probe


def calibrate(
    probe: Any, rows: Iterable[np.ndarray], calibrator: Calibrator, **options: Any
) -> Ranges:
    histograms = collect_histograms(
        probe, map(make_window, rows), PLAN, INPUTS, **options
    )
    return choose_ranges(probe.model, PLAN, histograms, calibrator)


@pytest.mark.parametrize("percentile", [0.0, 50.0, 100.01, float("nan"), -1.0])
def test_percentile_out_of_range(percentile: float) -> None:
    """A share that keeps half of the values or less is a slip of the pen."""
    with pytest.raises(BuildError, match=r"percentile is .*above 50, at most 100"):
        Calibrator("percentile", percentile)


def test_percentile_is_not_checked_where_it_is_not_used() -> None:
    """The maximum knows no percentile."""
    assert Calibrator("max", 0.0).name == "max"


@pytest.mark.parametrize(
    ("percentile", "name"),
    [
        (99.999, "percentile-99.999"),
        (99.9999999, "percentile-99.9999999"),
        (100.0, "percentile-100"),
        (99.0, "percentile-99"),
    ],
)
def test_names(percentile: float, name: str) -> None:
    """Names tell percentiles apart, however close: they decide what is rebuilt."""
    assert Calibrator("percentile", percentile).name == name


@pytest.mark.parametrize(
    ("calibrator", "share"),
    [(Calibrator("percentile", 99.9), 0.999), (Calibrator("max"), 1.0)],
)
def test_kept_share(calibrator: Calibrator, share: float) -> None:
    """What is known to stay inside of the range."""
    assert calibrator.kept_share == pytest.approx(share)


@pytest.mark.parametrize(
    ("calibrator", "expected"),
    [
        (Calibrator("max"), np.max),
        (Calibrator("percentile", 100.0), np.max),
        (Calibrator("percentile", 99.0), lambda a: np.percentile(a, 99.0)),
        (Calibrator("percentile", 90.0), lambda a: np.percentile(a, 90.0)),
        (Calibrator("percentile", 99.999), lambda a: np.percentile(a, 99.999)),
    ],
    ids=lambda value: value.name if isinstance(value, Calibrator) else "",
)
def test_ranges_equal_numpy(calibrator: Calibrator, expected: Any) -> None:
    """The range is numpy's, exactly or within two bins of a growing histogram."""
    rng = np.random.default_rng(5)
    # The first window reaches 1000, later ones 1500: the histogram has to grow.
    rows = [rng.integers(-1000, 1000, 4000), rng.integers(-1500, 1500, 4000)]
    rows[0][0], rows[1][0] = 1000, -1500
    ranges = calibrate(make_probe(), rows, calibrator)
    value = expected(np.abs(np.concatenate(rows)))
    tolerance = 0 if calibrator.method == "max" else 2 * 1000 / 2048
    assert ranges[READ.name] == pytest.approx(value, abs=tolerance, rel=0)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_searching_calibrators_cut_an_outlier(method: Any) -> None:
    """One value of 400,000 far outside is not worth a coarser grid for all."""
    rows = [np.random.default_rng(5).integers(-1000, 1000, 400_000)]
    rows[0][0] = 3000
    found = calibrate(make_probe(), rows, Calibrator(method))[READ.name]
    assert found == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_range_is_the_exact_maximum(per_channel: bool) -> None:
    """Percentiles are for activations; a weight's range is known."""
    probe = make_probe()
    plan = Plan("test", PLAN.sites, {READ.name: False, WEIGHT.name: per_channel})
    windows = [make_window(np.arange(9))]
    histograms = collect_histograms(probe, windows, plan, INPUTS)
    calibrator = Calibrator("percentile", 60.0)
    found = choose_ranges(probe.model, plan, histograms, calibrator)[WEIGHT.name]
    weight = probe.model.gemm.weight.detach().abs().numpy()
    if per_channel:
        np.testing.assert_array_equal(found, weight.max(axis=1, keepdims=True))
    else:
        assert isinstance(found, float)
        assert found == weight.max()


def test_channel_of_zeros() -> None:
    """A pruned channel is exact on any grid, and its scale must not be zero."""
    probe = make_probe()
    probe.model.gemm.weight.data[1] = 0.0
    ranges = calibrate(probe, [np.arange(9)], Calibrator("max"))
    assert (np.asarray(ranges[WEIGHT.name]) > 0).all()
    set_ranges(probe.model, ranges)
    quantized = probe.model.gemm.weight_quantizer(probe.model.gemm.weight)
    assert not quantized[1].any()
    assert quantized[0].any()


def test_windows_go_in_unpadded() -> None:
    """One window at a time, as long as it is, its mask all ones: padding is no data."""
    probe = make_probe()
    lengths = (7, 40, 3)
    ticks: list[None] = []
    calibrate(
        probe,
        [np.arange(1, n + 1) for n in lengths],
        Calibrator("max"),
        on_window=lambda: ticks.append(None),
    )
    assert [ids.shape for ids, _ in probe.seen] == [(1, n) for n in lengths]
    assert all(mask.all() and mask.shape == ids.shape for ids, mask in probe.seen)
    assert len(ticks) == len(lengths)


def test_padding_would_move_a_percentile() -> None:
    """Why it matters: the same data with padding has another 90th percentile."""
    data = np.arange(1, 1001)
    padded = np.concatenate([data, np.zeros(1000)])
    calibrator = Calibrator("percentile", 90.0)
    assert calibrate(make_probe(), [data], calibrator)[READ.name] == pytest.approx(
        900, abs=1
    )
    assert calibrate(make_probe(), [padded], calibrator)[READ.name] == pytest.approx(
        800, abs=1
    )


def test_feed_follows_the_inputs() -> None:
    """The feed holds what the model takes, int32 [1, S] each, and nothing else."""
    window = make_window(np.arange(6))
    assert window_feed(window, INPUTS).keys() == set(INPUTS)
    feed = window_feed(window, (*INPUTS, TOKEN_TYPE_IDS))
    assert {(value.dtype.str, value.shape) for value in feed.values()} == {
        ("<i4", (1, 6))
    }


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("rows", [[], [np.zeros(5)]], ids=["nothing", "zeros"])
def test_no_data(method: Any, rows: list[np.ndarray]) -> None:
    """A tensor that saw nothing is named, with its class, and so is the way out."""
    with pytest.raises(
        BuildError,
        match=r"layer 0 qkv_input \(gemm\.input_quantizer\) saw no usable data",
    ):
        calibrate(make_probe(), rows, Calibrator(method))


def test_damaged_weights() -> None:
    """NaN on the way ends calibration, and leaves the quantizers on."""
    import torch

    probe = make_probe()
    probe.forward = lambda ids, mask: probe.model.gemm(
        torch.full((1, 4, 1), float("nan"))
    )
    with pytest.raises(BuildError, match=r"NaN or infinite: the checkpoint's weights"):
        collect_histograms(probe, [make_window(np.arange(4))], PLAN, INPUTS)
    assert probe.model.gemm.input_quantizer._if_quant
    assert not probe.model.gemm.input_quantizer._if_calib


def test_collecting_twice_starts_afresh() -> None:
    """A second collection knows nothing of the first."""
    probe = make_probe()
    calibrate(probe, [np.array([1000])], Calibrator("max"))
    assert calibrate(probe, [np.array([10])], Calibrator("max"))[READ.name] == 10


def test_quantizers_work_after_calibration(windows: list[Window]) -> None:
    """Afterwards the whole model quantizes, collects no more, and every range is one."""
    reader, plan = quantize_reader("bert", "linear")
    histograms = collect_histograms(reader.wrapped, windows, plan, reader.inputs)
    ranges = choose_ranges(reader.model, plan, histograms, Calibrator())
    set_ranges(reader.model, ranges)
    assert ranges.keys() == plan.names
    for name, quantizer in quantizers_by_name(reader.model).items():
        assert quantizer.is_enabled == (name in plan.names)
        if quantizer.is_enabled:
            assert quantizer._if_quant
            assert not quantizer._if_calib
            np.testing.assert_array_equal(quantizer.amax, ranges[name])


def test_data_is_collected_in_float(windows: list[Window]) -> None:
    """Ranges set before change nothing: calibration sees the float model's tensors."""
    reader, plan = quantize_reader("bert", "full")
    first, second = (
        choose_ranges(
            reader.model,
            plan,
            collect_histograms(reader.wrapped, windows, plan, reader.inputs),
            Calibrator("max"),
        )
        for _ in _set_between(reader.model, plan)
    )
    for name in plan.names:
        np.testing.assert_array_equal(first[name], second[name])


def _set_between(model: Any, plan: Plan) -> Iterable[int]:
    """Yield twice; in between give every quantizer a coarse range."""
    yield 0
    set_ranges(model, dict.fromkeys(plan.names, 0.25))
    yield 1


def test_sites_of_one_tensor_share_a_histogram(calibrated: Calibrated) -> None:
    """Q, K, V and the residual look at one tensor, counted once."""
    source = calibrated("bert")
    by_tensor: dict[int, set[int]] = {}
    for site in source.plan.activations:
        histogram = source.histograms.by_site[site.name]
        by_tensor.setdefault(site.tensor, set()).add(id(histogram))
    assert all(len(found) == 1 for found in by_tensor.values())
    every = [next(iter(found)) for found in by_tensor.values()]
    assert len(set(every)) == len(every) == 16
    counted = {
        site.tensor_class: int(np.sum(source.histograms.by_site[site.name]._calib_hist))
        for site in source.plan.activations
        if site.layer == 1
    }
    assert counted[TensorClass.QKV_INPUT] == counted[TensorClass.CONTEXT]
    assert counted[TensorClass.FFN_OUT_INPUT] == 2 * counted[TensorClass.CONTEXT]


def test_search_runs_once_per_histogram() -> None:
    """What mse and entropy found is remembered for all sites of the tensor."""
    calls: list[str] = []

    class Counting(ActivationHistogram):
        def compute_amax(self, method: str, **options: Any) -> Any:
            calls.append(method)
            return super().compute_amax(method, **options)

    import torch

    histogram = Counting()
    histogram.collect(torch.linspace(-1, 1, 999))
    histograms = Histograms({"a": histogram, "b": histogram})
    sites = [Site(n, TensorClass.QKV_INPUT, 0, 0) for n in ("a", "b", "a")]
    for method in ("mse", "entropy"):
        found = {histograms.compute_amax(site, Calibrator(method)) for site in sites}
        assert len(found) == 1
    assert calls == ["mse", "entropy"]


def test_shared_ranges(calibrated: Calibrated) -> None:
    """With share_qkv each layer's Q, K and V have the widest of their ranges."""
    source = calibrated("bert")
    recipe = Recipe("a", RECIPES["full"].rules, per_channel=False, share_qkv=True)
    plan = recipe.choose(source.sites)
    model, histograms = source.reader.model, source.histograms
    shared = choose_ranges(model, plan, histograms, Calibrator("max"))
    single = Recipe("a", RECIPES["full"].rules, per_channel=False).choose(source.sites)
    alone = choose_ranges(model, single, histograms, Calibrator("max"))
    fused = [
        {TensorClass.QUERY, TensorClass.KEY, TensorClass.VALUE},
        {TensorClass.QKV_WEIGHT},
    ]
    touched = set()
    for layer in (0, 1):
        for kinds in fused:
            names = [
                s.name
                for s in plan.sites
                if s.layer == layer and s.tensor_class in kinds
            ]
            assert len(names) == 3
            assert len({alone[name] for name in names}) == 3
            assert {shared[n] for n in names} == {max(alone[n] for n in names)}
            touched.update(names)
    assert all(shared[n] == alone[n] for n in plan.names - touched)


def test_per_channel_weights_are_not_shared(calibrated: Calibrated) -> None:
    """Channels keep their own scales: a fused QKV GEMM has them side by side."""
    source = calibrated("bert")
    plan = Recipe("a", RECIPES["full"].rules, share_qkv=True).choose(source.sites)
    ranges = choose_ranges(
        source.reader.model, plan, source.histograms, Calibrator("max")
    )
    for site in plan.sites:
        if site.is_weight:
            np.testing.assert_array_equal(ranges[site.name], source.ranges[site.name])


def test_switching_to_per_tensor_and_back() -> None:
    """A weight's quantizer takes either kind of range, one after the other."""
    reader = make_reader("bert")
    insert_quantizers(reader.model)
    name = "bert.encoder.layer.0.output.dense.weight_quantizer"
    site = Site(name, TensorClass.FFN_OUT_WEIGHT, 0, 0, 1)
    weight = reader.model.get_submodule(name.rpartition(".")[0]).weight.detach()
    quantizer = quantizers_by_name(reader.model)[name]
    for per_channel in (True, False, True):
        plan = Plan("a", (site,), {name: per_channel})
        switch_quantizers(reader.model, plan)
        ranges = choose_ranges(reader.model, plan, Histograms({}), Calibrator())
        set_ranges(reader.model, ranges)
        step = np.asarray(ranges[name]) / 127
        expected = np.rint(weight.numpy() / step) * step
        np.testing.assert_allclose(quantizer(weight).numpy(), expected, atol=1e-6)
