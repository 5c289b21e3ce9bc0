"""The whole gateway before a Triton that misbehaves, over real gRPC.

Whatever Triton does, each request gets one well-formed response in its time, nothing
of it stays behind, and the next one is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from int8qa.gateway.triton import TritonEngine
from tests.gateway.fakes import (
    CONTEXT,
    QUESTION,
    Service,
    build_contract,
    open_service,
    wait_until,
)
from tests.gateway.test_triton import FakeTriton, run_triton

DEADLINE_S = 1.0
PATIENCE_S = 15.0
"""For a test, not for a client: a loaded machine is no fault."""


@dataclass
class FaultyTriton(FakeTriton):
    """Answers as told."""

    fault: str | None = None
    cancelled: int = 0

    async def ModelInfer(self, request, context):  # noqa: N802, PLR0912 - gRPC's name
        if self.fault == "hang":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.fault == "slow":
            await asyncio.sleep(0.3)
        response = await super().ModelInfer(request, context)
        rows, width = request.inputs[0].shape
        match self.fault:
            case "nan" | "infinite":
                value = np.nan if self.fault == "nan" else np.inf
                logits = np.full((rows, width), value, np.float32)
                response.raw_output_contents[1] = logits.tobytes()
            case "more rows" | "fewer rows":
                rows += 1 if self.fault == "more rows" else -1
                for index, output in enumerate(response.outputs):
                    output.shape[:] = [rows, width]
                    response.raw_output_contents[index] = bytes(4 * rows * width)
            case "narrow":
                for index, output in enumerate(response.outputs):
                    output.shape[:] = [rows, width - 1]
                    response.raw_output_contents[index] = bytes(4 * rows * (width - 1))
            case "flat":
                for output in response.outputs:
                    output.shape[:] = [rows * width]
            case "short":
                response.raw_output_contents[0] = b"\0" * 6
            case "one output":
                del response.outputs[1]
                del response.raw_output_contents[1]
            case "text":
                response.outputs[0].datatype = "BYTES"
            case "nothing":
                return service_pb2.ModelInferResponse()
        return response


@contextlib.asynccontextmanager
async def serve(
    tokenizer, port: int, *, wait: bool = True, **groups: object
) -> AsyncIterator[Service]:
    engine = TritonEngine(f"127.0.0.1:{port}", build_contract(tokenizer))
    async with open_service(tokenizer, engine=engine, wait=wait, **groups) as one:
        yield one


async def ask(one: Service) -> httpx.Response:
    return await one.client.post(
        "/v1/answer",
        json={"question": QUESTION, "context": CONTEXT},
        headers={"X-Request-Timeout": str(DEADLINE_S)},
    )


async def storm(one: Service, requests: int = 12) -> Counter[int]:
    """So many at once; each must get one response that is what it says it is."""
    asked = (ask(one) for _ in range(requests))
    responses = await asyncio.wait_for(asyncio.gather(*asked), PATIENCE_S)
    for response in responses:
        body = response.json()
        if response.status_code == 200:
            assert body["answer"]["text"] in CONTEXT
            continue
        assert response.headers["content-type"] == "application/problem+json"
        assert body["status"] == response.status_code
        if response.status_code in (429, 503):
            assert int(response.headers["retry-after"]) >= 1
    return Counter(response.status_code for response in responses)


async def check_nothing_is_left(one: Service) -> None:
    pipeline = one.app.state.gateway.pipeline
    assert pipeline.activity.requests == 0
    for batcher in pipeline._batchers.values():
        assert batcher.queued_windows == 0
        await wait_until(lambda batcher=batcher: batcher.in_flight == 0)


@pytest.mark.parametrize(
    "fault",
    [
        "nan",
        "infinite",
        "more rows",
        "fewer rows",
        "narrow",
        "flat",
        "short",
        "one output",
        "text",
        "nothing",
    ],
)
async def test_nonsense_of_every_kind_is_a_502(tokenizer, fault: str):
    """No logits but those asked for become an answer; the next sound ones do."""
    triton = FaultyTriton(fault=fault)
    async with run_triton(triton) as port, serve(tokenizer, port) as one:
        assert await storm(one) == {502: 12}
        await check_nothing_is_left(one)
        triton.fault = None
        assert await storm(one) == {200: 12}


@pytest.mark.parametrize(
    ("code", "statuses"),
    [
        (grpc.StatusCode.INTERNAL, {502}),
        (grpc.StatusCode.INVALID_ARGUMENT, {502}),
        (grpc.StatusCode.UNAVAILABLE, {503}),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, {503}),
        (grpc.StatusCode.DEADLINE_EXCEEDED, {504}),
    ],
)
async def test_errors_are_what_they_are(
    tokenizer, code: grpc.StatusCode, statuses: set[int]
):
    """Each request of a failing batch is told the same, and service resumes by itself."""
    triton = FaultyTriton(failure=(code, "as told"))
    async with run_triton(triton) as port, serve(tokenizer, port) as one:
        assert set(await storm(one)) == statuses
        await check_nothing_is_left(one)
        triton.failure = None
        await one.wait_ready()
        assert await storm(one) == {200: 12}


async def test_hanging_triton_costs_each_request_its_deadline(tokenizer):
    """All are answered with 504, Triton hears of each batch that nobody waits for."""
    triton = FaultyTriton(fault="hang")
    async with run_triton(triton) as port, serve(tokenizer, port) as one:
        assert await storm(one) == {504: 12}
        await wait_until(lambda: triton.cancelled >= 1)
        await check_nothing_is_left(one)
        triton.fault = None
        assert await storm(one) == {200: 12}


async def test_client_that_leaves_is_cancelled_in_triton(tokenizer):
    """The gRPC call ends when the last client of its batch has gone, and not before."""
    triton = FaultyTriton(fault="hang")
    async with (
        run_triton(triton) as port,
        serve(tokenizer, port, batcher={"max_in_flight": 1}) as one,
    ):
        batcher = one.app.state.gateway.pipeline._batchers["int8"]
        client = asyncio.create_task(one.ask())
        await wait_until(lambda: batcher.in_flight == 1)
        await asyncio.sleep(0.1)
        assert triton.cancelled == 0
        client.cancel()
        await wait_until(lambda: triton.cancelled == 1)
        triton.fault = None
        assert (await one.ask()).status_code == 200
        await check_nothing_is_left(one)


async def test_triton_that_starts_late_is_found(tokenizer):
    """Until it is there requests get 503 at once; then they are answered."""
    async with run_triton(FaultyTriton()) as port:
        pass
    async with serve(tokenizer, port, wait=False) as one:
        assert await storm(one) == {503: 12}
        async with run_triton(FaultyTriton(), port):
            await one.wait_ready()
            assert await storm(one) == {200: 12}


async def test_triton_that_dies_under_load_loses_nobody(tokenizer):
    """What is in flight gets 503, what comes after too, and then answers again."""
    async with contextlib.AsyncExitStack() as first:
        port = await first.enter_async_context(run_triton(FaultyTriton(fault="slow")))
        async with serve(tokenizer, port) as one:
            running = asyncio.create_task(storm(one, 24))
            batcher = one.app.state.gateway.pipeline._batchers["int8"]
            await wait_until(lambda: batcher.in_flight)
            await first.aclose()
            assert set(await running) <= {200, 503, 504}
            await check_nothing_is_left(one)
            async with run_triton(FaultyTriton(), port):
                await one.wait_ready()
                assert await storm(one) == {200: 12}


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
async def test_faults_leave_no_descriptor_behind(tokenizer):
    """After every fault in turn, as many descriptors are open as after the first."""

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    triton = FaultyTriton()
    async with run_triton(triton) as port, serve(tokenizer, port) as one:
        await storm(one)
        before = count()
        for fault in ("nan", "short", "hang", "nothing", None, "hang", "text", None):
            triton.fault = fault
            await storm(one)
        await check_nothing_is_left(one)
        assert count() <= before
