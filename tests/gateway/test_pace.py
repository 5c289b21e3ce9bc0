"""The measured drain rate and what clients are told of it."""

from __future__ import annotations

import pytest

from int8qa.gateway.pace import (
    MAX_RETRY_AFTER_S,
    MIN_BATCHES,
    UNMEASURED_S,
    WINDOW_S,
    DrainRate,
    compute_retry_after_s,
)


def test_nothing_measured_is_a_guess_and_says_so():
    """Before the first batch any work takes the same second, and none takes none."""
    pace = DrainRate()
    assert not pace.measured
    assert (pace.estimate_s(0), pace.estimate_s(10**6)) == (0.0, UNMEASURED_S)


def test_rate_is_that_of_the_window():
    """An engine that became ten times slower is known by it once the window passed."""
    pace, now = DrainRate(), 0.0
    for _ in range(100):
        pace.record(1000, now, now + 0.1)
        now += 0.1
    assert pace.estimate_s(1000) == pytest.approx(0.1)
    for _ in range(int(WINDOW_S) + 1):
        pace.record(1000, now, now + 1)
        now += 1
    assert pace.estimate_s(1000) == pytest.approx(1.0)


def test_idle_time_is_not_slowness():
    """Only time with a batch in the engine counts, and the last batches are kept."""
    pace, now = DrainRate(), 0.0
    for _ in range(MIN_BATCHES + 4):
        pace.record(1000, now, now + 0.5)
        now += 1000
    assert pace.estimate_s(1000) == pytest.approx(0.5)


def test_an_engine_that_hangs_is_late():
    """A batch over its time adds what it is over; one within its time adds nothing."""
    pace = DrainRate()
    pace.record(1000, 0.0, 1.0)
    assert pace.measure_delay_s(2.5, 2.0, 1000) == 0.0
    assert pace.measure_delay_s(12.0, 2.0, 1000) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("drain_s", "low", "high"), [(0.0, 0, 1), (0.3, 0.3, 1.3), (10, 10, 15)]
)
def test_retry_after_is_spread(drain_s: float, low: float, high: float):
    """Those refused together do not come back together."""
    assert compute_retry_after_s(drain_s, lambda: 0.0) == pytest.approx(low)
    assert compute_retry_after_s(drain_s, lambda: 1.0) == pytest.approx(high)


def test_retry_after_is_bounded():
    """A queue of hours sends nobody away for hours."""
    assert compute_retry_after_s(10_000, lambda: 1.0) == MAX_RETRY_AFTER_S * 1.5
