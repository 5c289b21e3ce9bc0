"""Clients that dawdle, stuff or smuggle, over raw sockets to a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from int8qa.settings import LimitSettings
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    listen,
    listen_app,
    open_service,
)

BODY = json.dumps({"question": QUESTION, "context": CONTEXT}).encode()
PATIENT = {"receive_timeout_s": 20.0, "send_timeout_s": 20.0}
HASTY = {"receive_timeout_s": 0.3, "send_timeout_s": 0.3}
ASK = b"POST /v1/answer HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
LIVE = b"GET /live HTTP/1.1\r\nHost: gateway\r\n\r\n"


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = httpx.URL(url)
    assert address.port is not None
    return await asyncio.open_connection(address.host, address.port)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes; a reset ends it as well."""
    received = b""
    try:
        while chunk := await asyncio.wait_for(reader.read(65536), 15):
            received += chunk
    except ConnectionError:
        pass
    return received


async def exchange(url: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send the parts and return all that comes back until the server closes."""
    reader, writer = await connect(url)
    reading = asyncio.create_task(read_to_end(reader))
    try:
        for part in parts:
            if reading.done():
                break
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
    except ConnectionError:
        pass
    try:
        return await reading
    finally:
        writer.close()


@pytest_asyncio.fixture
async def hasty(tokenizer) -> AsyncIterator[str]:
    async with (
        open_service(tokenizer, limits=HASTY) as one,
        listen_app(one.app, one.settings.limits, keep_alive_s=1) as url,
    ):
        yield url
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/live")).status_code == 200


@pytest_asyncio.fixture
async def patient(tokenizer) -> AsyncIterator[str]:
    async with open_service(tokenizer, limits=PATIENT) as one, listen(one) as url:
        yield url
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/live")).status_code == 200


@pytest.mark.parametrize(
    "parts", [(), (b"POST /v1/ans",), (ASK,), tuple(bytes([b]) for b in ASK)]
)
async def test_headers_that_never_end_are_cut_off(hasty: str, parts: tuple[bytes, ...]):
    """Silence, half a request and a drip alike: no response, and no connection kept."""
    assert await exchange(hasty, *parts, pause_s=0.02) == b""


async def test_late_body_is_a_408_and_its_drip_keeps_nothing(hasty: str):
    """The client is told, and what it goes on sending does not hold the connection."""
    head = ASK + b"Content-Length: 1000\r\n\r\n{"
    reply = await exchange(hasty, head, *[b" "] * 300, pause_s=0.05)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["type"].endswith("timeout")


@pytest.mark.parametrize(
    "parts",
    [
        (
            b"GET /live HTTP/1.1\r\nHost: g\r\n",
            *[b"X-A: " + b"a" * 1000 + b"\r\n"] * 99,
        ),
        (b"GET /live HTTP/1.1\r\nHost: g\r\nX-A: ", *[b"a" * 1000] * 99),
        (b"GET /" + b"a" * 1000, *[b"a" * 1000] * 99),
        (ASK + b"Transfer-Encoding: chunked\r\n\r\n1;", *[b"a" * 1000] * 99),
        (
            ASK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
            *[b"X-A: " + b"a" * 1000 + b"\r\n"] * 99,
        ),
    ],
    ids=["headers", "header", "target", "chunk extension", "trailers"],
)
async def test_framing_is_bounded(patient: str, parts: tuple[bytes, ...]):
    """What is no body and never ends is refused long before it fills the memory."""
    reply = await exchange(patient, *parts)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 400 ")


async def test_chunks_of_one_byte_are_no_offence(patient: str):
    """A body in the smallest chunks is large in framing, and is answered."""
    body = BODY + b" " * 12_000
    chunks = [b"1\r\n%c\r\n" % byte for byte in body]
    head = ASK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = await exchange(patient, head + b"".join(chunks) + b"0\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert KEEPER.encode() in reply


async def test_connections_are_kept_and_pipelined(hasty: str):
    """The limits are each request's own: a connection may outlive them."""
    reader, writer = await connect(hasty)
    for _ in range(3):
        writer.write(LIVE + LIVE)
        for _ in range(2):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)
            assert head.startswith(b"HTTP/1.1 200 ")
            await asyncio.wait_for(reader.readuntil(b"}"), 15)
        await asyncio.sleep(0.2)
    assert await read_to_end(reader) == b""  # idle for longer than it is kept
    writer.close()


async def test_client_that_does_not_read_is_cut_off():
    """A writer that waits for a reader gets free, and learns that the client is gone."""
    freed = asyncio.Event()

    async def stream_for_ever(scope, receive, send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            chunk = {"type": "http.response.body", "body": bytes(65536)}
            await send({**chunk, "more_body": True})
        assert gone.result()["type"] == "http.disconnect"
        freed.set()

    limits = LimitSettings(**HASTY)
    async with listen_app(stream_for_ever, limits) as url:
        _, writer = await connect(url)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(LIVE)
        await asyncio.wait_for(freed.wait(), 15)
        writer.transport.abort()


INNER = b"GET /live?smuggled HTTP/1.1\r\nHost: gateway\r\n\r\n"
CHUNKED = b"0\r\n\r\n" + INNER


@pytest.mark.parametrize(
    "message",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + CHUNKED,
        b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + CHUNKED,
        b"Content-Length: 0, 5\r\n\r\n" + CHUNKED,
        b"Content-Length: +0\r\n\r\n" + INNER,
        b"Content-Length: -1\r\n\r\n" + INNER,
        b"Content-Length: 0x0\r\n\r\n" + INNER,
        b"Content-Length: 99999999999999999999\r\n\r\n" + INNER,
        b"Content-Length : 0\r\n\r\n" + INNER,
        b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
        b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
        b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
        b"Transfer-Encoding:\x0bchunked\r\n\r\n" + CHUNKED,
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + INNER,
        b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + INNER,
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\n0\r\n\r\n" + INNER,
        b"X-A: b\r\n Content-Length: 0\r\n\r\n" + INNER,
        b"X-A: b\x00c\r\n\r\n" + INNER,
        b"X-A\x00: b\r\n\r\n" + INNER,
        b"X-A: b\rContent-Length: 46\r\n\r\n" + INNER,
        b": b\r\n\r\n" + INNER,
        b"no colon\r\n\r\n" + INNER,
    ],
)
async def test_smuggling_shapes_are_one_refusal(hasty: str, message: bytes):
    """Ambiguous framing is never a question, and what hides behind it no request."""
    reply = await exchange(hasty, ASK + message)
    assert reply.count(b"HTTP/1.1 ") <= 1, reply
    if reply:
        assert reply[9:10] == b"4", reply
    assert b"alive" not in reply


@pytest.mark.parametrize(
    "message",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /live HTTP/9.9\r\nHost: g\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: g\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: g\r\n\r\n",
        b"BREW /live HTTP/1.1\r\nHost: g\r\n\r\n",
        bytes(range(256)) * 4,
    ],
)
async def test_what_is_no_request_is_refused(hasty: str, message: bytes):
    """Another protocol, another version or noise: one refusal or silence, no error."""
    reply = await exchange(hasty, message)
    assert reply.count(b"HTTP/1.1 ") <= 1, reply
    if reply:
        assert reply[9:10] == b"4", reply


async def test_upgrades_are_not_taken(patient: str):
    """Nothing here speaks WebSocket: such a request is answered as the one it is."""
    head = LIVE[:-2] + b"Connection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n"
    reply = await exchange(patient, head)
    assert b" 101 " not in reply
    assert reply.count(b"HTTP/1.1 ") == 1
