"""The token bucket, on a clock of its own."""

from __future__ import annotations

import pytest

from int8qa.gateway.rate_limit import TokenBucket


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_burst_and_then_the_rate(clock: Clock):
    """As many at once as it holds, then one each 1/rate seconds."""
    bucket = TokenBucket(4.0, 3, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(0.25)
    clock.now_s += 0.125
    assert bucket.take() == pytest.approx(0.125)
    clock.now_s += 0.125
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(0.25)


def test_rest_fills_it_to_the_brim_and_no_further(clock: Clock):
    """A day of rest saves up no more than the burst."""
    bucket = TokenBucket(1.0, 2, clock)
    clock.now_s += 86_400
    assert [bucket.take() == 0 for _ in range(3)] == [True, True, False]


def test_waiting_as_told_is_enough(clock: Clock):
    """Whoever waits what it says gets one, whatever the rate's fractions."""
    bucket = TokenBucket(0.7, 1, clock)
    assert bucket.take() == 0
    for _ in range(1000):
        clock.now_s += bucket.take()
        assert bucket.take() == 0


def test_debt_is_paid_before_the_next(clock: Clock):
    """A charge beyond what is there delays what comes after."""
    bucket = TokenBucket(2.0, 5, clock)
    assert bucket.take() == 0
    bucket.charge(9)
    assert bucket.take() == pytest.approx(3.0)
    clock.now_s += 3.0
    assert bucket.take() == 0


def test_clock_that_goes_back_costs_nothing(clock: Clock):
    """Nothing is gained and nothing lost."""
    bucket = TokenBucket(1.0, 2, clock)
    assert bucket.take() == 0
    clock.now_s -= 100
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(1.0)
