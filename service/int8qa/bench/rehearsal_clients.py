"""Clients of several gateways, spread over them as a Service spreads them.

In: addresses, questions and a rate. Out: what became of every request, and when.
Whoever is out of service gets nothing new, and ends what it has; who is out is decided
elsewhere. Nothing that failed is asked again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from int8qa.bench.load import TIMEOUT_S
from int8qa.bench.wire import Address, ConnectionPool, Reply

CONNECTIONS = 512
"""To each gateway: a request must not queue in the client."""
NOBODY = "no gateway in service"
NO_ANSWER = "no answer in the reply"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that has ended."""

    sent_s: float
    """Since the clients' clock began."""
    gateway: int
    seconds: float
    failure: str | None
    """None for an answer."""


class Clients:
    """They ask one question after the other, each of the next gateway in service."""

    def __init__(
        self, urls: Sequence[str], bodies: Sequence[dict[str, Any]], *, seed: int
    ) -> None:
        """Prepare every request; connections open when they are needed."""
        # From the environment, so that no record of the run holds it.
        key = os.environ.get("INT8QA_API_KEY", "")
        addresses = [Address.parse(url, key=key) for url in urls]
        self._requests = [
            [address.post("/v1/answer", body) for body in bodies]
            for address in addresses
        ]
        self._pools = [
            ConnectionPool(address, CONNECTIONS, TIMEOUT_S) for address in addresses
        ]
        self._draw = random.Random(seed)  # noqa: S311 - arrivals and order, no secret
        self._turn = itertools.count()
        self._begin_s = time.monotonic()
        self.in_service = [True] * len(addresses)
        self.under_way = [0] * len(addresses)
        self.ended: list[Asked] = []

    def now_s(self) -> float:
        """Seconds on the clients' clock."""
        return time.monotonic() - self._begin_s

    def send(self, gateway: int | None = None) -> asyncio.Future[None]:
        """Ask a question of the next gateway in turn, or of a certain one.

        Returns:
            Done when the request has ended, well or not.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent_s = self.now_s()
        serving = [i for i, serves in enumerate(self.in_service) if serves]
        if gateway is None:
            if not serving:
                self.ended.append(Asked(sent_s, -1, 0.0, NOBODY))
                done.set_result(None)
                return done
            gateway = serving[next(self._turn) % len(serving)]
        asked = gateway
        self.under_way[asked] += 1

        def take(reply: Reply) -> None:
            self.under_way[asked] -= 1
            failure = reply.failure
            if failure is None and not _has_answer(reply.body):
                failure = NO_ANSWER
            self.ended.append(Asked(sent_s, asked, self.now_s() - sent_s, failure))
            if not done.done():
                done.set_result(None)

        self._pools[asked].send(self._draw.choice(self._requests[asked]), take)
        return done

    async def run_steadily(self, rate: float) -> None:
        """Poisson arrivals, whatever comes back when; until cancelled."""
        due_s = self.now_s()
        while True:
            await asyncio.sleep(max(0.0, due_s - self.now_s()))
            self.send()
            due_s += self._draw.expovariate(rate)

    async def rush(self, seconds: float, clients: int) -> None:
        """So many clients who ask the next question as soon as they have an answer."""
        until_s = self.now_s() + seconds

        async def ask_on() -> None:
            while self.now_s() < until_s:
                await self.send()

        await asyncio.gather(*(ask_on() for _ in range(clients)))

    async def finish(self) -> None:
        """Return once every request has ended."""
        while any(self.under_way):  # noqa: ASYNC110 - each ends within TIMEOUT_S
            await asyncio.sleep(0.05)
        for pool in self._pools:
            pool.close()


def _has_answer(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and "answer" in found
