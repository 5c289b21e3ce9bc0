"""The load generator's HTTP client against servers that behave and that do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from int8qa.bench.wire import LOST, REFUSED, TIMED_OUT, Address, ConnectionPool
from int8qa.errors import GatewayRequestError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listen(serve: Serve) -> AsyncIterator[Address]:
    writers: list[asyncio.StreamWriter] = []

    async def handle(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writers.append(writer)
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Address.parse(f"http://127.0.0.1:{port}")
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    size = 0
    for line in head.lower().splitlines():
        if line.startswith("content-length:"):
            size = int(line.partition(":")[2])
    return head, await reader.readexactly(size)


def write_reply(writer: asyncio.StreamWriter, body: bytes, status: int = 200) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def make_pool(address: Address, connections: int = 4) -> ConnectionPool:
    return ConnectionPool(address, connections, 30.0)


async def test_requests_arrive_whole() -> None:
    """Method, path, host, key and body, over one connection for all."""
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            heads.append(head)
            write_reply(writer, body or b"{}")

    async with listen(serve) as where:
        url = f"http://127.0.0.1:{where.port}/qa/"
        address = Address.parse(url, key="s3cret ")
        pool = make_pool(address)
        body = {"question": "Wo 🚢?", "n": 1}
        reply = await pool.ask(address.post("/v1/answer", body))
        assert reply.failure is None
        assert json.loads(reply.body) == body
        assert reply.seconds > 0
        assert (await pool.ask(address.get("/metrics"))).body == b"{}"
        pool.close()
    assert heads[0].startswith("POST /qa/v1/answer HTTP/1.1\r\n")
    assert f"host: 127.0.0.1:{where.port}\r\n" in heads[0]
    assert "authorization: Bearer s3cret\r\n" in heads[0]
    assert heads[1].startswith("GET /qa/metrics HTTP/1.1\r\n")
    assert "s3cret" not in repr(address)


async def test_no_more_at_once_than_allowed() -> None:
    """Of ten requests three are under way; the others wait, and all are answered."""
    under_way = most = opened = 0
    gate = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most, opened
        opened += 1
        while True:
            await read_request(reader)
            under_way += 1
            most = max(most, under_way)
            if most == 3:
                gate.set()
            await gate.wait()
            under_way -= 1
            write_reply(writer, b"{}")

    async with listen(serve) as address:
        pool = make_pool(address, 3)
        request = address.get("/")
        replies = await asyncio.gather(*(pool.ask(request) for _ in range(10)))
        pool.close()
    assert [reply.failure for reply in replies] == [None] * 10
    assert most == opened == 3


async def test_reply_in_pieces() -> None:
    """However the bytes arrive, the reply is one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async with listen(serve) as address:
        pool = make_pool(address)
        assert (await pool.ask(address.get("/"))).body == b"hello"
        pool.close()


async def test_statuses_are_failures() -> None:
    """Anything but a 200 is one, by its number, and its body is kept."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for status in (503, 200):
            await read_request(reader)
            write_reply(writer, b"{}", status)

    async with listen(serve) as address:
        pool = make_pool(address)
        refused = await pool.ask(address.get("/"))
        assert refused[:2] == ("HTTP 503", b"{}")
        assert (await pool.ask(address.get("/"))).failure is None
        pool.close()


async def test_stale_connection_is_replaced() -> None:
    """A server that closed an idle connection costs nobody a failure."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await read_request(reader)
        write_reply(writer, b"{}")
        if opened == 1:  # reads the second request, and hangs up on it
            await read_request(reader)

    async with listen(serve) as address:
        pool = make_pool(address, 1)
        for _ in range(2):
            assert (await pool.ask(address.get("/"))).failure is None
        pool.close()
    assert opened == 2


async def test_server_that_hangs_up() -> None:
    """On a first request it is a failure, and the pool lives on."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await read_request(reader)
        if opened == 3:
            write_reply(writer, b"{}")
        elif opened == 2:
            writer.write(b"this is no HTTP\r\n\r\n")

    async with listen(serve) as address:
        pool = make_pool(address, 1)
        for expected in (LOST, LOST, None):
            assert (await pool.ask(address.get("/"))).failure == expected
        pool.close()


async def test_server_that_is_silent() -> None:
    """After the limit it is a timeout, also if the reply has begun."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        await reader.read()

    async with listen(serve) as address:
        pool = ConnectionPool(address, 1, 0.05)
        assert (await pool.ask(address.get("/"))).failure == TIMED_OUT


async def test_nobody_there() -> None:
    """A refused connection is a failure of its own kind."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader, writer

    async with listen(serve) as address:
        pass
    pool = make_pool(address, 1)
    for _ in range(2):
        assert (await pool.ask(address.get("/"))).failure == REFUSED


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", ("h", 80, False, "h", "")),
        ("https://h:1/a/b/", ("h", 1, True, "h:1", "/a/b")),
        ("http://[::1]:8080", ("::1", 8080, False, "[::1]:8080", "")),
    ],
)
def test_addresses(url: str, expected: tuple[object, ...]) -> None:
    """Host, port, TLS, authority and prefix of what a user writes."""
    found = Address.parse(url)
    parts = (found.host, found.port, found.tls, found.authority, found.prefix)
    assert parts == expected


@pytest.mark.parametrize(
    "url", ["h:8080", "ftp://h", "http://", "http://h:0", "http://h:99999", ""]
)
def test_no_address(url: str) -> None:
    """What is none is refused, with one that is."""
    with pytest.raises(GatewayRequestError, match="such as --url http://127"):
        Address.parse(url)
