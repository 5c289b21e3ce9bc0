"""POST /v1/answers: per-item results, streaming, bounded work."""

from __future__ import annotations

import asyncio
import json

from int8qa.contract import Precision
from int8qa.gateway import schemas
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    open_service,
)

GOOD = {"question": QUESTION, "context": CONTEXT}
BAD = [
    {"question": "", "context": CONTEXT},
    {"question": QUESTION},
    {**GOOD, "precision": "int4"},
    {**GOOD, "top_k": 0},
    {**GOOD, "surprise": 1},
    {"question": "\ud800", "context": CONTEXT},
    "no object",
    None,
]


async def test_items_fail_by_themselves(service: Service):
    """Each bad item has its own problem under its index; the good ones answer."""
    items = [GOOD, *BAD, {**GOOD, "precision": "both"}]
    response = await service.client.post(
        "/v1/answers", content=json.dumps({"items": items})
    )
    assert response.status_code == 200
    body = response.json()
    schemas.BatchResponse.model_validate(body)
    done = body["items"]
    assert [item["index"] for item in done] == list(range(len(items)))
    assert done[0]["result"]["answer"]["text"] == KEEPER
    assert done[-1]["result"]["comparison"]["agreement"] is True
    for item in done[1:-1]:
        assert item["status"] == item["error"]["status"] == 422
        assert "result" not in item
        for error in item["error"]["errors"]:
            assert error["field"].startswith(f"items.{item['index']}")
    assert done[1]["error"]["errors"][0]["field"] == "items.1.question"


async def test_ndjson_sends_each_item_as_it_completes(tokenizer):
    """Asked for lines, a finished item arrives while another is still worked on."""
    # FP16 is held by the gate; INT8 is answered.
    engine = GatedEngine(tokenizer)
    async with open_service(tokenizer, engine=engine) as one:
        items = [{**GOOD, "precision": "fp16"}, {**GOOD, "precision": "int8"}]
        received: list[bytes] = []
        first = asyncio.Event()

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                assert headers[b"content-type"] == b"application/x-ndjson"
            elif message["body"]:
                received.append(message["body"])
                first.set()

        task = asyncio.create_task(call(one, {"items": items}, send))
        await asyncio.wait_for(first.wait(), 10)
        assert not task.done()
        assert json.loads(received[0])["index"] == 1
        engine.hold.set()
        await asyncio.wait_for(task, 10)
    lines = [json.loads(line) for line in b"".join(received).splitlines()]
    assert [line["index"] for line in lines] == [1, 0]
    for line in lines:
        schemas.BatchItem.model_validate(line)
        assert line["result"]["answer"]["text"] == KEEPER


class GatedEngine(FakeEngine):
    """Holds FP16 until told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hold = asyncio.Event()

    async def infer(self, precision, batch, timeout_s):
        if precision is Precision.FP16:
            await self.hold.wait()
        return await super().infer(precision, batch, timeout_s)


async def call(one: Service, body: dict, send) -> None:
    """One raw ASGI request for lines; the client stays until the end."""
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    scope = {
        "type": "http", "method": "POST", "path": "/v1/answers",
        "headers": [(b"accept", b"application/x-ndjson")],
        "query_string": b"", "http_version": "1.1", "scheme": "http",
        "server": ("gateway", 80), "client": ("test", 1), "root_path": "",
        "raw_path": b"/v1/answers", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await one.app(scope, receive, send)


async def test_many_items_are_answered_in_full(service: Service):
    """More items than are worked on at once all come back, in order."""
    texts = [f"Entry {i}. {CONTEXT}" for i in range(200)]
    body = {"items": [{"question": QUESTION, "context": text} for text in texts]}
    done = (await service.client.post("/v1/answers", json=body)).json()["items"]
    for i, item in enumerate(done):
        answer = item["result"]["answer"]
        assert texts[i][answer["start"] : answer["end"]] == KEEPER


async def test_large_items_do_not_crowd_each_other_out(tokenizer):
    """Items that would overfill the queue together take turns instead of failing."""
    item = {"question": QUESTION, "context": "sea " * 12_000 + CONTEXT}
    async with open_service(tokenizer, batcher={"max_queue_tokens": 30_000}) as one:
        response = await one.client.post("/v1/answers", json={"items": [item] * 4})
    assert [item["status"] for item in response.json()["items"]] == [200] * 4


async def test_number_of_items_is_bounded(tokenizer):
    """Too many items are a 413 that names the limit; none or no list a 422."""
    async with open_service(tokenizer, limits={"max_items": 3}) as one:
        response = await one.client.post("/v1/answers", json={"items": [GOOD] * 4})
        assert response.status_code == 413
        assert response.json()["errors"][0]["field"] == "items"
        assert "allowed are 3" in response.json()["detail"]
        for items in ([], {}, "x", None):
            response = await one.client.post("/v1/answers", json={"items": items})
            assert response.status_code == 422
            assert response.json()["errors"][0]["field"] == "items"


async def test_engine_failure_is_an_item_error(service: Service):
    """Items of a failing precision get 502, the others are answered."""
    service.engine.fault = ValueError("broken")
    service.engine.faulty = frozenset({Precision.FP16})
    body = {"items": [{**GOOD, "precision": "fp16"}, GOOD]}
    done = (await service.client.post("/v1/answers", json=body)).json()["items"]
    assert [item["status"] for item in done] == [503, 200]


async def test_metrics_count_items(service: Service):
    """Each refused item counts as one rejection."""
    await service.client.post("/v1/answers", content=json.dumps({"items": BAD}))
    metrics = await service.read_metrics()
    assert metrics['int8qa_rejected_total{reason="invalid"}'] == len(BAD)
