"""A policy and costs that can be reckoned with a pencil."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from int8qa.contract import Contract
from int8qa.gateway.choice import BatchCosts
from int8qa.gateway.line import Policy
from int8qa.planning.simulation import Overheads, Service, Shape
from tests.records import make_model_record

MODEL = make_model_record()
CONTRACT = Contract(
    build_id="test",
    checkpoint="test",
    tokenizer_sha256="0" * 64,
    pad_token_id=0,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_window_tokens=384,
    sequence_buckets=(32, 64, 128, 384),
    batch_sizes=(1, 2, 4, 8),
    max_batch_tokens=256,
    models={},
)
SIZES = {32: (1, 2, 4, 8), 64: (1, 2, 4), 128: (1, 2), 384: (1,)}


def make_service(
    overheads: Overheads | None = None,
    *,
    max_wait_s: float = 0.004,
    max_in_flight: int = 2,
    speed: float = 1.0,
) -> Service:
    """A batch takes 1 ms and 50 µs for each padded token."""
    batch_s = {
        (size, length): (0.001 + 50e-6 * size * length) / speed
        for length, sizes in SIZES.items()
        for size in sizes
    }
    policy = Policy(make_costs(batch_s), max_wait_s, max_in_flight)
    return Service(policy, batch_s, overheads or Overheads())


def make_costs(batch_s: Mapping[Shape, float]) -> BatchCosts:
    """A policy that knows what the engine takes."""
    costs: dict[int, dict[int, float]] = {}
    for (size, length), seconds in batch_s.items():
        costs.setdefault(length, {})[size] = seconds
    return BatchCosts(costs)


@pytest.fixture
def mixed() -> tuple[tuple[int, ...], ...]:
    """Questions of one window and of several."""
    return ((32,), (32,), (64,), (64,), (128,), (384,), (384, 384, 64))
