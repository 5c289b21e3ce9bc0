"""The search chooses, tensor by tensor, what moves the logits least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from int8qa.build.calibration import Calibrator, choose_ranges, set_ranges
from int8qa.build.feed import window_feed
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    Recipe,
    Rule,
    quantizers_by_name,
    quantizers_off,
    switch_quantizers,
)
from int8qa.build.range_search import (
    CANDIDATES,
    PROBE_WINDOWS,
    LogitProbe,
    search_ranges,
    shared_tensors,
)
from int8qa.build.sites import TensorClass
from int8qa.errors import BuildError
from int8qa.reader.windows import Window
from tests.build.tiny import (
    ARCHITECTURES,
    CalibratedReader,
    TinyReader,
    calibrate_reader,
)

Calibrated = Callable[[str], CalibratedReader]
LAYER_1 = {TensorClass.QKV_INPUT, TensorClass.SOFTMAX, TensorClass.FFN_OUT_INPUT}


@pytest.fixture
def source(windows: list[Window]) -> CalibratedReader:
    """A tiny BERT of one's own; the search moves its ranges."""
    return calibrate_reader("bert", windows, "full")


def narrow(source: CalibratedReader, kinds: set[TensorClass]) -> Plan:
    """Only these classes of layer 1."""
    names = {
        s.name for s in source.sites if s.tensor_class not in kinds or s.layer != 1
    }
    plan = source.plan.without(frozenset(names))
    switch_quantizers(source.reader.model, plan)
    return plan


def logits(reader: TinyReader, windows: list[Window]) -> list[np.ndarray]:
    found = []
    for window in windows:
        found += reader.run_torch(window_feed(window, reader.inputs))
    return found


def measure_plainly(
    source: CalibratedReader, windows: list[Window], ranges: dict[str, float]
) -> float:
    """The error of the logits, every layer of every pass run."""
    model = source.reader.model
    quantizers = quantizers_by_name(model)
    with quantizers_off(model):
        exact = np.concatenate(logits(source.reader, windows), axis=1)
        set_ranges(model, ranges)
        for name in ranges:
            quantizers[name].enable()
        found = np.concatenate(logits(source.reader, windows), axis=1)
        for name in ranges:
            quantizers[name].disable()
    return float(np.sqrt(np.mean((found - exact) ** 2)))


