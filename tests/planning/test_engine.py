"""The engine's time among the batches inside it, by hand."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from int8qa.planning.engine import COOLING_S, SharedEngine

Batch = tuple[float, float, bool]
"""When it comes, what it takes of the whole engine, whether it came alone."""


def run_batches(
    instances: int,
    batches: list[Batch],
    *,
    losses: tuple[float, ...] = (),
    cold_s: float = 0.0,
) -> tuple[list[float], SharedEngine]:
    """When each is done; at each time of ``losses`` a second of work is added."""
    env = simpy.Environment()
    engine = SharedEngine(env, instances, cold_s=cold_s)
    ends = [0.0] * len(batches)

    def send(number: int, batch: Batch) -> Generator[simpy.Event, Any, None]:
        at_s, work_s, alone = batch
        yield env.timeout(at_s)
        yield engine.run(work_s, alone=alone)
        ends[number] = env.now

    def disturb(at_s: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(at_s)
        engine.lose(1.0)

    for number, batch in enumerate(batches):
        env.process(send(number, batch))
    for at_s in losses:
        env.process(disturb(at_s))
    env.run()
    return ends, engine


@pytest.mark.parametrize(
    ("instances", "batches", "ends"),
    [
        (1, [(0, 2, True), (1, 3, False)], [2, 5]),
        (2, [(0, 2, True)], [2]),
        # Half of the cores for either, and the second keeps to its half.
        (2, [(0, 2, False), (0, 3, False)], [4, 6]),
        # The third waits for an instance.
        (2, [(0, 1, False), (0, 2, False), (0, 1, False)], [2, 4, 4]),
        # All cores and a half are wanted: two thirds and a third.
        (2, [(0, 2, True), (0, 3, False)], [3, 7]),
    ],
    ids=str,
)
def test_by_hand(instances: int, batches: list[Batch], ends: list[float]) -> None:
    """Batches end when their shares of the engine say."""
    found, _ = run_batches(instances, batches)
    assert found == pytest.approx(ends)


def test_what_is_lost_is_lost_once() -> None:
    """A disturbance delays who is inside, together by as much as it takes."""
    ends, _ = run_batches(1, [(0, 2, True), (0, 1, True)], losses=(1.0,))
    assert ends == pytest.approx([3, 4])
    ends, _ = run_batches(2, [(0, 2, False), (0, 2, False)], losses=(1.0,))
    assert ends == pytest.approx([5, 5])


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.01, 2), st.booleans()),
        min_size=1,
        max_size=8,
    ),
)
def test_no_work_is_lost_or_made(instances: int, batches: list[Batch]) -> None:
    """The engine is used for what it was asked, and nobody is faster than it."""
    ends, engine = run_batches(instances, batches)
    assert engine.busy_s == pytest.approx(sum(work for _, work, _ in batches))
    assert not engine.working
    for (at_s, work_s, _), end_s in zip(batches, ends, strict=True):
        assert end_s >= at_s + work_s - 1e-9


def test_engine_that_stood_idle_is_slower() -> None:
    """The more so the longer, up to a bound; who finds it at work is not concerned."""
    cold_s = 0.5
    batches = [(0, 1, True), (1 + COOLING_S, 1, True), (2, 1, True), (10, 1, True)]
    ends, engine = run_batches(1, batches, cold_s=cold_s)
    soon_s = cold_s * (1 - math.exp(-1))
    second_s = 2 + COOLING_S + soon_s
    assert ends == pytest.approx([1, second_s, second_s + 1, 11 + cold_s])
    assert engine.busy_s == pytest.approx(4 + soon_s + cold_s)


def test_batches_end_however_late_it_is() -> None:
    """What rounding leaves of a batch after a million seconds is not work."""
    env = simpy.Environment(initial_time=1e6)
    engine = SharedEngine(env, 2)
    count = 200
    done = []

    def send(at_s: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(at_s)
        yield engine.run(0.0131 + at_s / 1000, alone=False)
        done.append(at_s)

    for number in range(count):
        env.process(send(number * 0.00517))
    # A clock that no longer moves would step for ever.
    for _ in range(20 * count):
        if len(done) < count:
            env.step()
    assert len(done) == count
