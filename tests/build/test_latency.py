"""Engines take turns, so that what disturbs one disturbs all; figures and budget."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.build import latency
from int8qa.build.latency import (
    LATENCY_SHAPES,
    Latency,
    fit_shapes,
    geometric_mean,
    mean_gain,
    medians,
    name_shape,
    time_engines,
    time_in_rounds,
)
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS

INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)


class FakeClock:
    """Time passes only where an engine says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    fake = SimpleNamespace(monotonic=clock.read, perf_counter=clock.read)
    monkeypatch.setattr(latency, "time", fake)
    return clock


class Bench:
    """Engines that write down when they are called and with what."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.calls: list[str] = []
        self.feeds: list[Any] = []
        self.clock = clock

    def make(self, name: str, *seconds: float) -> Any:
        """An engine whose runs take ``seconds``, over and over."""
        durations = itertools.cycle(seconds or (0.0,))

        def infer(feed: Any) -> None:
            self.calls.append(name)
            self.feeds.append(feed)
            if self.clock is not None:
                self.clock.now += next(durations)

        return infer


def test_engines_take_turns() -> None:
    """After warm-up each engine runs once a turn, every other turn backwards."""
    bench = Bench()
    engines = {name: bench.make(name) for name in "abc"}
    time_engines(engines, [(1, 8)], INPUTS, repeats=4)
    turns = ["".join(bench.calls[i : i + 3]) for i in range(0, len(bench.calls), 3)]
    assert turns[:2] == ["abc", "abc"]
    assert turns[2:] == ["cba", "abc", "cba", "abc"]


def test_warm_up_is_not_counted(clock: FakeClock) -> None:
    """The first runs compile, and are nobody's latency."""
    bench = Bench(clock)
    engine = bench.make("a", 64.0, 64.0, 0.25, 0.5, 0.125, 0.25)
    table = time_engines(
        {"a": engine}, [(1, 8)], INPUTS, repeats=4, budget_s=1.0, warm_ups=2
    )
    assert table["1x8"]["a"] == Latency(p50_ms=250.0, p99_ms=492.5, runs=4)
    bench.calls.clear()
    time_engines({"a": engine}, [(1, 8)], INPUTS, repeats=1, warm_ups=5)
    assert len(bench.calls) == 6


@pytest.mark.parametrize(
    ("budget_s", "turns"),
    [(None, 7), (0.0, 7), (1.5, 7), (3.0, 12), (3.125, 13), (1e9, 100)],
)
def test_budget(clock: FakeClock, budget_s: float | None, turns: int) -> None:
    """At least the repeats, at most a hundred; else until the time is spent."""
    bench = Bench(clock)
    engines = {name: bench.make(name, 0.125) for name in "ab"}
    table = time_engines(engines, [(1, 8), (2, 8)], INPUTS, budget_s=budget_s)
    for by_name in table.values():
        assert {one.runs for one in by_name.values()} == {turns}
    # The budget is each shape's own.
    assert len(bench.calls) == 2 * 2 * (turns + 2)


def test_rounds_go_over_all_shapes(clock: FakeClock) -> None:
    """What slows the machine for a while slows every shape; medians are over rounds."""
    bench = Bench(clock)
    # Two shapes, warmed twice, then three rounds, the second of them disturbed.
    seconds = (9.0, 9.0, 0.25, 9.0, 9.0, 0.5, 4.0, 8.0, 0.125, 1.0)
    ticks: list[None] = []
    table = time_in_rounds(
        {"a": bench.make("a", *seconds)},
        [(1, 8), (2, 8)],
        INPUTS,
        rounds=3,
        on_round=lambda: ticks.append(None),
    )
    assert table == {"1x8": {"a": 250.0}, "2x8": {"a": 1000.0}}
    assert [feed[INPUT_IDS].shape for feed in bench.feeds[-4:]] == [(1, 8), (2, 8)] * 2
    assert len(ticks) == 3


