"""An engine that is absent, gone, slow or wrong, and an overloaded gateway."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from int8qa.contract import Precision
from int8qa.errors import (
    ContractError,
    DeadlineExceededError,
    EngineOutputError,
    EngineUnavailableError,
)
from int8qa.gateway.engine import find_rebuild
from int8qa.gateway.pipeline import AnswerPipeline
from int8qa.reader.tokenizer import ReaderTokenizer, TextTokens
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    TOKENIZER_JSON,
    FakeEngine,
    Service,
    build_contract,
    listen,
    open_service,
    wait_until,
)

GONE = EngineUnavailableError("Triton at 127.0.0.1:1 is not available")


def get_pipeline(service: Service) -> AnswerPipeline:
    pipeline: AnswerPipeline = service.app.state.gateway.pipeline
    return pipeline


async def test_gateway_starts_without_an_engine_and_finds_it_later(tokenizer):
    """Live at once, 503 with Retry-After until the engine comes, then ready by itself."""
    engine = FakeEngine(tokenizer, down=GONE)
    async with open_service(tokenizer, engine=engine, wait=False) as one:
        await wait_until(lambda: engine.probes)
        assert (await one.client.get("/live")).status_code == 200
        ready = await one.client.get("/ready")
        assert ready.status_code == 503
        assert ready.headers["content-type"] == "application/problem+json"
        parts = {e["field"]: e["message"] for e in ready.json()["errors"]}
        assert parts.keys() == {"int8", "fp16", "fp32"}
        refused = await one.ask()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["type"].endswith("engine-unavailable")
        for path, body in (
            ("/v1/answers", {"items": [{"question": QUESTION, "context": CONTEXT}]}),
            ("/", {"inputs": {"question": QUESTION, "context": CONTEXT}}),
        ):
            response = await one.client.post(path, json=body)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1

        engine.down = None
        await one.wait_ready()
        ready = await one.client.get("/ready")
        assert ready.json() == {
            "status": "ready",
            "parts": dict.fromkeys(("int8", "fp16", "fp32"), "ready"),
        }
        assert (await one.ask()).json()["answer"]["text"] == KEEPER


async def test_lost_engine_is_refused_at_once_and_recovered(service: Service):
    """The request that finds the engine gone gets 503, and so does /ready, until it is back."""
    service.engine.down = GONE
    assert (await service.ask()).status_code == 503
    assert (await service.client.get("/ready")).status_code == 503
    assert (await service.read_metrics())['int8qa_model_ready{precision="int8"}'] == 0
    calls = len(service.engine.calls)
    assert (await service.ask()).status_code == 503
    assert len(service.engine.calls) == calls
    service.engine.down = None
    await wait_until(lambda: get_pipeline(service).watch.is_ready(Precision.INT8))
    assert (await service.ask()).status_code == 200


async def test_requests_in_flight_when_the_engine_dies_get_503(service: Service):
    """None of the waiting requests hangs."""
    service.engine.open_gate.clear()
    requests = [asyncio.create_task(service.ask()) for _ in range(20)]
    await wait_until(
        lambda: len(service.engine.calls) == service.settings.batcher.max_in_flight
    )
    service.engine.fault = service.engine.down = GONE
    service.engine.open_gate.set()
    responses = await asyncio.wait_for(asyncio.gather(*requests), 10)
    assert {response.status_code for response in responses} == {503}


async def test_probes_are_paced_however_many_requests_fail(tokenizer):
    """Failing requests do not drive the probe."""
    engine = FakeEngine(tokenizer)
    async with open_service(
        tokenizer, engine=engine, triton={"probe_interval_s": 30}
    ) as one:
        probes = engine.probes
        engine.down = GONE
        for _ in range(50):
            assert (await one.ask()).status_code == 503
        assert engine.probes == probes


async def test_foreign_model_keeps_the_gateway_unready(tokenizer):
    """A model that contradicts the contract is named in /ready and never asked."""
    engine = FakeEngine(tokenizer, mismatch=ContractError("inputs are [('x', 'FP32')]"))
    async with open_service(tokenizer, engine=engine, wait=False) as one:
        watch = get_pipeline(one).watch
        await wait_until(lambda: "contract" in str(watch.faults().values()))
        body = (await one.client.get("/ready")).json()
        assert all("contract" in error["message"] for error in body["errors"])
        assert (await one.ask()).status_code == 503
        assert not engine.calls
        engine.mismatch = None
        await one.wait_ready()


async def test_rebuilt_repository_keeps_the_gateway_unready(tokenizer, tmp_path):
    """An engine that comes back beside another build is not served with the old one.

    One that never left goes on: it still has what it loaded.
    """
    ours = build_contract(tokenizer)
    ours.save(tmp_path)
    engine = FakeEngine(tokenizer)
    async with open_service(tokenizer, engine=engine, model_repository=tmp_path) as one:
        watch = get_pipeline(one).watch
        ours.model_copy(update={"build_id": "another"}).save(tmp_path)
        probes = engine.probes
        await wait_until(lambda: engine.probes >= probes + 9)
        assert (await one.ask()).status_code == 200

        engine.down = GONE
        assert (await one.ask()).status_code == 503
        engine.down = None
        await wait_until(
            lambda: sum("rebuilt" in fault for fault in watch.faults().values()) == 3
        )
        body = (await one.client.get("/ready")).json()
        told = (
            "the model repository was rebuilt (build another, this gateway loaded "
            "test): restart the gateway"
        )
        assert [error["message"] for error in body["errors"]] == [told] * 3
        calls = len(engine.calls)
        assert (await one.ask()).status_code == 503
        assert len(engine.calls) == calls

        ours.save(tmp_path)
        await one.wait_ready()
        assert (await one.ask()).status_code == 200


def test_repository_is_compared_where_there_is_one(tokenizer, tmp_path):
    """The same build and a repository elsewhere are no fault; a half-built one is."""
    ours = build_contract(tokenizer)
    assert find_rebuild(tmp_path / "remote", ours) is None
    assert "int8qa build" in (find_rebuild(tmp_path, ours) or "")
    ours.save(tmp_path)
    assert find_rebuild(tmp_path, ours) is None


async def test_probe_survives_surprises(tokenizer):
    """An exception nobody foresaw makes the model unready, not the watch dead."""
    engine = FakeEngine(tokenizer)
    engine.mismatch = RuntimeError("surprise")  # type: ignore[assignment]
    async with open_service(tokenizer, engine=engine, wait=False) as one:
        await wait_until(lambda: engine.probes >= 6)
        body = (await one.client.get("/ready")).json()
        assert "RuntimeError" in body["errors"][0]["message"]
        engine.mismatch = None
        await one.wait_ready()


@pytest.mark.parametrize("nonsense", ["nan", "shape"])
async def test_nonsense_is_a_502(service: Service, nonsense: str):
    """Logits that are not finite or of another shape are Triton's fault, said so."""
    service.engine.nonsense = nonsense
    response = await service.ask()
    assert response.status_code == 502
    assert response.json()["type"].endswith("engine-output")
    service.engine.nonsense = None
    assert (await service.ask()).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (EngineOutputError("bad"), 502),
        (DeadlineExceededError("late"), 504),
        (EngineUnavailableError("gone"), 503),
    ],
)
async def test_engine_errors_map_to_statuses(
    service: Service, fault: Exception, status: int
):
    """Each class of engine error has its own status."""
    service.engine.fault = fault
    assert (await service.ask()).status_code == status


