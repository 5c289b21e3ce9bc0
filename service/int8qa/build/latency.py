"""How long engines take for a batch, taking turns.

In: engines by name, shapes. Out: median and 99th percentile milliseconds. Turns, not
blocks: whatever else the machine does then hits all engines alike, and their ratio
stays true where their times do not. Knows no engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from int8qa.build.accuracy import Infer
from int8qa.contract import ATTENTION_MASK, INPUT_IDS

Shape = tuple[int, int]
"""Batch and padded length."""

LATENCY_SHAPES: tuple[Shape, ...] = ((1, 128), (1, 384), (8, 128))
"""What precisions are compared at: a short question, a full window, a batch."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one engine at one shape."""

    p50_ms: float
    p99_ms: float
    """Of few runs this is all but the slowest of them."""
    runs: int


def name_shape(shape: Shape) -> str:
    """``1x128``."""
    return f"{shape[0]}x{shape[1]}"


def fit_shapes(max_window_tokens: int) -> list[Shape]:
    """``LATENCY_SHAPES``, none longer than the model reads, each once."""
    return list(
        dict.fromkeys(
            (batch, min(length, max_window_tokens)) for batch, length in LATENCY_SHAPES
        )
    )


def time_engines(
    engines: Mapping[str, Infer],
    shapes: Sequence[Shape],
    inputs: Sequence[str],
    *,
    repeats: int = 7,
    budget_s: float | None = None,
    warm_ups: int = 2,
    on_shape: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Latency]]:
    """Latency by shape and engine.

    Args:
        engines: what to run.
        shapes: batches and lengths, filled to the last token.
        inputs: names of the model's inputs.
        repeats: timed turns; more, up to 100, if the budget allows.
        budget_s: time to spend on a shape, warm-up not counted.
        warm_ups: turns before that; engines compile for each new shape.
        on_shape: called after each shape.
    """
    table: dict[str, dict[str, Latency]] = {}
    for shape in shapes:
        feed = _make_feed(shape, inputs)
        for _ in range(warm_ups):
            for infer in engines.values():
                infer(feed)
        times: dict[str, list[float]] = {name: [] for name in engines}
        begin = time.monotonic()
        turn = 0
        while turn < repeats or (
            budget_s is not None and turn < 100 and time.monotonic() - begin < budget_s
        ):
            # Every other turn backwards, so that none always follows the same one.
            order = list(engines.items())
            for name, infer in order if turn % 2 else reversed(order):
                start = time.perf_counter()
                infer(feed)
                times[name].append(1e3 * (time.perf_counter() - start))
            turn += 1
        table[name_shape(shape)] = {
            name: Latency(
                p50_ms=round(float(np.median(values)), 3),
                p99_ms=round(float(np.percentile(values, 99)), 3),
                runs=len(values),
            )
            for name, values in times.items()
        }
        on_shape()
    return table


def time_in_rounds(
    engines: Mapping[str, Infer],
    shapes: Sequence[Shape],
    inputs: Sequence[str],
    *,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds by shape and engine, for comparing shapes as well.

    Round after round over all shapes: whatever else the machine does for a while hits
    all of them alike.

    Args:
        engines: what to run.
        shapes: batches and lengths, filled to the last token.
        inputs: names of the model's inputs.
        rounds: timed ones.
        on_round: called after each of them.
    """
    times: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        table = time_engines(
            engines, shapes, inputs, repeats=1, warm_ups=0 if number else 2
        )
        for shape, by_name in medians(table).items():
            for name, ms in by_name.items():
                times.setdefault(shape, {}).setdefault(name, []).append(ms)
        on_round()
    return {
        shape: {name: round(float(np.median(ms)), 3) for name, ms in by_name.items()}
        for shape, by_name in times.items()
    }


def medians(table: Mapping[str, Mapping[str, Latency]]) -> dict[str, dict[str, float]]:
    """Only the medians, by shape and engine."""
    return {
        shape: {name: latency.p50_ms for name, latency in by_name.items()}
        for shape, by_name in table.items()
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios above 0: the mean that does not care which way round they are."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def mean_gain(
    table: Mapping[str, Mapping[str, Latency]], name: str, rival: str = "fp16"
) -> float:
    """How many times as fast as its rival an engine is, over all shapes."""
    return geometric_mean(
        [by_name[rival].p50_ms / by_name[name].p50_ms for by_name in table.values()]
    )


def _make_feed(shape: Shape, inputs: Sequence[str]) -> dict[str, npt.NDArray[np.int32]]:
    """Random tokens without padding, int32 [B, S] per input."""
    ids = np.random.default_rng(0).integers(5, 1000, shape, dtype=np.int32)
    feed = {name: np.zeros_like(ids) for name in inputs}
    return feed | {INPUT_IDS: ids, ATTENTION_MASK: np.ones_like(ids)}
