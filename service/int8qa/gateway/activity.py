"""What the gateway is busy with: requests from admission to reply, and questions.

In: beginnings and ends. Out: how many, whether none, and whether somebody came
meanwhile; questions are those of all gateway processes. Knows neither what a request
is nor the time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from int8qa.gateway.load import Figure, Load, stand_alone

_POLL_S = 0.005
"""How often other processes are looked at, which announce nothing."""


class Activity:
    """Counts; its events belong to the running event loop.

    Requests and questions are counted apart: a request that still sends its body, or
    whose reader is slow, is admitted and asks nothing of the engine.
    """

    def __init__(
        self,
        on_change: Callable[[int], None] = lambda _requests: None,
        load: Load | None = None,
    ) -> None:
        self._on_change = on_change
        self._load = load or stand_alone()
        self._replays = 0
        self._begun = 0
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
        return self._questions + self._load.add_up_others(Figure.WORK)

    @property
    def arrivals(self) -> int:
        """Questions that ever came: equal twice, nobody came between."""
        return self._arrivals + self._load.add_up_others(Figure.ARRIVALS)

    async def wait_for_no_request(self) -> None:
        """Return once no request is admitted; at once if none is."""
        await self._no_request.wait()

    async def wait_for_no_question(self) -> None:
        """Return once no question is in work; at once if none is."""
        await self._no_question.wait()
        while self.questions:
            await asyncio.sleep(_POLL_S)
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
        self._begin()
        try:
            yield
        finally:
            self._questions -= 1
            self._show_work()
            if not self._questions:
                self._no_question.set()

    @contextlib.contextmanager
    def replay(self) -> Iterator[bool]:
        """Count a replay, which to other processes is a question like any.

        Gives whether they leave the engine alone now.
        """
        self._replays += 1
        self._begin()
        try:
            yield not self._load.add_up_others(Figure.WORK)
        finally:
            self._replays -= 1
            self._show_work()

    def _begin(self) -> None:
        self._begun += 1
        # First the work: who sees the arrival may look for it.
        self._show_work()
        self._load.set(Figure.ARRIVALS, self._begun)

    def _show_work(self) -> None:
        self._load.set(Figure.WORK, self._questions + self._replays)
