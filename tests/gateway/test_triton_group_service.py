"""The whole gateway before three Tritons, of which one has a bad day at a time.

While one that serves is left no client may notice: every request here gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import httpx
import pytest

from int8qa.gateway.triton_group import TritonGroup
from tests.gateway.fakes import (
    CONTEXT,
    Service,
    build_contract,
    open_service,
    wait_until,
)
from tests.gateway.test_triton_faults import check_nothing_is_left
from tests.gateway.test_triton_group import ENOUGH_S, Server, run_tritons

BUILD = "ours"


@contextlib.asynccontextmanager
async def serve(
    tokenizer, servers: Sequence[Server], *, wait: bool = True
) -> AsyncIterator[Service]:
    for server in servers:
        server.build_id = BUILD
    changes = {"build_id": BUILD, "generation": 1}
    contract = build_contract(tokenizer).model_copy(update=changes)
    group = TritonGroup(",".join(s.address for s in servers), contract)
    async with open_service(
        tokenizer, engine=group, wait=wait, batcher={"max_in_flight": 6}
    ) as one:
        yield one


class Clients:
    """Ask one question after the other, each, until told to stop."""

    def __init__(self, one: Service, count: int) -> None:
        self.statuses: Counter[int] = Counter()
        self._one = one
        self._going = True
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(count)]

    async def _ask(self) -> None:
        while self._going:
            response = await self._one.ask()
            self.statuses[response.status_code] += 1

    async def answer(self, requests: int) -> None:
        """Return after so many more."""
        goal = self.statuses.total() + requests
        await wait_until(lambda: self.statuses.total() >= goal, limit_s=ENOUGH_S)

    async def answer_by(self, server: Server) -> None:
        """Return once a Triton has answered a batch again."""
        answered = server.answered
        await wait_until(lambda: server.answered > answered, limit_s=ENOUGH_S)

    async def stop(self) -> None:
        self._going = False
        await asyncio.wait_for(asyncio.gather(*self._tasks), ENOUGH_S)


async def kill(server: Server) -> None:
    await server.stop()


async def drain(server: Server) -> None:
    await server.stop(5)


async def freeze(server: Server) -> None:
    server.stopped = True


async def replace(server: Server) -> None:
    server.build_id = "newer"


async def unload(server: Server) -> None:
    server.loaded = {"qa_int8_2"}


async def recover(server: Server) -> None:
    server.stopped, server.build_id, server.loaded = False, BUILD, None
    if server._server is None:
        await server.start()


@pytest.mark.parametrize("trouble", [kill, drain, freeze, replace, unload])
async def test_no_request_fails_while_capacity_is_left(
    tokenizer, trouble: Callable[[Server], Awaitable[None]]
):
    """Under load one Triton of three falls out and returns, then the next."""
    async with run_tritons() as servers, serve(tokenizer, servers) as one:
        clients = Clients(one, 8)
        await clients.answer(20)
        for server in servers:
            await trouble(server)
            await clients.answer(20)
            ready = await one.client.get("/ready")
            assert ready.status_code == 200
            await recover(server)
            await clients.answer_by(server)
        await clients.stop()
        assert set(clients.statuses) == {200}
        await check_nothing_is_left(one)


async def test_two_of_three_fall_out_together(tokenizer):
    """One killed and one stopped at once: the third answers everything."""
    async with run_tritons() as servers, serve(tokenizer, servers) as one:
        clients = Clients(one, 8)
        await clients.answer(20)
        await freeze(servers[0])
        await kill(servers[1])
        await clients.answer(30)
        await clients.stop()
        assert set(clients.statuses) == {200}


async def test_last_one_falls_out(tokenizer):
    """With none left requests are refused with Retry-After, and then answered again."""
    async with run_tritons() as servers, serve(tokenizer, servers) as one:
        for server in servers:
            await kill(server)
        refused: httpx.Response = await one.ask()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert (await one.client.get("/ready")).status_code == 503
        await servers[1].start()
        await one.wait_ready()
        response = await one.ask()
        assert response.status_code == 200
        assert response.json()["answer"]["text"] in CONTEXT


async def test_all_of_another_build(tokenizer):
    """Replaced one by one: served until the last, then refused, saying by what."""
    async with run_tritons() as servers, serve(tokenizer, servers) as one:
        watch = one.app.state.gateway.pipeline.watch
        for server in servers:
            assert (await one.ask()).status_code == 200
            await replace(server)
        await wait_until(watch.faults)
        response = await one.client.get("/ready")
        assert response.status_code == 503
        assert "build newer" in response.text
