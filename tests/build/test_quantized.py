"""One reader on its way to INT8: each step, and calibrators by their names."""

from __future__ import annotations

import numpy as np
import pytest

from int8qa.build.calibration import (
    DEFAULT_PERCENTILE,
    Calibrator,
    Histograms,
    parse_calibrator,
)
from int8qa.build.census import take_census
from int8qa.build.histogram import ActivationHistogram
from int8qa.build.quantization import RECIPES, quantizers_by_name
from int8qa.build.quantized import QuantizedReader
from int8qa.build.range_search import CANDIDATES
from int8qa.errors import BuildError
from int8qa.reader.windows import Window
from tests.build.tiny import make_reader, random_feed, run_onnx

LINEAR, FULL = RECIPES["linear"], RECIPES["full"]


def make_quantized(windows: list[Window], *recipes: str) -> QuantizedReader:
    reader = make_reader("bert")
    chosen = [RECIPES[name] for name in recipes]
    return QuantizedReader(reader.wrapped, windows, reader.inputs, chosen)


@pytest.fixture(scope="module")
def both(windows: list[Window]) -> QuantizedReader:
    """For linear and full, looked at; choosing ranges changes nothing of it."""
    quantized = make_quantized(windows, "linear", "full")
    quantized.collect()
    return quantized


def test_plans(both: QuantizedReader) -> None:
    """A plan per recipe, and one of all; its quantizers are on, no others."""
    assert {name: plan.names for name, plan in both.plans.items()} == {
        recipe.name: recipe.choose(both.sites).names for recipe in (LINEAR, FULL)
    }
    assert both.plan.names == both.plans["full"].names
    assert {
        name
        for name, quantizer in quantizers_by_name(both.reader.model).items()
        if quantizer.is_enabled
    } == both.plan.names


def test_collecting(windows: list[Window]) -> None:
    """One tick per window; a histogram for each activation of any recipe."""
    quantized = make_quantized(windows, "linear")
    ticks: list[None] = []
    assert not quantized.histograms.by_site
    quantized.collect(lambda: ticks.append(None))
    assert len(ticks) == len(windows)
    names = {site.name for site in quantized.plan.activations}
    assert quantized.histograms.by_site.keys() == names


def test_ranges_of_a_smaller_plan(both: QuantizedReader) -> None:
    """By default of everything, else of the plan given; the same where both have one."""
    everything = both.choose(Calibrator("max"))
    assert everything.keys() == both.plan.names
    linear = both.choose(Calibrator("max"), plan=both.plans["linear"])
    assert linear.keys() == both.plans["linear"].names
    for name, amax in linear.items():
        np.testing.assert_array_equal(amax, everything[name])


def test_calibrators_differ_in_activations_alone(both: QuantizedReader) -> None:
    """A percentile cuts off, and a weight's range is known."""
    widest = both.choose(Calibrator("max"))
    narrow = both.choose(Calibrator("percentile", 99.0))
    for site in both.plan.sites:
        if site.is_weight:
            np.testing.assert_array_equal(narrow[site.name], widest[site.name])
        else:
            assert 0 < narrow[site.name] < widest[site.name]


def test_search_takes_one_of_the_candidates(both: QuantizedReader) -> None:
    """One tick per tensor, its candidate noted, and the range is that candidate's."""
    plan = both.plans["linear"]
    ticks: list[None] = []
    ranges = both.choose(
        Calibrator("search"), plan=plan, on_tensor=lambda: ticks.append(None)
    )
    # Q, K and V read one tensor: four a layer.
    assert len(ticks) == both.count_tensors(plan) == 8
    assert both.count_tensors() == 8 + 2 * 4
    assert ranges.keys() == plan.names
    assert both.chosen.keys() == {site.name for site in plan.activations}
    known = {candidate.name: candidate for candidate in CANDIDATES}
    for site in plan.activations:
        candidate = known[both.chosen[site.name]]
        assert ranges[site.name] == both.histograms.compute_amax(site, candidate)


