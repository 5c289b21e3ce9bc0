"""Request ids, headers, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from int8qa.contract import Precision
from int8qa.gateway.edge import ClientGoneError, choose_request_id, run_until_gone
from tests.gateway.fakes import (
    CONTEXT,
    QUESTION,
    Service,
    listen,
    open_service,
    wait_until,
)

BODY = {"question": QUESTION, "context": CONTEXT}


def test_sane_request_ids_are_kept():
    """Visible ASCII up to 128 characters passes through."""
    for offered in ("a", "x" * 128, "0-9_.~!{}"):
        assert choose_request_id(offered) == offered


@pytest.mark.parametrize(
    "offered", [None, "", "x" * 129, "a b", "a\nb", "ä", "\x7f", "a\x00"]
)
def test_other_request_ids_are_replaced(offered: str | None):
    """Anything else is replaced by an id of ours, each time another."""
    chosen = choose_request_id(offered)
    assert len(chosen) == 32
    assert chosen != choose_request_id(offered)


async def test_request_id_and_security_headers_are_on_every_response(service: Service):
    """Successes, problems and plain routes carry them alike."""
    for method, path in (
        ("POST", "/v1/answer"),
        ("GET", "/live"),
        ("GET", "/nowhere"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/"),
    ):
        response = await service.client.request(
            method, path, headers={"X-Request-Id": "mine-1"}
        )
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"


async def test_server_timing_names_the_stages(service: Service):
    """Clients of the Hugging Face schema see timings too, in a header."""
    response = await service.client.post("/", json={"inputs": BODY})
    timing = response.headers["server-timing"]
    assert [part.split(";")[0] for part in timing.split(", ")] == [
        *("tokenize", "queue", "inference", "decode"),
    ]


@pytest.mark.parametrize("path", ["/v1/answer", "/v1/answers"])
@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
async def test_client_that_leaves_frees_its_place(tokenizer, path: str, accept: str):
    """When the connection closes, queued windows are dropped and nothing is in flight."""
    clients = 12  # more than the one batch in flight can hold
    content = json.dumps(BODY if path == "/v1/answer" else {"items": [BODY] * 5})
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Accept: {accept}\r\nContent-Length: {len(content.encode())}\r\n\r\n"
    )
    async with open_service(tokenizer, batcher={"max_in_flight": 1}) as service:
        service.engine.open_gate.clear()
        pipeline = service.app.state.gateway.pipeline
        batcher = pipeline._batchers[Precision.INT8]
        async with listen(service) as url, contextlib.AsyncExitStack() as stack:
            port = int(url.rpartition(":")[2])
            for _ in range(clients):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.push_async_callback(writer.wait_closed)
                stack.callback(writer.close)
                writer.write(head.encode() + content.encode())
                await writer.drain()
            await wait_until(
                lambda: pipeline.activity.requests == clients and batcher.queued_windows
            )
            await stack.aclose()
            await wait_until(
                lambda: pipeline.activity.requests == 0 and not batcher.queued_windows
            )
            assert len(service.engine.calls) == 1
            service.engine.open_gate.set()
            assert (await service.ask()).status_code == 200
        metrics = await service.read_metrics()
    counted = [
        value
        for name, value in metrics.items()
        if name.startswith("int8qa_request_seconds_count") and "cancelled" in name
    ]
    assert counted == [clients]


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_five_megabytes_over_a_socket_are_answered_with_413(
    service: Service, chunked: bool
):
    """The client can read the problem although it is still sending."""
    payload = b"x" * 5_000_000
    async with listen(service) as url:
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        framing = (
            "Transfer-Encoding: chunked"
            if chunked
            else f"Content-Length: {len(payload)}"
        )
        writer.write(
            f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{framing}"
            f"\r\n\r\n".encode()
        )
        for i in range(0, len(payload), 100_000):
            chunk = payload[i : i + 100_000]
            if chunked:
                chunk = b"%x\r\n%s\r\n" % (len(chunk), chunk)
            writer.write(chunk)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        head = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        await writer.wait_closed()
    assert b" 413 " in head


async def test_run_until_gone_prefers_the_result():
    """Work that is done is returned even if the client left at the same moment."""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def work() -> int:
        return 7

    assert await run_until_gone(receive, work()) == 7


async def test_run_until_gone_cancels_the_work():
    """Work whose client left is cancelled, and over when the error is raised."""
    ended = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(ClientGoneError):
        await run_until_gone(receive, work())
    assert ended
