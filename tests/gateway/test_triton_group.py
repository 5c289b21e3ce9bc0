"""Several Tritons behind one engine, each a small real gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from int8qa.contract import ALONE_PARAMETER, Contract, Precision
from int8qa.errors import (
    EngineOutputError,
    EngineUnavailableError,
)
from int8qa.gateway import triton_group
from int8qa.gateway.engine import Engine
from int8qa.gateway.tensors import PaddedBatch
from int8qa.gateway.triton import TritonEngine
from int8qa.gateway.triton_group import TritonGroup, open_tritons
from tests.gateway.fakes import build_contract, wait_until
from tests.gateway.test_triton import FakeTriton, build_batch

INT8 = Precision.INT8
ENOUGH_S = 60.0
"""A deadline that no healthy Triton of a test comes near, on however slow a machine."""


@dataclass
class Server(FakeTriton):
    """A Triton that can be stopped, killed, drained and started again on its port."""

    host: str = "127.0.0.1"
    port: int = 0
    stopped: bool = False
    """Takes connections and requests, and answers none: what SIGSTOP does."""
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """Batches wait until it is set, probes do not: a slow engine."""
    loaded: set[str] | None = None
    """Names of models; None: whatever is asked for."""
    taken: int = 0
    """Batches that came in."""
    answered: int = 0
    cancelled: int = 0
    _server: grpc.aio.Server | None = None
    _reserved: socket.socket | None = None
    """Holds the port of a server that is down, for nobody else to answer there."""

    def __post_init__(self) -> None:
        self.held.set()

    async def start(self) -> None:
        self._give_up_port()
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self, grace_s: float = 0) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
            host = self.host.strip("[]")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._reserved = socket.socket(family)
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reserved.bind((host, self.port))

    def _give_up_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def ModelReady(self, request, context):  # noqa: N802 - gRPC's name
        await self._hang_if_stopped()
        ready = self.loaded is None or request.name in self.loaded
        return service_pb2.ModelReadyResponse(ready=ready)

    async def ModelInfer(self, request, context):  # noqa: N802 - gRPC's name
        self.taken += 1
        try:
            await self._hang_if_stopped()
            await self.held.wait()
            await self._hang_if_stopped()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        response = await super().ModelInfer(request, context)
        self.answered += 1
        return response

    async def _control(self, action, request, context, response):
        await super()._control(action, request, context, response)
        if self.loaded is not None:
            getattr(self.loaded, "add" if action == "load" else "discard")(
                request.model_name
            )
        return response

    async def _hang_if_stopped(self) -> None:
        while self.stopped:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def run_tritons(count: int = 3) -> AsyncIterator[list[Server]]:
    servers = [Server() for _ in range(count)]
    try:
        for server in servers:
            await server.start()
        yield servers
    finally:
        for server in servers:
            server.held.set()
            await server.stop()
            server._give_up_port()


@contextlib.asynccontextmanager
async def connect(
    tokenizer, servers: Sequence[Server], contract: Contract | None = None
) -> AsyncIterator[Engine]:
    url = ",".join(server.address for server in servers)
    group = open_tritons(url, contract or build_contract(tokenizer), control_key="k")
    await group.connect()
    try:
        yield group
    finally:
        await group.close()


async def ask(group: Engine, batches: int = 1) -> None:
    """So many batches one after the other; each must be answered rightly."""
    for _ in range(batches):
        check(await group.infer(INT8, build_batch(), ENOUGH_S))


def check(logits) -> None:
    np.testing.assert_array_equal(logits.start, build_batch().input_ids)


def send(group: Engine, batches: int) -> list[asyncio.Task]:
    return [
        asyncio.create_task(group.infer(INT8, build_batch(), ENOUGH_S))
        for _ in range(batches)
    ]


async def ask_until_each_answers(group: Engine, servers: Sequence[Server]) -> None:
    """Probe and ask until every one of them took part; no batch may fail meanwhile."""
    goals = [server.answered + 1 for server in servers]

    async def go_on() -> None:
        while any(s.answered < goal for s, goal in zip(servers, goals, strict=True)):
            await group.ready(INT8)
            await ask(group)

    await asyncio.wait_for(go_on(), ENOUGH_S)


def test_one_address_is_no_group(tokenizer):
    """A single host:port gets the engine it always got."""
    contract = build_contract(tokenizer)
    assert isinstance(open_tritons("triton:8001", contract), TritonEngine)
    for url in ("a:1,b:1", "dns:///triton:8001"):
        assert isinstance(open_tritons(url, contract), TritonGroup)


async def test_batches_go_round(tokenizer):
    """Each of three gets a third; what one model learns of them, another need not."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        before = [server.answered for server in servers]
        await ask(group, 9)
        assert [s.answered - b for s, b in zip(servers, before, strict=True)] == [3] * 3
        with pytest.raises(EngineUnavailableError, match="fp16"):
            await group.infer(Precision.FP16, build_batch(), ENOUGH_S)
        assert await group.ready(Precision.FP16)
        await group.infer(Precision.FP16, build_batch(), ENOUGH_S)


