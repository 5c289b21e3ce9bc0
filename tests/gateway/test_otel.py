"""Spans of requests: their tree, their links, and what they must not say."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import httpx
import pytest

from int8qa.contract import Precision
from int8qa.errors import ConfigurationError, EngineUnavailableError
from int8qa.gateway.app import create_app
from int8qa.gateway.logs import configure_logging
from int8qa.gateway.tracing import NO_TRACING, Tracing, open_tracing
from int8qa.gateway.triton import TritonEngine
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    build_contract,
    build_settings,
    wait_until,
)
from tests.gateway.test_triton import FakeTriton, run_triton

pytest.importorskip(
    "opentelemetry.sdk", reason="needs OpenTelemetry: pip install 'int8qa[tracing]'"
)
pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.grpc",
    reason="needs OpenTelemetry's exporter: pip install 'int8qa[tracing]'",
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from int8qa.gateway import otel

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
BODY = {"question": QUESTION, "context": CONTEXT}


@dataclass
class Traced:
    """A gateway whose spans stay in memory."""

    service: Service
    exporter: InMemorySpanExporter

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def find(self, name: str) -> list[ReadableSpan]:
        """By start."""
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time)

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.find(name)
        return span

    def tree(self) -> set[tuple[str, str | None]]:
        """Pairs of a span's name and its parent's; None where it is not ours."""
        names = {span.context.span_id: span.name for span in self.spans}
        return {
            (span.name, span.parent and names.get(span.parent.span_id))
            for span in self.spans
        }

    async def post(self, path: str = "/v1/answer", **fields: object) -> httpx.Response:
        return await self.service.client.post(path, json={**BODY, **fields})


@contextlib.asynccontextmanager
async def open_gateway(
    tokenizer, tracing: Tracing, engine=None, **groups: object
) -> AsyncIterator[Service]:
    engine = engine or FakeEngine(tokenizer)
    settings = build_settings(**groups)
    contract = build_contract(tokenizer)
    app = create_app(settings, contract, tokenizer, engine, tracing=tracing)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        ) as client,
    ):
        service = Service(app, engine, client, settings)
        await service.wait_ready()
        yield service


def build_tracing() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return otel.SpanTracing(provider), exporter


@contextlib.asynccontextmanager
async def open_traced(tokenizer, **groups: object) -> AsyncIterator[Traced]:
    tracing, exporter = build_tracing()
    async with open_gateway(tokenizer, tracing, **groups) as service:
        yield Traced(service, exporter)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's OTEL_ variables reaches a test."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


async def test_request_is_one_trace(tokenizer):
    """HTTP, answer, tokenize, queue, inference, batch and decode hang together."""
    async with open_traced(tokenizer) as traced:
        assert (await traced.post()).status_code == 200
        assert traced.tree() == {
            ("POST /v1/answer", None),
            ("answer", "POST /v1/answer"),
            ("tokenize", "answer"),
            ("queue", "answer"),
            ("inference", "answer"),
            ("batch", "inference"),
            ("decode", "answer"),
        }
        assert len({span.context.trace_id for span in traced.spans}) == 1
        assert len(traced.spans) == 7
        # Nothing that follows in this task belongs to the request.
        assert not get_current_span().get_span_context().is_valid
        queue, inference = traced.one("queue"), traced.one("inference")
        assert queue.end_time == inference.start_time
        assert inference.attributes["int8qa.windows"] == 1
        assert inference.attributes["int8qa.queue_s"] >= 0
        batch = traced.one("batch")
        assert batch.attributes == {
            "int8qa.precision": "int8",
            "int8qa.batch_size": 1,
            "int8qa.padded_length": 64,
        }
        assert [link.context for link in batch.links] == [inference.context]


async def test_server_span_follows_the_conventions(tokenizer):
    """Kind, name and attributes are those of OpenTelemetry for HTTP servers."""
    async with open_traced(tokenizer) as traced:
        response = await traced.service.client.post(
            "/v1/answer?debug=1", json=BODY, headers={"X-Request-Id": "mine-1"}
        )
        assert response.status_code == 200
        span = traced.one("POST /v1/answer")
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/answer",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/answer",
        "network.protocol.version": "1.1",
        "server.address": "gateway",
        "int8qa.request_id": "mine-1",
        "int8qa.outcome": "ok",
        "int8qa.precision": "int8",
        "int8qa.windows": 1,
    }


async def test_incoming_trace_is_continued(tokenizer):
    """A W3C traceparent is the parent; a malformed one starts a new trace."""
    async with open_traced(tokenizer) as traced:
        ask = traced.service.client.post
        await ask("/v1/answer", json=BODY, headers={"traceparent": SAMPLED})
        span = traced.one("POST /v1/answer")
        assert f"{span.context.trace_id:032x}" == TRACE_ID
        assert f"{span.parent.span_id:016x}" == PARENT_ID
        traced.exporter.clear()
        await ask("/v1/answer", json=BODY, headers={"traceparent": "00-nonsense-01"})
        assert traced.one("POST /v1/answer").parent is None


async def test_callers_sampling_is_obeyed(tokenizer):
    """A caller who does not sample gets an answer and leaves no span."""
    async with open_traced(tokenizer) as traced:
        response = await traced.service.client.post(
            "/v1/answer", json=BODY, headers={"traceparent": UNSAMPLED}
        )
        assert response.status_code == 200
        assert traced.spans == ()


async def test_both_precisions_are_told_apart(tokenizer):
    """`both` has a queue, an inference and a batch for each precision."""
    async with open_traced(tokenizer) as traced:
        await traced.post(precision="both")
        for name in ("queue", "inference", "batch"):
            asked = {span.attributes["int8qa.precision"] for span in traced.find(name)}
            assert asked == {"int8", "fp16"}


async def test_items_have_an_answer_each(tokenizer):
    """The items of one request share its server span."""
    async with open_traced(tokenizer) as traced:
        body = {"items": [BODY, BODY, {"question": " ", "context": CONTEXT}]}
        await traced.service.client.post("/v1/answers", json=body)
        server = traced.one("POST /v1/answers")
        answers = traced.find("answer")
        assert len(answers) == 2
        assert {span.parent.span_id for span in answers} == {server.context.span_id}
        assert server.attributes["int8qa.items"] == 3


async def test_batch_links_all_its_requests(tokenizer):
    """A batch hangs in one request's trace and is linked with every one it serves."""
    async with open_traced(tokenizer, batcher={"max_in_flight": 1}) as traced:
        engine = traced.service.engine
        engine.open_gate.clear()
        first = asyncio.create_task(traced.post())
        await wait_until(lambda: engine.calls)
        rest = [asyncio.create_task(traced.post()) for _ in range(2)]
        batcher = traced.service.app.state.gateway.pipeline._batchers[Precision.INT8]
        await wait_until(lambda: batcher.queued_windows == 2)
        engine.open_gate.set()
        await asyncio.gather(first, *rest)

        _, batch = traced.find("batch")
        _, leader, follower = traced.find("inference")
        if batch.parent.span_id != leader.context.span_id:
            leader, follower = follower, leader
        assert batch.attributes["int8qa.batch_size"] == 2
        assert batch.parent.span_id == leader.context.span_id
        assert leader.context.trace_id != follower.context.trace_id
        linked = {link.context.span_id for link in batch.links}
        assert linked == {leader.context.span_id, follower.context.span_id}
        assert [link.context.span_id for link in follower.links] == [
            batch.context.span_id
        ]
        assert not leader.links


