"""Waiting with a limit and without losing a cancellation.

In: an awaitable and seconds. Out: its result, or a timeout. Up to Python 3.11
``asyncio.wait_for`` swallows a cancellation that arrives together with the result
(CPython gh-86296), and a request whose client had left would go on to the engine.
From 3.11 on ``asyncio.timeout`` does all of it, and needs no task of its own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def finish_within(awaitable: Awaitable[T], limit_s: float) -> T:
    """Wait for ``awaitable``; at the limit, or when cancelled, cancel it.

    A limit that has passed still lets through what is already done.

    Raises:
        asyncio.TimeoutError: the limit passed first.
    """
    if sys.version_info >= (3, 11):
        async with asyncio.timeout(max(limit_s, 0.0)):
            return await awaitable
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({future}, timeout=max(limit_s, 0.0))
        if not future.done():
            raise asyncio.TimeoutError
        return future.result()
    finally:
        if not future.done():
            future.cancel()
