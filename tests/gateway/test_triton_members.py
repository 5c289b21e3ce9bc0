"""Several Tritons, several builds: who takes part, and what is loaded into whom."""

from __future__ import annotations

import grpc
import pytest

from int8qa.contract import Contract
from int8qa.errors import ContractError, EngineUnavailableError, ModelLoadError
from tests.gateway.fakes import build_contract
from tests.gateway.test_triton_group import (
    INT8,
    ask,
    ask_until_each_answers,
    connect,
    run_tritons,
)


def build_generation(tokenizer, build_id: str, generation: int) -> Contract:
    changes = {"build_id": build_id, "generation": generation}
    return build_contract(tokenizer).model_copy(update=changes)


async def test_triton_with_another_build_gets_no_batch(tokenizer):
    """Same names, another build: left out as soon as it is seen; with none left, said."""
    contract = build_generation(tokenizer, "ours", 1)
    async with (
        run_tritons() as servers,
        connect(tokenizer, servers, contract) as group,
    ):
        for server in servers:
            server.build_id = "ours"
        await ask_until_each_answers(group, servers)
        servers[0].build_id = "theirs"
        assert await group.ready(INT8)
        await group.check_contract(INT8)
        answered = servers[0].answered
        await ask(group, 9)
        assert servers[0].answered == answered
        for server in servers:
            server.build_id = "theirs"
        assert await group.ready(INT8)
        with pytest.raises(ContractError, match="theirs"):
            await group.check_contract(INT8)


async def test_rollout_serves_both_builds(tokenizer):
    """Gateways of two builds share Tritons of two, one after the other replaced."""
    old = build_generation(tokenizer, "old", 1)
    new = build_generation(tokenizer, "new", 2)
    async with (
        run_tritons() as servers,
        connect(tokenizer, servers, old) as first,
        connect(tokenizer, servers, new) as second,
    ):
        for server in servers:
            server.build_id, server.loaded = "old", {"qa_int8"}
        assert await first.ready(INT8)
        assert not await second.ready(INT8), "reachable, but not loaded"
        for server in servers:
            assert await first.ready(INT8)
            await ask(first, 6)
            server.build_id, server.loaded = "new", {"qa_int8_2"}
            assert await second.ready(INT8)
            await ask(second, 6)
        assert not await first.ready(INT8)
        names = {request.model_name for s in servers for request in s.seen}
        assert names == {"qa_int8", "qa_int8_2"}


async def test_model_is_loaded_into_all(tokenizer):
    """Each Triton that lacks it loads it, over its own channel and with the key."""
    contract = build_generation(tokenizer, "new", 2)
    async with (
        run_tritons() as servers,
        connect(tokenizer, servers, contract) as group,
    ):
        for server in servers:
            server.build_id, server.loaded = "new", set()
        servers[1].loaded = {"qa_int8_2"}
        assert not await group.holds(INT8)
        await group.load(INT8)
        assert await group.holds(INT8)
        load = ("load", "qa_int8_2", "k")
        assert [server.controlled for server in servers] == [[load], [], [load]]
        await group.unload(INT8)
        assert all(server.loaded == set() for server in servers)


@pytest.mark.parametrize("trouble", ["refuses", "is gone", "has another build"])
async def test_model_is_loaded_into_all_or_none(tokenizer, trouble: str):
    """Where one cannot, the others give it up again, and the error says which."""
    contract = build_generation(tokenizer, "new", 2)
    async with (
        run_tritons() as servers,
        connect(tokenizer, servers, contract) as group,
    ):
        for server in servers:
            server.build_id, server.loaded = "new", set()
        if trouble == "refuses":
            servers[2].failure = (grpc.StatusCode.INVALID_ARGUMENT, "no such plan")
        elif trouble == "is gone":
            await servers[2].stop()
            with pytest.raises(EngineUnavailableError, match=r"all 3 .*TRITON__URL"):
                await group.holds(INT8)
        else:
            servers[2].build_id = "theirs"
        with pytest.raises(ModelLoadError, match="all 3 Tritons or into none"):
            await group.load(INT8)
        assert [server.loaded for server in servers] == [set()] * 3


async def test_unload_asks_all(tokenizer):
    """One that refuses keeps no other from giving a model up."""
    async with run_tritons() as servers, connect(tokenizer, servers) as group:
        for server in servers:
            server.loaded = {"qa_int8"}
        await group.ready(INT8)
        servers[0].failure = (grpc.StatusCode.INTERNAL, "busy")
        with pytest.raises(ModelLoadError, match=servers[0].address):
            await group.unload(INT8)
        assert [server.loaded for server in servers[1:]] == [set(), set()]