async def test_batch_hangs_on_a_request_that_records(tokenizer):
    """A caller who does not sample does not hide the batch from one who does."""
    async with open_traced(tokenizer, batcher={"max_in_flight": 1}) as traced:
        engine, client = traced.service.engine, traced.service.client
        batcher = traced.service.app.state.gateway.pipeline._batchers[Precision.INT8]

        def ask(parent: str) -> asyncio.Task[httpx.Response]:
            headers = {"traceparent": parent}
            return asyncio.create_task(
                client.post("/v1/answer", json=BODY, headers=headers)
            )

        engine.open_gate.clear()
        tasks = [ask(UNSAMPLED)]
        await wait_until(lambda: engine.calls)
        tasks.append(ask(UNSAMPLED))
        await wait_until(lambda: batcher.queued_windows == 1)
        tasks.append(ask(SAMPLED))
        await wait_until(lambda: batcher.queued_windows == 2)
        engine.open_gate.set()
        await asyncio.gather(*tasks)
        batch, inference = traced.one("batch"), traced.one("inference")
        assert batch.parent.span_id == inference.context.span_id
        assert len(batch.links) == 2


@dataclass
class MetadataTriton(FakeTriton):
    """Keeps the metadata of each inference."""

    metadata: list[dict[str, str]] = field(default_factory=list)
    probes: list[dict[str, str]] = field(default_factory=list)

    async def ModelReady(self, request, context):  # noqa: N802 - gRPC's name
        self.probes.append(dict(context.invocation_metadata()))
        return await super().ModelReady(request, context)

    async def ModelInfer(self, request, context):  # noqa: N802 - gRPC's name
        self.metadata.append(dict(context.invocation_metadata()))
        return await super().ModelInfer(request, context)


def connect(port: int, tokenizer, tracing: Tracing) -> TritonEngine:
    url = f"127.0.0.1:{port}"
    return TritonEngine(url, build_contract(tokenizer), tracing=tracing)


