"""Which addresses a setting stands for, with a name server in memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from int8qa.errors import ConfigurationError
from int8qa.gateway import triton_addresses
from int8qa.gateway.triton_addresses import AddressBook, build_target, look_up
from int8qa.gateway.triton_group import TritonGroup
from int8qa.settings import load_settings
from tests.gateway.fakes import build_contract
from tests.gateway.test_triton_group import (
    ENOUGH_S,
    INT8,
    ask,
    ask_until_each_answers,
    run_tritons,
)


class Names:
    """A name server."""

    def __init__(self, **known: list[str]) -> None:
        self.known = known
        self.hangs = False

    async def look_up(self, host: str, port: int) -> list[str]:
        if self.hangs:
            await asyncio.sleep(ENOUGH_S)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [
            address if ":" in address else f"{address}:{port}"
            for address in self.known[host]
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    server = Names()
    monkeypatch.setattr(triton_addresses, "look_up", server.look_up)
    return server


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["[::1]:1", "[fd00::2]:2"], "ipv6:[::1]:1,[fd00::2]:2"),
        (["10.0.0.1:1", "[::1]:2"], "ipv6:[::ffff:10.0.0.1]:1,[::1]:2"),
    ],
)
def test_targets(addresses: list[str], target: str):
    """One target is of one family; a mixture is written as IPv6."""
    assert build_target(addresses) == target


async def test_target_of_both_families_is_reached(tokenizer):
    """The mixture is more than a spelling: gRPC connects to both."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    async with run_tritons(2) as servers:
        try:
            await servers[1].stop()
            servers[1].host = "[::1]"
            await servers[1].start()
        except (OSError, RuntimeError):
            pytest.skip("no IPv6 loopback on this machine")
        async with connect(
            f"{servers[0].address},{servers[1].address}", tokenizer
        ) as group:
            await ask_until_each_answers(group, servers)


async def test_literal_addresses_need_no_name_server():
    """Addresses are their own; a name with both families counts once, as IPv4."""
    assert await look_up("127.0.0.1", 8001) == ["127.0.0.1:8001"]
    assert await look_up("::1", 8001) == ["[::1]:8001"]
    assert await look_up("localhost", 8001) in (
        ["127.0.0.1:8001"],
        ["[::1]:8001"],
    )


async def test_one_of_a_name_or_all(names: Names):
    """A host in a list is one Triton; behind dns:/// are as many as it has."""
    names.known = {"a": ["10.0.0.9", "10.0.0.1"], "b": ["10.0.0.1"]}
    assert await AddressBook("a:1,b:1").find() == ["10.0.0.9:1", "10.0.0.1:1"]
    assert await AddressBook("dns:///a:1,b:1").find() == ["10.0.0.1:1", "10.0.0.9:1"]


async def test_what_cannot_be_looked_up_stays(names: Names, monkeypatch):
    """A name server that fails or hangs takes no Triton away."""
    monkeypatch.setattr(triton_addresses, "LOOKUP_TIMEOUT_S", 0.01)
    names.known = {"a": ["10.0.0.1"], "b": ["10.0.0.2"]}
    book = AddressBook("a:1,dns:///b:1")
    both = await book.find()
    assert both == ["10.0.0.1:1", "10.0.0.2:1"]
    names.known = {"a": ["10.0.0.3"]}
    assert await book.find() == ["10.0.0.3:1", "10.0.0.2:1"]
    names.hangs = True
    assert await book.find() == ["10.0.0.3:1", "10.0.0.2:1"]
    book.close()


async def test_names_come_and_go(tokenizer, names: Names):
    """Tritons that are added get batches without a connection lost; removed, none."""
    async with run_tritons() as servers:
        names.known = {"triton": [servers[0].address]}
        async with connect("dns:///triton:8001", tokenizer) as group:
            assert await group.ready(INT8)
            await ask(group, 3)
            assert servers[1].taken == 0
            names.known = {"triton": [server.address for server in servers]}
            await ask_until_each_answers(group, servers)
            names.known = {"triton": [servers[2].address]}
            await group.ready(INT8)
            before = [server.taken for server in servers]
            await ask(group, 4)
            assert [server.taken for server in servers] == [
                *before[:2],
                before[2] + 4,
            ]


@contextlib.asynccontextmanager
async def connect(url: str, tokenizer) -> AsyncIterator[TritonGroup]:
    group = TritonGroup(url, build_contract(tokenizer))
    await group.connect()
    try:
        yield group
    finally:
        await group.close()


@pytest.mark.parametrize(
    ("url", "legal"),
    [
        ("triton:8001", True),
        ("a:1,b:2,[::1]:3", True),
        ("dns:///triton.ns.svc.cluster.local:8001", True),
        ("dns:///a:1,b:2", True),
        ("a:1,", False),
        ("a:1, b:2", False),
        ("a,b:2", False),
        ("dns://a:1", False),
        ("http://a:1", False),
    ],
)
def test_setting(
    url: str, legal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Every address has a port; no scheme but dns:///."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INT8QA_TRITON__URL", url)
    if legal:
        assert load_settings().triton.url == url
    else:
        with pytest.raises(ConfigurationError, match="INT8QA_TRITON__URL"):
            load_settings()
