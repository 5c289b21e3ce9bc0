"""The collector's counts are numpy's, whatever comes first and however far it grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from int8qa.build.histogram import MAX_BINS, ActivationHistogram


def collect(*batches: Any) -> ActivationHistogram:
    histogram = ActivationHistogram()
    for batch in batches:
        histogram.collect(torch.tensor(np.asarray(batch, np.float32)))
    return histogram


def test_counts_are_exact() -> None:
    """Every value is counted once, in the bin of its absolute value."""
    rng = np.random.default_rng(3)
    batches = [rng.normal(size=(2, 500)), 3 * rng.normal(size=700)]
    histogram = collect(*batches)
    values = np.abs(np.concatenate([b.astype(np.float32).ravel() for b in batches]))
    expected, _ = np.histogram(values, histogram._calib_bin_edges)
    assert histogram._calib_hist is not None
    assert histogram._calib_hist.sum() == values.size
    # A value on an edge may round to either side of it.
    assert np.abs(histogram._calib_hist - expected).sum() <= 4
    assert histogram.peak == values.max()


def test_counts_do_not_saturate() -> None:
    """Counts are integers; float32 ones stop growing at 2**24."""
    histogram = collect([1.0])
    assert histogram._calib_hist is not None
    assert histogram._calib_hist.dtype == np.int64


def test_zeros_first() -> None:
    """A batch of zeros sets no bin width; later ones do."""
    histogram = collect([0.0, 0.0], [], [1.0, -4.0])
    assert histogram.peak == 4.0
    assert histogram._calib_hist is not None
    assert histogram._calib_hist.sum() == 2


def test_far_outlier_widens_the_bins() -> None:
    """A value a million times the first one joins bins instead of filling memory."""
    histogram = collect(np.linspace(0, 1e-3, 1001), [5e6])
    assert histogram._calib_hist is not None
    assert len(histogram._calib_hist) <= MAX_BINS
    assert histogram._calib_hist.sum() == 1002
    assert histogram._calib_bin_edges[-1] >= 5e6
    assert histogram.peak == 5e6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number(bad: float) -> None:
    """What is no number has no place in a histogram."""
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        collect([1.0, bad])


def test_reset() -> None:
    """Afterwards it is as new, with a new width."""
    histogram = collect([1000.0])
    histogram.reset()
    assert histogram.peak == 0.0
    histogram.collect(torch.tensor([0.5]))
    assert histogram.peak == 0.5
    assert histogram._calib_bin_edges[-1] == pytest.approx(0.5)
