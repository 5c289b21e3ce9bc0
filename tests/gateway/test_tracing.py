"""Tracing that is off, and tracing that cannot be switched on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import int8qa.gateway
from int8qa.contract import Precision
from int8qa.errors import ConfigurationError
from int8qa.gateway.tracing import NO_TRACING, open_tracing

ROOT = Path(__file__).parents[2]

ASK_ONCE = """
import asyncio, json, sys
import httpx
from int8qa.gateway.app import create_app
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import *

async def main():
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    engine = FakeEngine(tokenizer)
    app = create_app(build_settings(), build_contract(tokenizer), tokenizer, engine)
    # By ASGI's own protocol: FastAPI sets up telemetry of its own there.
    inbox, outbox = asyncio.Queue(), asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    lifespan = asyncio.create_task(app(scope, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    await outbox.get()
    await asyncio.wait_for(app.state.gateway.pipeline.watch.wait_ready(), 20)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
        body = {"question": QUESTION, "context": CONTEXT}
        answer = await client.post("/v1/answer", json=body)
    await inbox.put({"type": "lifespan.shutdown"})
    await lifespan
    return answer.status_code

status = asyncio.run(main())
print(json.dumps([status, sorted(sys.modules)]))
"""

NAME_MODULES = """
import json, sys
import int8qa.gateway.batcher, int8qa.gateway.tracing
print(json.dumps([200, sorted(sys.modules)]))
"""


def run_python(code: str, **variables: str) -> tuple[int, set[str]]:
    """Run ``code``; return the status and the names of modules it prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "service")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout.splitlines()[-1])
    return status, set(modules)


def test_off_answers_without_the_sdk():
    """A request with tracing off loads no SDK and no exporter, whoever else asks."""
    status, modules = run_python(
        ASK_ONCE,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        FASTAPI_OTEL_AUTO_CONFIGURE="true",
    )
    assert status == 200
    assert "int8qa.gateway.tracing" in modules
    assert "int8qa.gateway.otel" not in modules
    # FastAPI may import OpenTelemetry's API, which does nothing alone.
    for part in ("opentelemetry.sdk", "opentelemetry.exporter"):
        assert not [name for name in modules if name.startswith(part)]


def test_off_imports_nothing_of_opentelemetry():
    """What calls the tracing does not know OpenTelemetry."""
    _, modules = run_python(NAME_MODULES)
    assert "int8qa.gateway.tracing" in modules
    assert not [name for name in modules if name.startswith("opentelemetry")]


def test_off_does_nothing():
    """Off is one object: no metadata, no trace id."""
    tracing = open_tracing("off")
    assert tracing is NO_TRACING
    assert tracing.trace_request({"path": "/v1/answer"}).trace_id is None
    with tracing.trace_triton("127.0.0.1:8001", "qa_int8") as metadata:
        assert metadata is None
    with tracing.trace_stage("answer"), tracing.trace_batch([], Precision.INT8, (1, 2)):
        pass
    tracing.close()


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch):
    """Asked for and not installed is refused at start, with what to type."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "int8qa.gateway.otel", raising=False)
    monkeypatch.delattr(int8qa.gateway, "otel", raising=False)
    with pytest.raises(ConfigurationError) as caught:
        open_tracing("otlp")
    assert "pip install 'int8qa[tracing]'" in str(caught.value)
    assert "opentelemetry.sdk" in str(caught.value)