async def test_deadline_is_a_504(tokenizer):
    """A request that is not answered within its deadline gets 504 on time."""
    engine = FakeEngine(tokenizer)
    async with open_service(
        tokenizer, engine=engine, limits={"request_timeout_s": 0.2}
    ) as one:
        engine.open_gate.clear()
        response = await asyncio.wait_for(one.ask(), 10)
        assert response.status_code == 504
        assert response.json()["type"].endswith("deadline-exceeded")
        engine.open_gate.set()


async def test_full_queue_is_a_429_with_retry_after(tokenizer):
    """Above the queue's bound requests are refused at once; the accepted are answered."""
    engine = FakeEngine(tokenizer)
    async with open_service(
        tokenizer,
        engine=engine,
        batcher={"max_queue_tokens": 512, "max_in_flight": 1},
    ) as one:
        engine.open_gate.clear()
        accepted = [asyncio.create_task(one.ask()) for _ in range(1)]
        await wait_until(lambda: engine.calls)
        requests = [asyncio.create_task(one.ask()) for _ in range(30)]
        done, _ = await asyncio.wait(
            requests, return_when=asyncio.FIRST_COMPLETED, timeout=10
        )
        refused = done.pop().result()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["type"].endswith("queue-full")
        engine.open_gate.set()
        statuses = [r.status_code for r in await asyncio.gather(*accepted, *requests)]
        assert set(statuses) == {200, 429}
        metrics = await one.read_metrics()
    counted = metrics['int8qa_rejected_total{reason="queue_full"}']
    assert counted == statuses.count(429)