async def test_triton_continues_the_trace(tokenizer):
    """The call to Triton is a client span, and its context travels as metadata."""
    triton = MetadataTriton()
    tracing, exporter = build_tracing()
    async with run_triton(triton) as port:
        engine = connect(port, tokenizer, tracing)
        async with open_gateway(tokenizer, tracing, engine) as service:
            headers = {"traceparent": SAMPLED, "baggage": "secret=1"}
            await service.client.post("/v1/answer", json=BODY, headers=headers)
    traced = Traced(service, exporter)
    call, batch = traced.one(otel.TRITON_METHOD), traced.one("batch")
    assert call.kind is SpanKind.CLIENT
    assert call.parent.span_id == batch.context.span_id
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "server.address": "127.0.0.1",
        "server.port": port,
        "int8qa.model": "qa_int8",
    }
    (metadata,) = triton.metadata
    assert metadata["traceparent"] == f"00-{TRACE_ID}-{call.context.span_id:016x}-01"
    assert "baggage" not in metadata
    assert triton.probes
    assert not any("traceparent" in probe for probe in triton.probes)


async def test_off_sends_triton_no_context(tokenizer):
    """Without tracing a caller's traceparent ends here."""
    triton = MetadataTriton()
    async with run_triton(triton) as port:
        engine = connect(port, tokenizer, NO_TRACING)
        async with open_gateway(tokenizer, NO_TRACING, engine) as service:
            await service.client.post(
                "/v1/answer", json=BODY, headers={"traceparent": SAMPLED}
            )
    (metadata,) = triton.metadata
    assert "traceparent" not in metadata


async def test_engine_errors_set_the_status(tokenizer):
    """A failed batch marks itself, its request's stages and the server span."""
    async with open_traced(tokenizer) as traced:
        traced.service.engine.fault = EngineUnavailableError("Triton is gone")
        assert (await traced.post()).status_code == 503
        for name in ("POST /v1/answer", "answer", "inference", "batch"):
            span = traced.one(name)
            assert span.status.status_code is StatusCode.ERROR
            assert span.attributes["error.type"] == "engine-unavailable"
            assert span.attributes["int8qa.outcome"] == "unavailable"
            assert not span.events
        assert traced.one("queue").status.status_code is StatusCode.UNSET


async def test_clients_mistakes_are_no_errors(tokenizer):
    """4xx leaves the status unset, as the conventions ask of servers."""
    async with open_traced(tokenizer, limits={"max_windows": 1}) as traced:
        assert (await traced.post(question=" ")).status_code == 422
        span = traced.one("POST /v1/answer")
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes["http.response.status_code"] == 422
        assert span.attributes["int8qa.outcome"] == "invalid"
        assert "error.type" not in span.attributes
        assert (await traced.post(context=500 * "word ")).status_code == 413
        for name in ("answer", "tokenize"):
            span = traced.one(name)
            assert span.attributes["error.type"] == "too-large"
            assert span.status.status_code is StatusCode.UNSET


async def test_client_that_leaves_ends_every_span(tokenizer):
    """A cancelled request's spans end, say so, and are no errors."""
    async with open_traced(tokenizer) as traced:
        engine = traced.service.engine
        engine.open_gate.clear()
        task = asyncio.create_task(traced.post())
        await wait_until(lambda: engine.calls)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for name in ("POST /v1/answer", "answer", "inference"):
            span = traced.one(name)
            assert span.attributes["int8qa.outcome"] == "cancelled"
            assert span.status.status_code is StatusCode.UNSET
        assert "http.response.status_code" not in (
            traced.one("POST /v1/answer").attributes
        )
        engine.open_gate.set()
        await wait_until(lambda: traced.find("batch"))


async def test_health_and_metrics_are_not_traced(tokenizer):
    """What machines ask every few seconds leaves no span."""
    async with open_traced(tokenizer) as traced:
        for path in ("/live", "/ready", "/metrics"):
            assert (await traced.service.client.get(path)).status_code == 200
        assert traced.spans == ()
        await traced.service.client.get("/v1/models")
        assert [span.name for span in traced.spans] == ["GET /v1/models"]


async def test_replays_are_not_traced(tokenizer):
    """What the gateway asks itself belongs to no request."""
    async with open_traced(tokenizer, comparison={"fraction": 1.0}) as traced:
        await traced.post()
        await wait_until(lambda: len(traced.service.engine.calls) == 3)
        await wait_until(lambda: traced.find("POST /v1/answer"))
        assert len(traced.spans) == 7