async def test_a_batch_is_alone_while_there_are_as_many_tritons(tokenizer):
    """Turns give each of three a batch of its own; the fourth shares a Triton's cores."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        for server in servers:
            server.seen.clear()
        for beside in range(4):
            batch = dataclasses.replace(build_batch(), beside=beside)
            await group.infer(INT8, batch, ENOUGH_S)
    seen = [request for server in servers for request in server.seen]
    assert sum(ALONE_PARAMETER in request.parameters for request in seen) == 3
    assert len(seen) == 4


async def test_killed_triton_costs_a_retry(tokenizer):
    """Batches in it are answered by another; later ones never notice."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        before = sum(server.taken for server in servers)
        for server in servers:
            server.held.clear()
        calls = send(group, 6)
        await wait_until(lambda: sum(server.taken for server in servers) >= before + 6)
        await servers[0].stop()
        for server in servers:
            server.held.set()
        for call in calls:
            check(await call)
        await ask(group, 12)
        await group.ready(INT8)
        await ask(group, 12)


async def test_stopped_triton_costs_a_retry(tokenizer):
    """A batch that it swallowed is answered by another, and it gets no more."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        servers[1].stopped = True
        for call in send(group, 6):
            check(await call)
        swallowed = servers[1].taken
        await ask(group, 12)
        assert servers[1].taken == swallowed
        servers[1].stopped = False
        await ask_until_each_answers(group, servers)


async def test_triton_stopped_in_the_midst_of_a_batch(tokenizer):
    """It had begun: its batch is late, sent elsewhere and answered."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        servers[2].held.clear()
        calls = send(group, 3)
        await wait_until(lambda: sum(call.done() for call in calls) == 2)
        servers[2].stopped = True
        servers[2].held.set()
        for call in calls:
            check(await call)


async def test_slow_is_not_lost(tokenizer, monkeypatch):
    """While all answer probes no batch is sent twice, however late it is."""
    monkeypatch.setattr(triton_group, "LATE_S", 0.01)
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await group.ready(INT8)
        for server in servers:
            server.held.clear()
        calls = send(group, 3)
        probes = group._refresh
        rounds = 0

        def count(precision):
            nonlocal rounds
            rounds += 1
            return probes(precision)

        monkeypatch.setattr(group, "_refresh", count)
        await wait_until(lambda: rounds >= 9)
        assert not any(call.done() for call in calls)
        for server in servers:
            server.held.set()
        for call in calls:
            check(await call)
        assert sum(server.answered for server in servers) == 3


