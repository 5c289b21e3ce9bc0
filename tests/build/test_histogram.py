"""Counts are numpy's, and each search finds what its definition says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from modelopt.torch.quantization import calib
from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

from int8qa.build.histogram import (
    MAX_BINS,
    SEARCH_BINS,
    ActivationHistogram,
    search_entropy,
)


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


def draw_histogram(seed: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of values with a long tail, gaps and many zeros."""
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_t(3, 5000))
    counts, edges = np.histogram(values, bins)
    counts[0] += rng.integers(0, 9000)
    return counts.astype(np.int64), edges


def heavy_tail(seed: int) -> Any:
    return np.random.default_rng(seed).standard_t(3, 20_000)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bins", [130, 200, 300])
@pytest.mark.parametrize("seed", range(3))
def test_entropy_equals_modelopt(seed: int, bins: int, unsigned: bool) -> None:
    """The fast search finds ModelOpt's own amax on any histogram, on either grid."""
    counts, edges = draw_histogram(seed, bins)
    levels = 256 if unsigned else 128
    for stride, start_bin in ((1, 128), (3, 129)):
        wanted = calib.histogram._compute_amax_entropy(
            counts.copy(), edges, 8, unsigned, stride=stride, start_bin=start_bin
        )
        found = search_entropy(
            counts, edges, stride=stride, start_bin=start_bin, levels=levels
        )
        assert found == pytest.approx(float(wanted), rel=1e-6)


def test_entropy_takes_the_grid_of_its_quantizer() -> None:
    """A quantizer that is unsigned gets a cut-off for 256 levels, others for 128."""
    values = np.abs(heavy_tail(3))
    found = {}
    for unsigned in (False, True):
        histogram = ActivationHistogram(8, None, unsigned)
        histogram.collect(torch.tensor(values.astype(np.float32)))
        amax = histogram.compute_amax("entropy")
        assert amax is not None
        counts, edges = histogram.joined(SEARCH_BINS)
        levels = 256 if unsigned else 128
        found[unsigned] = float(amax)
        assert found[unsigned] == pytest.approx(
            search_entropy(counts, edges, levels=levels)
        )
    assert found[True] != found[False]


def test_entropy_of_few_bins() -> None:
    """With fewer bins than levels nothing is gained by cutting."""
    counts, edges = draw_histogram(1, 20)
    assert search_entropy(counts, edges) == edges[-1]


def brute_force_mse(counts: np.ndarray, edges: np.ndarray, most: int = 127) -> float:
    """The bin centre whose grid of -most … most loses least, candidate by candidate."""
    centers = ((edges[1:] + edges[:-1]) / 2).astype(np.float64)
    losses = {}
    for amax in centers[128:]:
        step = amax / most
        found = np.clip(np.rint(centers / step), -most, most) * step
        losses[amax] = float(np.sum(counts * (found - centers) ** 2))
    best = min(losses.values())
    # float32, in which ModelOpt sums, cannot tell these apart.
    return float(next(a for a, loss in losses.items() if loss <= best * (1 + 1e-4)))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mse_equals_brute_force(seed: int, unsigned: bool) -> None:
    """The mse of each candidate grid, summed by hand, has its least where ours has."""
    histogram = ActivationHistogram(8, None, unsigned)
    histogram.collect(torch.tensor(np.abs(heavy_tail(seed)).astype(np.float32)))
    found = histogram.compute_amax("mse")
    assert found is not None
    counts, edges = histogram.joined(SEARCH_BINS)
    wanted = brute_force_mse(counts, edges, 255 if unsigned else 127)
    assert float(found) == pytest.approx(wanted, rel=2e-3)
    assert histogram.peak / 20 < float(found) < histogram.peak


def test_modelopt_compares_grids_of_zero_bits() -> None:
    """ModelOpt's own mse still hands its bits over as a bias.

    When this fails, histogram.py's _quantize_on_grid can go.
    """
    calls: list[tuple[Any, ...]] = []

    def note(values: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return fake_tensor_quant(values, *arguments)

    counts, edges = draw_histogram(0, 200)
    upstream = calib.histogram
    own = upstream.fake_tensor_quant
    upstream.fake_tensor_quant = note
    try:
        found = upstream._compute_amax_mse(counts, edges, 8, False)
    finally:
        upstream.fake_tensor_quant = own
    # Its parameters are amax, bias, num_bits, unsigned: 8 is the bias here.
    assert {arguments[1:] for arguments in calls} == {(8, False)}
    amax = torch.tensor(1.0)
    levels = fake_tensor_quant(torch.linspace(-1, 1, 999), amax, 8, False).unique()
    assert len(levels) <= 3
    # Whatever the data: no grid is finer than another, so the first candidate wins.
    ours = brute_force_mse(counts, edges)
    assert float(found) != pytest.approx(ours, rel=1e-2)


def test_modelopt_is_itself_again_after_a_search() -> None:
    """The search leaves ModelOpt's module as it found it."""
    own = calib.histogram.fake_tensor_quant
    collect(heavy_tail(0)).compute_amax("mse")
    assert calib.histogram.fake_tensor_quant is own


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_searching_changes_no_count(method: str) -> None:
    """Every calibrator reads the same histogram, in any order, any number of times."""
    histogram = collect(heavy_tail(4))
    counts = np.array(histogram._calib_hist)
    first = histogram.compute_amax(method)
    assert first is not None
    np.testing.assert_array_equal(histogram._calib_hist, counts)
    assert histogram.compute_amax(method) == first


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_nothing_collected(method: str) -> None:
    """Without data there is no range."""
    assert ActivationHistogram().compute_amax(method) is None


@pytest.mark.parametrize("bins", [7, 100, 1000, 2048, 5000])
def test_joined(bins: int) -> None:
    """Joining keeps every count, below the edge it was below."""
    histogram = collect(heavy_tail(5), 3 * heavy_tail(6))
    fine = np.asarray(histogram._calib_hist)
    counts, edges = histogram.joined(bins)
    assert len(counts) <= bins
    assert len(edges) == len(counts) + 1
    assert counts.sum() == fine.sum() == 40_000
    below = np.concatenate(([0], np.cumsum(fine)))
    fine_edges = histogram._calib_bin_edges
    at = np.searchsorted(fine_edges, edges[:-1] + histogram._width / 2) - 1
    np.testing.assert_array_equal(np.cumsum(counts) - counts, below[at])


def test_search_of_many_bins() -> None:
    """A histogram that grew is searched on joined bins, and the loss is as small."""
    values = heavy_tail(7).astype(np.float32)
    grown = collect(values[:200] / 10, values)
    assert len(np.asarray(grown._calib_hist)) > SEARCH_BINS
    found = grown.compute_amax("mse", stride=8)
    assert found is not None

    def loss(amax: float) -> float:
        step = amax / 127
        quantized = np.clip(np.rint(values / step), -127, 127) * step
        return float(np.mean((quantized - values) ** 2))

    best = min(map(loss, np.linspace(grown.peak / 50, grown.peak, 200)))
    assert loss(float(found)) <= 1.05 * best
    assert best < 0.95 * loss(grown.peak)