async def test_dead_batcher_turns_ready_false(service: Service):
    """Without its batcher a precision is not ready, and requests fail fast."""
    batcher = get_pipeline(service)._batchers[Precision.INT8]
    batcher._dispatcher.cancel()
    await wait_until(lambda: not batcher.healthy)
    ready = await service.client.get("/ready")
    assert ready.status_code == 503
    assert [error["field"] for error in ready.json()["errors"]] == ["int8"]
    assert (await service.ask()).status_code == 503
    assert (await service.ask(precision="fp16")).status_code == 200


async def test_both_fails_if_one_precision_does(service: Service):
    """A comparison with a failing side is an error, and counted as one."""
    service.engine.fault = EngineOutputError("bad")
    service.engine.faulty = frozenset({Precision.FP16})
    assert (await service.ask(precision="both")).status_code == 502
    metrics = await service.read_metrics()
    assert metrics['int8qa_comparisons_total{agreement="error"}'] == 1
    report = (await service.client.get("/v1/comparison")).json()
    assert (report["count"], report["errors"]) == (0, 1)


async def test_draining_refuses_new_requests_and_finishes_accepted_ones(
    service: Service,
):
    """While it shuts down the gateway answers what it took and refuses the rest."""
    service.engine.open_gate.clear()
    accepted = asyncio.create_task(service.ask())
    await wait_until(lambda: service.engine.calls)
    drain = asyncio.create_task(get_pipeline(service).drain(10))
    await asyncio.sleep(0)
    refused = await service.ask()
    assert refused.status_code == 503
    assert refused.json()["type"].endswith("shutting-down")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await service.client.get("/ready")).status_code == 503
    service.engine.open_gate.set()
    assert (await accepted).status_code == 200
    await asyncio.wait_for(drain, 10)


async def test_draining_ends_in_time_whatever_the_engine_does(service: Service):
    """What cannot be finished is answered with 503, not left hanging."""
    service.engine.open_gate.clear()
    accepted = asyncio.create_task(service.ask())
    await wait_until(lambda: service.engine.calls)
    await asyncio.wait_for(get_pipeline(service).drain(0.05), 10)
    response = await asyncio.wait_for(accepted, 10)
    assert response.status_code == 503
    assert response.json()["type"].endswith("shutting-down")


class BrokenTokenizer(ReaderTokenizer):
    """Fails as no code of ours would."""

    __slots__ = ()

    def encode(self, text: str, *, field: str = "text") -> TextTokens:
        raise KeyError("secret-canary", text, field)


async def test_unforeseen_error_is_a_bare_500():
    """An exception of no known kind shows nothing of itself, and stays one item's."""
    tokenizer = BrokenTokenizer.from_file(TOKENIZER_JSON)
    async with open_service(tokenizer) as one:
        response = await one.ask()
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        items = {"items": [{"question": QUESTION, "context": CONTEXT}]}
        batch = await one.client.post("/v1/answers", json=items)
        assert batch.json()["items"][0]["status"] == 500
        for text in (response.text, batch.text):
            assert "canary" not in text
            assert "KeyError" not in text
            assert KEEPER not in text


async def test_prometheus_that_goes_in_the_middle_of_a_scrape(service: Service):
    """Scrapers that leave unread disturb no question, and take no count with them."""
    questions = 20

    async def scrape_and_leave(host: str, port: int) -> None:
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n")
        await writer.drain()
        # Not close(): what arrives afterwards meets a reset, as of a killed process.
        writer.transport.abort()

    async with listen(service) as url, httpx.AsyncClient(base_url=url) as client:
        before = read_answers((await client.get("/metrics")).text)
        body = {"question": QUESTION, "context": CONTEXT}
        at = httpx.URL(url)
        assert at.port is not None
        for _ in range(questions):
            leavers = [scrape_and_leave(at.host, at.port) for _ in range(5)]
            response, *_ = await asyncio.gather(
                client.post("/v1/answer", json=body), *leavers
            )
            assert response.json()["answer"]["text"] == KEEPER
        # None came for a while; the next one finds all that happened meanwhile.
        after = read_answers((await client.get("/metrics")).text)
        assert after - before == questions


def read_answers(metrics: str) -> float:
    """Answered requests to /v1/answer, of the text of /metrics."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "int8qa_request_seconds_count"
        and sample.labels["route"] == "/v1/answer"
        and sample.labels["outcome"] == "ok"
    )