async def test_port_that_accepts_and_never_speaks(tokenizer):
    """What never got as far as HTTP/2 is left out from the start."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with run_tritons(2) as servers:
            dumb = Server(port=mute.getsockname()[1])
            async with connect(tokenizer, [servers[0], dumb, servers[1]]) as group:
                assert await group.ready(INT8)
                await group.check_contract(INT8)
                await ask(group, 12)


async def test_refused_connection_and_restart(tokenizer):
    """Who is not there is left out, and takes part once he is."""
    async with run_tritons() as servers:
        await servers[0].stop()
        async with connect(tokenizer, servers) as group:
            assert await group.ready(INT8)
            await ask(group, 6)
            await servers[0].start()
            await ask_until_each_answers(group, servers)


async def test_count_is_told(tokenizer):
    """After each round: how many serve a model, and how many are left out."""
    counts: list[tuple[Precision, int, int]] = []
    async with run_tritons() as servers:
        group = open_tritons(
            ",".join(server.address for server in servers),
            build_contract(tokenizer),
            count=lambda *told: counts.append(told),
        )
        await group.ready(INT8)
        await servers[0].stop()
        await group.ready(INT8)
        await group.close()
    assert counts == [(INT8, 3, 0), (INT8, 2, 1)]


async def test_draining_triton_ends_its_batches(tokenizer):
    """A shutdown in order (GOAWAY) costs nothing: what it has it answers, once."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        before = [server.answered for server in servers]
        for server in servers:
            server.held.clear()
        calls = send(group, 3)
        await wait_until(lambda: all(s.taken > s.answered for s in servers))
        drain = asyncio.create_task(servers[0].stop(ENOUGH_S))
        for server in servers:
            server.held.set()
        for call in calls:
            check(await call)
        await drain
        assert servers[0].answered == before[0] + 1
        await ask(group, 12)


async def test_triton_that_refuses_batches(tokenizer):
    """UNAVAILABLE of one that answers its probes is retried by gRPC, not the client."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        servers[0].failure = (grpc.StatusCode.UNAVAILABLE, "queue is full")
        taken = servers[0].taken
        for _ in range(12):
            # Past the group's own second attempt.
            check(await group._routes[INT8].send(INT8, build_batch(), ENOUGH_S))
        assert servers[0].taken > taken


async def test_large_batch_is_retried_too(tokenizer):
    """A batch beyond gRPC's usual buffer for retries is kept, and sent again."""
    async with run_tritons(2) as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        servers[0].failure = (grpc.StatusCode.UNAVAILABLE, "queue is full")
        taken = servers[0].taken
        large = PaddedBatch(*(np.ones((64, 512), np.int32) for _ in range(3)))
        for _ in range(4):
            await group._routes[INT8].send(INT8, large, ENOUGH_S)
        assert servers[0].taken > taken


async def test_other_faults_are_not_asked_again(tokenizer):
    """A batch that a model refuses would be refused by the next one too."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await group.ready(INT8)
        for server in servers:
            server.failure = (grpc.StatusCode.INVALID_ARGUMENT, "shape")
        with pytest.raises(EngineOutputError):
            await ask(group)
        assert sum(server.taken for server in servers) == 1


async def test_all_gone_and_back(tokenizer):
    """With none left it is an error, as with one; whoever returns is enough."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        await group.ready(INT8)
        for server in servers:
            await server.stop()
        with pytest.raises(EngineUnavailableError):
            await ask(group)
        with pytest.raises(EngineUnavailableError):
            await group.ready(INT8)
        await servers[2].start()
        await wait_until_ready(group)
        await ask(group, 3)


async def wait_until_ready(group: Engine) -> None:
    async def go_on() -> None:
        ready = False
        while not ready:
            with contextlib.suppress(EngineUnavailableError):
                ready = await group.ready(INT8)

    await asyncio.wait_for(go_on(), ENOUGH_S)


async def test_client_that_leaves_takes_both_attempts_along(tokenizer):
    """A batch that was sent twice is cancelled twice."""
    async with run_tritons(2) as servers, connect(tokenizer, servers) as group:
        await ask_until_each_answers(group, servers)
        lost, kept = servers
        kept.held.clear()
        lost.stopped = True
        before = kept.taken
        calls = send(group, 2)
        await wait_until(lambda: kept.taken == before + 3)
        for call in calls:
            call.cancel()
        await wait_until(lambda: lost.cancelled + kept.cancelled == 4)