async def test_no_text_gets_into_a_span(tokenizer):
    """Question, context, answer, paths, queries and messages stay out."""
    secrets = ("Måløy", "lighthouse", "Who was", KEEPER, "xyzzy")
    async with open_traced(tokenizer) as traced:
        engine, client = traced.service.engine, traced.service.client
        await traced.post()
        await traced.post(precision="xyzzy")
        await traced.post(precision="both", xyzzy=1)
        items = [BODY, {**BODY, "precision": "xyzzy"}]
        await client.post("/v1/answers", json={"items": items})
        await client.post("/", json={"inputs": BODY})
        await client.post("/models/xyzzy?precision=xyzzy", json={"inputs": BODY})
        await client.post("/v1/answer?question=xyzzy", content=b"xyzzy")
        await client.get("/xyzzy/lighthouse?q=xyzzy")
        await client.request("XYZZY", "/v1/answer", headers={"User-Agent": "xyzzy"})
        await client.get("/v1/models", headers={"Host": "xyzzy", "baggage": "a=xyzzy"})
        engine.fault = RuntimeError(f"{CONTEXT} {QUESTION} xyzzy")
        assert (await traced.post()).status_code == 503
        dump = "".join(span.to_json() for span in traced.spans)
        links = json.dumps([str(span.links) for span in traced.spans])
    assert len(traced.find("answer")) >= 4
    for secret in secrets:
        for text in (dump, links):
            assert secret.lower() not in text.lower()
            assert json.dumps(secret)[1:-1].lower() not in text.lower()


async def test_log_line_names_the_trace(tokenizer, restored_logging):
    """A request's log line and its spans can be found from each other."""
    stream = io.StringIO()
    configure_logging(
        build_settings(log_format="json", log_level="debug"), stream=stream
    )
    async with open_traced(tokenizer) as traced:
        await traced.service.client.post(
            "/v1/answer", json=BODY, headers={"traceparent": SAMPLED}
        )
        await traced.service.client.get("/live")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = {line["route"]: line for line in lines if line["event"] == "request"}
    assert requests["/v1/answer"]["trace_id"] == TRACE_ID
    assert "trace_id" not in requests["/live"]


async def test_fastapi_makes_no_spans_of_its_own(tokenizer, monkeypatch):
    """FastAPI's own tracing, which quotes query strings, stays off."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    async with open_gateway(tokenizer, NO_TRACING) as service:
        await service.client.post("/v1/answer?q=1", json=BODY)
    assert exporter.get_finished_spans() == ()


# From the environment.


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what an exporter sends."""

    def __init__(self) -> None:
        self.received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    async def Export(self, request, context):  # noqa: N802 - gRPC's name
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.asynccontextmanager
async def run_collector() -> AsyncIterator[tuple[Collector, str]]:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.mark.parametrize("name", [None, "reader-eu"])
async def test_spans_reach_a_collector(tokenizer, monkeypatch, name: str | None):
    """The standard variables alone bring spans to a collector over OTLP."""
    async with run_collector() as (collector, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        if name is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        async with open_gateway(tokenizer, open_tracing("otlp")) as service:
            assert (await service.ask()).status_code == 200
        groups = [g for request in collector.received for g in request.resource_spans]
    resource = {
        entry.key: entry.value.string_value for entry in groups[0].resource.attributes
    }
    assert resource["service.name"] == (name or "int8qa")
    spans = [s for g in groups for scope in g.scope_spans for s in scope.spans]
    assert {"POST /v1/answer", "batch"} <= {span.name for span in spans}
    assert len({span.trace_id for span in spans}) == 1


async def test_sampler_is_the_variables(tokenizer, monkeypatch):
    """OTEL_TRACES_SAMPLER decides which traces are made."""
    async with run_collector() as (collector, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        async with open_gateway(tokenizer, open_tracing("otlp")) as service:
            assert (await service.ask()).status_code == 200
        assert collector.received == []


def test_disabled_sdk_is_off(monkeypatch):
    """OTEL_SDK_DISABLED wins over our setting."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing("otlp") is NO_TRACING


def test_unknown_protocol_is_refused(monkeypatch):
    """A protocol that OpenTelemetry does not have is named, with the allowed ones."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")
    with pytest.raises(ConfigurationError, match=r"smoke.*grpc.*http/protobuf"):
        open_tracing("otlp")


def test_close_does_not_wait_for_ever(monkeypatch):
    """A collector that hangs does not keep the gateway from ending."""
    tracing, _ = build_tracing()
    released, asked = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        released.wait(10)

    assert isinstance(tracing, otel.SpanTracing)
    monkeypatch.setattr(tracing._provider, "shutdown", hang)
    monkeypatch.setattr(otel, "_FLUSH_TIMEOUT_S", 0.01)
    tracing.close()
    assert asked.is_set()
    assert "tracing-shutdown" in {thread.name for thread in threading.enumerate()}
    released.set()


def test_missing_http_exporter_names_the_command(monkeypatch):
    """OTLP over HTTP is not in the extra; asked for, the refusal says what to type."""
    monkeypatch.setitem(sys.modules, otel._HTTP_EXPORTER, None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(
        ConfigurationError, match="pip install opentelemetry-exporter-otlp-proto-http"
    ):
        open_tracing("otlp")
