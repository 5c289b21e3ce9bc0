"""Ranges against numpy on data that is known; what is fed, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from int8qa.build.calibration import Calibrator, calibrate
from int8qa.build.feed import window_feed
from int8qa.build.quantization import RECIPES, insert_quantizers
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.errors import BuildError
from int8qa.reader.windows import Window
from tests.build.tiny import make_reader

INPUTS = (INPUT_IDS, ATTENTION_MASK)


def make_window(ids: np.ndarray) -> Window:
    """A window of the given ids, read-only as real ones are."""
    ids = ids.astype(np.int32)
    ids.setflags(write=False)
    nothing = np.zeros((0, 2), np.int32)
    return Window(0, ids, np.zeros_like(ids), 0, 0, nothing, nothing[:, 0])


def make_probe() -> Any:
    """A model whose only GEMM reads the token ids themselves, as floats."""
    import torch

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gemm = torch.nn.Linear(1, 3)
            self.seen: list[tuple[Any, Any]] = []

        def forward(self, ids: Any, mask: Any) -> Any:
            self.seen.append((ids.numpy().copy(), mask.numpy().copy()))
            return self.gemm(ids[..., None].float())

    probe = Probe()
    insert_quantizers(probe, RECIPES["linear"])
    return probe


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
    probe = make_probe()
    ranges = calibrate(probe, map(make_window, rows), calibrator, INPUTS)
    value = expected(np.abs(np.concatenate(rows)))
    assert ranges.keys() == {"gemm.input_quantizer"}
    tolerance = 0 if calibrator.method == "max" else 2 * 1000 / 2048
    assert ranges["gemm.input_quantizer"] == pytest.approx(value, abs=tolerance, rel=0)


def test_weight_range_is_the_exact_maximum_per_channel() -> None:
    """Percentiles are for activations; a weight's range is known."""
    probe = make_probe()
    calibrate(
        probe, [make_window(np.arange(9))], Calibrator("percentile", 60.0), INPUTS
    )
    amax = probe.gemm.weight_quantizer.amax.numpy()
    weight = probe.gemm.weight.detach().abs().numpy()
    np.testing.assert_array_equal(amax, weight.max(axis=1, keepdims=True))


def test_windows_go_in_unpadded() -> None:
    """One window at a time, as long as it is, its mask all ones: padding is no data."""
    probe = make_probe()
    lengths = (7, 40, 3)
    ticks: list[None] = []
    calibrate(
        probe,
        [make_window(np.arange(1, n + 1)) for n in lengths],
        Calibrator("max"),
        INPUTS,
        on_window=lambda: ticks.append(None),
    )
    assert [ids.shape for ids, _ in probe.seen] == [(1, n) for n in lengths]
    assert all(mask.all() and mask.shape == ids.shape for ids, mask in probe.seen)
    assert len(ticks) == len(lengths)


def test_padding_would_move_a_percentile() -> None:
    """Why it matters: the same data with padding has another 90th percentile."""
    data = np.arange(1, 1001)
    plain = calibrate(
        make_probe(), [make_window(data)], Calibrator("percentile", 90.0), INPUTS
    )
    padded = calibrate(
        make_probe(),
        [make_window(np.concatenate([data, np.zeros(1000)]))],
        Calibrator("percentile", 90.0),
        INPUTS,
    )
    (left,), (right,) = plain.values(), padded.values()
    assert left == pytest.approx(900, abs=1)
    assert right == pytest.approx(800, abs=1)


def test_feed_follows_the_inputs() -> None:
    """The feed holds what the model takes, int32 [1, S] each, and nothing else."""
    window = make_window(np.arange(6))
    assert window_feed(window, INPUTS).keys() == set(INPUTS)
    feed = window_feed(window, (*INPUTS, TOKEN_TYPE_IDS))
    assert {(value.dtype.str, value.shape) for value in feed.values()} == {
        ("<i4", (1, 6))
    }


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_no_data(method: Any) -> None:
    """A quantizer that saw nothing is named, and so is the way out."""
    with pytest.raises(BuildError, match=r"gemm\.\w+_quantizer saw no usable data"):
        calibrate(make_probe(), [], Calibrator(method), INPUTS)


def test_quantizers_work_after_calibration(windows: list[Window]) -> None:
    """Afterwards the whole model quantizes, collects no more, and every range is one."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    reader = make_reader("bert")
    insert_quantizers(reader.model, RECIPES["linear"])
    ranges = calibrate(reader.wrapped, windows, Calibrator(), reader.inputs)
    assert len(ranges) == 12
    assert all(value > 0 for value in ranges.values())
    enabled = [
        module
        for module in reader.model.modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    ]
    assert len(enabled) == 24
    assert all(module._if_quant and not module._if_calib for module in enabled)
