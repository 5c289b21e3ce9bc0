"""What the gateway is busy with: requests from admission to reply, and questions.

In: beginnings and ends. Out: how many, whether none, and whether somebody came
meanwhile. Knows neither what a request is nor the time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator


class Activity:
    """Counts; its events belong to the running event loop.

    Requests and questions are counted apart: a request that still sends its body, or
    whose reader is slow, is admitted and asks nothing of the engine.
    """

    def __init__(
        self, on_change: Callable[[int], None] = lambda _requests: None
    ) -> None:
        self._on_change = on_change
        self._requests = 0
        self._questions = 0
        self._arrivals = 0
        self._no_request = asyncio.Event()
        self._no_request.set()
        self._no_question = asyncio.Event()
        self._no_question.set()

    @property
    def requests(self) -> int:
        """Admitted requests whose reply is not made yet."""
        return self._requests

    @property
    def questions(self) -> int:
        """Questions in work; a batch request has many."""
        return self._questions

    @property
    def arrivals(self) -> int:
        """Questions that ever came: equal twice, nobody came between."""
        return self._arrivals

    async def wait_for_no_request(self) -> None:
        """Return once no request is admitted; at once if none is."""
        await self._no_request.wait()

    async def wait_for_no_question(self) -> None:
        """Return once no question is in work; at once if none is."""
        await self._no_question.wait()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is worked on."""
        self._requests += 1
        self._no_request.clear()
        self._on_change(self._requests)
        try:
            yield
        finally:
            self._requests -= 1
            self._on_change(self._requests)
            if not self._requests:
                self._no_request.set()

    @contextlib.contextmanager
    def question(self) -> Iterator[None]:
        """Count a question while it is answered."""
        self._questions += 1
        self._arrivals += 1
        self._no_question.clear()
        try:
            yield
        finally:
            self._questions -= 1
            if not self._questions:
                self._no_question.set()