@pytest.mark.parametrize(("recipe", "matmuls"), [("linear", 12), ("full", 16)])
def test_every_recipe_from_one_export(
    windows: list[Window], both: QuantizedReader, recipe: str, matmuls: int
) -> None:
    """The graph of each recipe is what exporting it alone would have given."""
    plan = both.plans[recipe]
    calibrator = Calibrator("percentile", 99.9)
    ranges = both.choose(calibrator, plan=plan)
    graph = both.export(both.choose(Calibrator("max"))).project(plan, ranges)
    census = take_census(graph, plan, both.sites, ranges)
    assert census.quantized_matmuls == matmuls
    alone = make_quantized(windows, recipe)
    alone.collect()
    own = alone.choose(calibrator)
    single = alone.export(own).project(alone.plan, own)
    feed = random_feed(make_reader("bert"), [20, 11], 24)
    for left, right in zip(run_onnx(graph, feed), run_onnx(single, feed), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_smoothing_comes_first(windows: list[Window]) -> None:
    """Two passes, and histograms of the smoothed tensors, not of those before."""
    plain = make_quantized(windows, "linear")
    plain.collect()
    smoothed = make_quantized(windows, "linear")
    ticks: list[None] = []
    alphas = smoothed.smooth(Calibrator("max"), lambda: ticks.append(None))
    assert len(ticks) == len(windows)
    weights = [site for site in smoothed.plan.sites if site.is_weight]
    assert alphas.keys() == {site.name.rpartition(".")[0] for site in weights}
    assert any(alphas.values())
    smoothed.collect()
    before, after = (q.choose(Calibrator("max")) for q in (plain, smoothed))
    for site in smoothed.plan.activations:
        scaled = alphas[site.name.rpartition(".")[0]] > 0.0
        assert (after[site.name] != before[site.name]) == scaled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max", Calibrator("max")),
        ("mse", Calibrator("mse")),
        ("entropy", Calibrator("entropy")),
        ("search", Calibrator("search")),
        ("percentile", Calibrator("percentile", DEFAULT_PERCENTILE)),
        ("percentile-99.99", Calibrator("percentile", 99.99)),
        ("percentile-99.9999999", Calibrator("percentile", 99.9999999)),
        ("percentile-100", Calibrator("percentile", 100.0)),
    ],
)
def test_calibrators_by_name(name: str, expected: Calibrator) -> None:
    """What a calibrator is called is what it is asked for by."""
    assert parse_calibrator(name) == expected
    assert parse_calibrator(expected.name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", "maximum", "Max", "max-1", "search-8", "mse-", "99.99"),
        *("percentile-many", "percentile 99", "percentile-99.9-9"),
    ],
)
def test_unknown_calibrator(name: str) -> None:
    """The message lists those there are, and says what a percentile looks like."""
    with pytest.raises(
        BuildError, match=r"no calibrator is called .*percentile-99\.99"
    ):
        parse_calibrator(name)


@pytest.mark.parametrize("share", ["50", "100.1", "-1", "nan", "inf", "0.99"])
def test_percentile_out_of_bounds(share: str) -> None:
    """A share instead of a percentage would cut nearly everything off."""
    with pytest.raises(BuildError, match="allowed: above 50, at most 100"):
        parse_calibrator(f"percentile-{share}")


def test_search_has_no_range_of_its_own(both: QuantizedReader) -> None:
    """It looks at logits; a histogram alone tells it nothing."""
    site = both.plan.activations[0]
    with pytest.raises(BuildError, match="reads logits"):
        both.histograms.compute_amax(site, Calibrator("search"))
    empty = Histograms({site.name: ActivationHistogram(8, None, False)})
    with pytest.raises(BuildError, match="saw no usable data"):
        empty.compute_amax(site, Calibrator("search"))


def test_share_that_is_kept() -> None:
    """Only a percentile is known to cut; what the others cut is not known before."""
    assert Calibrator("percentile", 99.9).kept_share == pytest.approx(0.999)
    for method in ("max", "mse", "entropy", "search"):
        assert parse_calibrator(method).kept_share == 1.0