def test_figures(clock: FakeClock) -> None:
    """Median and 99th percentile in milliseconds, of each engine its own."""
    bench = Bench(clock)
    slow = [n / 1024 for n in range(1, 102)]
    engines = {"slow": bench.make("slow", *slow), "fast": bench.make("fast", 1 / 1024)}
    table = time_engines(engines, [(1, 8)], INPUTS, repeats=101, warm_ups=0)
    found = table["1x8"]["slow"]
    assert found.runs == 101
    assert found.p50_ms == pytest.approx(51e3 / 1024, abs=1e-3)
    assert found.p99_ms == pytest.approx(100e3 / 1024, abs=1e-3)
    assert table["1x8"]["fast"] == Latency(0.977, 0.977, 101)
    assert medians(table) == {"1x8": {"slow": found.p50_ms, "fast": 0.977}}


def test_real_clock() -> None:
    """What is measured is no negative time, and p99 is not below the median."""
    table = time_engines({"a": Bench().make("a")}, [(1, 8)], INPUTS, repeats=20)
    found = table["1x8"]["a"]
    assert 0.0 <= found.p50_ms <= found.p99_ms


def test_batches() -> None:
    """int32 [B, S] per input, tokens everywhere; one table and one tick per shape."""
    bench = Bench()
    ticks: list[None] = []
    table = time_engines(
        {"a": bench.make("a")},
        [(1, 32), (8, 128)],
        INPUTS,
        repeats=1,
        warm_ups=0,
        on_shape=lambda: ticks.append(None),
    )
    assert list(table) == ["1x32", "8x128"]
    assert len(ticks) == 2
    for feed, shape in zip(bench.feeds, ((1, 32), (8, 128)), strict=True):
        assert feed.keys() == set(INPUTS)
        assert {array.shape for array in feed.values()} == {shape}
        assert {array.dtype for array in feed.values()} == {np.dtype(np.int32)}
        assert feed[ATTENTION_MASK].all()
        assert not feed[TOKEN_TYPE_IDS].any()
        assert len(np.unique(feed[INPUT_IDS])) > 20
    time_engines({"a": bench.make("a")}, [(1, 8)], INPUTS[:2], repeats=1)
    assert bench.feeds[-1].keys() == set(INPUTS[:2])


@pytest.mark.parametrize(("shape", "name"), [((1, 128), "1x128"), ((8, 384), "8x384")])
def test_shape_name(shape: tuple[int, int], name: str) -> None:
    """Batch, then tokens."""
    assert name_shape(shape) == name


@pytest.mark.parametrize(
    ("longest", "shapes"),
    [
        (384, list(LATENCY_SHAPES)),
        (512, list(LATENCY_SHAPES)),
        (256, [(1, 128), (1, 256), (8, 128)]),
        # Two of the shapes become one.
        (128, [(1, 128), (8, 128)]),
        (32, [(1, 32), (8, 32)]),
    ],
)
def test_shapes_fit_the_model(longest: int, shapes: list[tuple[int, int]]) -> None:
    """No window is longer than the model reads, no shape is timed twice."""
    assert fit_shapes(longest) == shapes


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=400))
def test_geometric_mean(values: list[float]) -> None:
    """Turned round, the ratios have the mean turned round; it lies among them."""
    mean = geometric_mean(values)
    assert geometric_mean([1 / value for value in values]) == pytest.approx(1 / mean)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_gain() -> None:
    """How many times as fast, by the medians; the rival itself is as fast as it."""
    table = {
        shape: {
            "a": Latency(ours, 99.0, 7),
            "fp16": Latency(theirs, 9.0, 7),
            "fp32": Latency(40.0, 9.0, 7),
        }
        for shape, ours, theirs in (("1x8", 5.0, 10.0), ("2x8", 2.0, 16.0))
    }
    assert mean_gain(table, "a") == pytest.approx(4.0)
    assert mean_gain(table, "fp16") == 1.0
    assert mean_gain(table, "fp16", "fp32") == pytest.approx(10**0.5)
