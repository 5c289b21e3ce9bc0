"""Waiting with a limit."""

from __future__ import annotations

import asyncio

import pytest

from int8qa.gateway.waiting import finish_within


async def test_result_and_error_pass_through():
    """What the awaitable gives or raises is what the caller gets."""

    async def fail() -> None:
        raise KeyError

    assert await finish_within(asyncio.sleep(0, 7), 10) == 7
    with pytest.raises(KeyError):
        await finish_within(fail(), 10)


async def test_limit_cancels():
    """At the limit the work is cancelled."""
    event = asyncio.Event()
    task = asyncio.ensure_future(event.wait())
    with pytest.raises(asyncio.TimeoutError):
        await finish_within(task, 0)
    await asyncio.sleep(0)
    assert task.cancelled()


async def test_cancellation_beside_the_result_is_not_swallowed():
    """A cancellation that arrives together with the result still cancels."""
    future = asyncio.get_running_loop().create_future()
    went_on = []

    async def wait() -> None:
        await finish_within(future, 10)
        went_on.append(True)

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    future.set_result(None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not went_on


async def test_cancellation_reaches_the_work():
    """A caller that is cancelled takes its work along."""
    work = asyncio.ensure_future(asyncio.Event().wait())
    task = asyncio.ensure_future(finish_within(work, 10))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert work.cancelled()
