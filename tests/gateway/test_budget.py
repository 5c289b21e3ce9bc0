"""Bytes of bodies that the gateway holds at once."""

from __future__ import annotations

import asyncio

import pytest

from int8qa.errors import QueueFullError
from int8qa.gateway.budget import ByteBudget
from tests.gateway.fakes import CONTEXT, open_service, wait_until


def test_budget_refuses_the_second_and_never_the_first():
    """Alone a request gets what it needs; beside others only what is left."""
    budget = ByteBudget(100)
    budget.take(150)
    with pytest.raises(QueueFullError, match="150 bytes; allowed are 100"):
        budget.take(1)
    budget.give_back(150)
    budget.take(60)
    budget.take(40)
    assert budget.held == 100


async def test_bodies_together_are_bounded_and_given_back(tokenizer):
    """Beside a held body another gets 429 at once; after its end there is room again."""
    limits = {"max_pending_bytes": 1024}
    async with open_service(tokenizer, limits=limits) as one:
        one.engine.open_gate.clear()
        first = asyncio.create_task(one.ask(context=CONTEXT + " " * 800))
        await wait_until(lambda: one.engine.calls)
        refused = await one.ask()
        assert refused.status_code == 429
        assert refused.json()["type"].endswith("queue-full")
        assert "MAX_PENDING_BYTES" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        one.engine.open_gate.set()
        assert (await first).status_code == 200
        for _ in range(5):
            assert (await one.ask()).status_code == 200
