"""A policy and costs that can be reckoned with a pencil."""

from __future__ import annotations

import pytest

from int8qa.planning.batching import Policy
from int8qa.planning.simulation import Overheads, Service

SIZES = {32: (1, 2, 4, 8), 64: (1, 2, 4), 128: (1, 2), 384: (1,)}


def make_service(
    overheads: Overheads | None = None,
    *,
    max_wait_s: float = 0.004,
    max_in_flight: int = 2,
    speed: float = 1.0,
) -> Service:
    """A batch takes 1 ms and 50 µs for each padded token."""
    return Service(
        Policy(SIZES, max_wait_s, max_in_flight),
        {
            (size, length): (0.001 + 50e-6 * size * length) / speed
            for length, sizes in SIZES.items()
            for size in sizes
        },
        overheads or Overheads(),
    )


@pytest.fixture
def mixed() -> tuple[tuple[int, ...], ...]:
    """Questions of one window and of several."""
    return ((32,), (32,), (64,), (64,), (128,), (384,), (384, 384, 64))
