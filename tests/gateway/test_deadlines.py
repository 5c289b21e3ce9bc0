"""How long a client will wait, from its header to the engine."""

from __future__ import annotations

import asyncio
import time

import pytest

from int8qa.gateway.pipeline import AnswerPipeline
from tests.gateway.fakes import CONTEXT, QUESTION, Service, open_service, wait_until

BODY = {"question": QUESTION, "context": CONTEXT}


class Timeouts:
    """Notes what each batch is given."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[float | None] = []
        infer = service.engine.infer

        async def note(precision, batch, timeout_s):
            self.seen.append(timeout_s)
            return await infer(precision, batch, timeout_s)

        monkeypatch.setattr(service.engine, "infer", note)


def ask(one: Service, path: str, asked: str) -> asyncio.Task:
    body = {
        "/v1/answer": BODY,
        "/v1/answers": {"items": [BODY]},
        "/": {"inputs": BODY},
        "/models/qa_int8": {"inputs": BODY},
    }[path]
    headers = {"X-Request-Timeout": asked}
    return asyncio.create_task(one.client.post(path, json=body, headers=headers))


@pytest.mark.parametrize("path", ["/v1/answer", "/v1/answers", "/", "/models/qa_int8"])
async def test_header_bounds_every_kind_of_request(
    service: Service, path: str, monkeypatch: pytest.MonkeyPatch
):
    """The client's time reaches the engine, and at its end the request is a 504."""
    timeouts = Timeouts(service, monkeypatch)
    service.engine.open_gate.clear()
    response = await asyncio.wait_for(ask(service, path, "0.3"), 10)
    if path == "/v1/answers":
        assert response.status_code == 200
        assert response.json()["items"][0]["status"] == 504
    else:
        assert response.status_code == 504
    assert len(timeouts.seen) == 1
    assert 0 < timeouts.seen[0] <= 0.3
    # Its batch has nobody left: the engine is told.
    await wait_until(lambda: service.engine.cancelled == 1)


async def test_header_cannot_exceed_the_services_limit(
    tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A client that would wait for a day waits as long as anybody."""
    limits = {"request_timeout_s": 30.0}
    async with open_service(tokenizer, limits=limits) as one:
        timeouts = Timeouts(one, monkeypatch)
        assert (await ask(one, "/v1/answer", "86400")).status_code == 200
        assert (await ask(one, "/v1/answer", "5.5")).status_code == 200
    assert 5.5 < timeouts.seen[0] <= 30
    assert timeouts.seen[1] <= 5.5


@pytest.mark.parametrize("asked", ["0", "-1", "soon", "nan", "inf", "-inf", "1s", "[]"])
async def test_senseless_times_are_named(service: Service, asked: str):
    """What is no positive number of seconds is a 422 that names the header."""
    response = await ask(service, "/v1/answer", asked)
    assert response.status_code == 422
    assert [e["field"] for e in response.json()["errors"]] == ["X-Request-Timeout"]
    assert not service.engine.calls


async def test_hopeless_request_is_refused_early(tokenizer):
    """Behind a queue that takes longer, the refusal comes at once and says how long."""
    batcher = {"max_in_flight": 1}
    async with open_service(tokenizer, batcher=batcher) as one:
        pipeline: AnswerPipeline = one.app.state.gateway.pipeline
        queue = pipeline._batchers[pipeline.default_precision]
        queue._pace.record(64, 0.0, 100.0)  # one window took a hundred seconds
        queue._pace._last_answer = pipeline.clock()
        one.engine.open_gate.clear()
        first = ask(one, "/v1/answer", "50")
        await wait_until(lambda: one.engine.calls)
        second = ask(one, "/v1/answer", "50")
        await wait_until(lambda: queue.queued_windows == 1)
        refused = await asyncio.wait_for(ask(one, "/v1/answer", "50"), 10)
        assert refused.status_code == 503
        assert refused.json()["type"].endswith("deadline-unreachable")
        assert int(refused.headers["retry-after"]) >= 60
        one.engine.open_gate.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        metrics = await one.read_metrics()
    assert metrics['int8qa_rejected_total{reason="deadline"}'] == 1


async def test_jumps_of_the_wall_clock_change_nothing(
    tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A day forward, a day back: deadlines and stages are of the monotonic clock."""
    async with open_service(tokenizer, limits={"request_timeout_s": 20.0}) as one:
        one.engine.open_gate.clear()
        request = ask(one, "/v1/answer", "15")
        await wait_until(lambda: one.engine.calls)
        real = time.time
        for jump_s in (86_400.0, -86_400.0, 1e9):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
            await asyncio.sleep(0.05)
            assert not request.done()
            assert (await one.client.get("/ready")).status_code == 200
        one.engine.open_gate.set()
        response = await request
        assert response.status_code == 200
        stages = response.json()["timing_ms"]
        assert all(0 <= value < 15_000 for value in stages.values())
        assert (await ask(one, "/v1/answer", "15")).status_code == 200