def make_probe(source: CalibratedReader, windows: list[Window]) -> LogitProbe:
    reader = source.reader
    return LogitProbe(reader.wrapped, windows, source.plan, reader.inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probe_equals_a_plain_run(
    windows: list[Window], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that answer from memory change no error, wherever the site stands."""
    addend = Rule(enable=True, tensor_class=TensorClass.FFN_OUTPUT)
    own = Recipe("own", (*RECIPES["full"].rules, addend))
    monkeypatch.setitem(RECIPES, "own", own)
    source = calibrate_reader(name, windows[:1], "own")
    probe = make_probe(source, windows[:1])
    places = {
        (TensorClass.ATTENTION_RESIDUAL, 0),
        (TensorClass.ATTENTION_RESIDUAL, 1),
        (TensorClass.SOFTMAX, 1),
        (TensorClass.FFN_OUT_WEIGHT, 0),
        (TensorClass.FFN_OUTPUT, 1),
    }
    sites = [s for s in source.plan.sites if (s.tensor_class, s.layer) in places]
    trials = [{site.name: source.ranges[site.name]} for site in sites]
    trials.append({site.name: source.ranges[site.name] for site in source.plan.sites})
    assert len(trials) == 6
    for ranges in trials:
        found = probe.measure(ranges)
        wanted = measure_plainly(source, windows[:1], ranges)
        assert found == pytest.approx(wanted, rel=1e-4), list(ranges)
        assert found > 0
    assert probe.measure({}) == 0.0


def test_probe_runs_layers_once_changed(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """For a site of layer 1 layer 0 does not run; afterwards it does again."""
    probe = make_probe(source, windows)
    runs: list[str] = []
    for name in (
        "layer.0.intermediate.dense",
        "layer.1.intermediate.dense",
    ):
        module = source.reader.model.get_submodule(f"bert.encoder.{name}")
        module.register_forward_hook(lambda *_, name=name: runs.append(name[6]))
    for layer, expected in ((1, {"1"}), (0, {"0", "1"})):
        runs.clear()
        site = next(
            s
            for s in source.plan.sites
            if s.layer == layer and s.tensor_class is TensorClass.SOFTMAX
        )
        probe.measure({site.name: 1.0})
        assert set(runs) == expected
    runs.clear()
    logits(source.reader, windows[:1])
    assert runs == ["0", "1"]


def test_probe_takes_ranges_of_either_shape(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """A weight can be tried per tensor after per channel."""
    probe = make_probe(source, windows)
    name = next(s.name for s in source.plan.sites if s.is_weight)
    per_channel = source.ranges[name]
    coarse = probe.measure({name: float(per_channel.max())})
    assert coarse > probe.measure({name: per_channel}) > 0


def test_each_choice_is_the_best_candidate(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """No candidate, tried alone on the same windows, is nearer than the chosen one."""
    plan = narrow(source, LAYER_1)
    found, chosen = search_ranges(
        source.reader.wrapped, windows, plan, source.histograms, source.reader.inputs
    )
    assert found.keys() == chosen.keys() == plan.names
    sites = {site.name: site for site in plan.sites}
    for names in shared_tensors(plan, source.histograms):
        amaxes = {
            candidate.name: source.histograms.compute_amax(sites[names[0]], candidate)
            for candidate in CANDIDATES
        }
        errors = {
            candidate: measure_plainly(source, windows, dict.fromkeys(names, amax))
            for candidate, amax in amaxes.items()
        }
        (choice,) = {chosen[name] for name in names}
        assert errors[choice] <= min(errors.values()) * (1 + 1e-4)
        assert {found[name] for name in names} == {amaxes[choice]}


def test_shared_ranges_stay_shared(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """What a recipe wants shared among Q, K and V is so after a search too."""
    only = [Rule(enable=False, pattern="*")]
    only += [
        Rule(enable=True, tensor_class=kind)
        for kind in (
            TensorClass.QUERY,
            TensorClass.KEY,
            TensorClass.VALUE,
            TensorClass.QKV_WEIGHT,
        )
    ]
    recipe = Recipe("a", tuple(only), per_channel=False, share_qkv=True)
    plan = recipe.choose(source.sites)
    switch_quantizers(source.reader.model, plan)
    found, _ = search_ranges(
        source.reader.wrapped, windows, plan, source.histograms, source.reader.inputs
    )
    for layer in (0, 1):
        for weights in (True, False):
            assert (
                len(
                    {
                        found[s.name]
                        for s in plan.sites
                        if s.layer == layer and s.is_weight is weights
                    }
                )
                == 1
            )


def test_weights_keep_their_range(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """Nothing is searched for weights: ranges are those any calibrator gives them."""
    plan = narrow(source, {TensorClass.FFN_OUT_INPUT, TensorClass.FFN_OUT_WEIGHT})
    found, chosen = search_ranges(
        source.reader.wrapped, windows, plan, source.histograms, source.reader.inputs
    )
    model = source.reader.model
    wanted = choose_ranges(model, plan, source.histograms, Calibrator("max"))
    assert found.keys() == plan.names
    assert chosen.keys() == {site.name for site in plan.activations}
    for site in plan.sites:
        if site.is_weight:
            np.testing.assert_array_equal(found[site.name], wanted[site.name])


def test_quantizers_are_on_as_before(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """Afterwards the plan's quantizers are on, and only they; one tick per tensor."""
    plan = narrow(source, LAYER_1)
    ticks: list[None] = []
    search_ranges(
        source.reader.wrapped,
        windows,
        plan,
        source.histograms,
        source.reader.inputs,
        on_tensor=lambda: ticks.append(None),
    )
    quantizers = quantizers_by_name(source.reader.model)
    assert {n for n, q in quantizers.items() if q.is_enabled} == plan.names
    assert len(ticks) == len(shared_tensors(plan, source.histograms)) == 3


def test_shared_tensors(calibrated: Calibrated) -> None:
    """Sites of one tensor form one group, and every activation is in one."""
    source = calibrated("bert")
    groups = shared_tensors(source.plan, source.histograms)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(site.name for site in source.plan.activations)
    tensors = {site.name: site.tensor for site in source.plan.sites}
    assert all(len({tensors[name] for name in group}) == 1 for group in groups)
    assert sorted(map(len, groups)) == [1] * 12 + [2, 2, 4, 4]


def test_windows_are_spread_over_the_set(
    source: CalibratedReader, windows: list[Window]
) -> None:
    """Of many windows a few are run, the first among them, never more than stated."""
    many = [windows[i % len(windows)] for i in range(3 * PROBE_WINDOWS + 1)]
    runs: list[int] = []
    wrapped = source.reader.wrapped
    wrapped.register_forward_pre_hook(lambda _m, given: runs.append(given[0].shape[1]))
    LogitProbe(wrapped, many, source.plan, source.reader.inputs)
    step = -(-len(many) // PROBE_WINDOWS)
    assert runs == [len(window) for window in many[::step]]
    assert 1 < len(runs) <= PROBE_WINDOWS


def test_no_windows(calibrated: Calibrated) -> None:
    """Without a window there is nothing to measure on."""
    source = calibrated("bert")
    with pytest.raises(BuildError, match="at least one window"):
        search_ranges(
            source.reader.wrapped,
            [],
            source.plan,
            source.histograms,
            source.reader.inputs,
        )
