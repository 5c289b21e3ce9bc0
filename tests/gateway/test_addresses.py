"""What is served at which address, to which origins, behind which proxies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from int8qa.errors import ConfigurationError
from int8qa.gateway.app import create_app
from int8qa.gateway.key_file import build_key, generate_key, hash_key
from int8qa.gateway.process import bind_socket
from int8qa.gateway.server import run_server
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    CONTEXT,
    QUESTION,
    FakeEngine,
    Service,
    build_contract,
    build_settings,
    open_service,
)

ROOT = Path(__file__).parents[2]
BODY = {"question": QUESTION, "context": CONTEXT}
PUBLIC, ADMIN = "http://gateway:8080", "http://gateway:9090"
OPERATORS = (
    "/metrics",
    "/docs",
    "/docs/oauth2-redirect",
    "/openapi.json",
    "/static-offline-docs/swagger-ui.css",
)
BOTH = ("/live", "/ready", "/v1/models", "/v1/comparison")
PAGE = ("/", "/static/page.js")
ORIGIN = "https://a.example"


@pytest_asyncio.fixture
async def split(tokenizer: ReaderTokenizer) -> AsyncIterator[Service]:
    """A gateway with two addresses."""
    async with open_service(tokenizer, admin={"port": 9090}) as service:
        yield service


async def test_each_address_serves_its_own(split: Service):
    """Metrics and docs vanish from the public address, questions from the other."""
    for path in (*OPERATORS, *BOTH, *PAGE):
        public = await split.client.get(PUBLIC + path)
        admin = await split.client.get(ADMIN + path)
        assert public.status_code == (404 if path in OPERATORS else 200), path
        assert admin.status_code == (404 if path in PAGE else 200), path
    for base, status in ((PUBLIC, 200), (ADMIN, 404)):
        response = await split.client.post(f"{base}/v1/answer", json=BODY)
        assert response.status_code == status


async def test_what_vanished_looks_like_what_never_was(split: Service):
    """The same problem as for any unknown path, but for the request's id."""
    bodies = []
    for path in ("/metrics", "/nowhere"):
        response = await split.client.get(PUBLIC + path)
        assert response.headers["content-type"] == "application/problem+json"
        bodies.append({**response.json(), "instance": ""})
    assert bodies[0] == bodies[1]


async def test_one_address_serves_all(service: Service):
    """Without a second one nothing vanishes."""
    for path in (*OPERATORS, *BOTH, *PAGE):
        assert (await service.client.get(path)).status_code == 200, path


async def test_page_leads_nowhere_that_vanished(split: Service, service: Service):
    """Links to docs and metrics are only there where these are."""
    for one, url, there in ((split, PUBLIC, False), (service, "", True)):
        page = (await one.client.get(f"{url}/")).text
        assert ('href="docs" data' in page) is there
        assert ('href="metrics"' in page) is there
        assert 'href="v1/models"' in page


async def test_operators_address_asks_for_no_key(
    tokenizer: ReaderTokenizer, tmp_path: Path
):
    """Who may reach it is the network's business; the public one asks."""
    path = tmp_path / "keys"
    line = build_key("alice", hash_key(generate_key()) or b"").format_line()
    path.write_text(line, "utf-8")
    async with open_service(
        tokenizer, admin={"port": 9090}, access={"keys_file": str(path)}
    ) as service:
        for address, status in ((ADMIN, 200), (PUBLIC, 401)):
            response = await service.client.get(f"{address}/v1/models")
            assert response.status_code == status
        assert (await service.client.get(f"{ADMIN}/metrics")).status_code == 200
        assert (await service.client.get(f"{PUBLIC}/metrics")).status_code == 404


# The process.

SCRIPT = """
import asyncio, sys
from int8qa.gateway.app import create_app
from int8qa.gateway.process import bind_socket, run_event_loop
from int8qa.gateway.server import run_server
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    TOKENIZER_JSON, FakeEngine, build_contract, build_settings,
)

class SlowEngine(FakeEngine):
    async def infer(self, precision, batch, timeout_s):
        print("working", flush=True)
        await asyncio.sleep(1)
        return await super().infer(precision, batch, timeout_s)

async def main():
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    settings = build_settings(admin={"port": int(sys.argv[1])})
    app = create_app(
        settings, build_contract(tokenizer), tokenizer, SlowEngine(tokenizer)
    )
    listener = bind_socket("127.0.0.1", 0)
    await run_server(app, listener, on_ready=lambda url: print(url, flush=True))
    print("closed", flush=True)

run_event_loop(main())
"""


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def test_both_listen_in_one_process_and_close_together():
    """SIGTERM closes both, and lets a request under way finish."""
    port = find_free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(port),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'service'}{os.pathsep}{ROOT}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None

        async def read_until(prefix: str) -> str:
            assert process.stdout is not None
            while line := (await process.stdout.readline()).decode():
                if line.startswith(prefix):
                    return line.strip()
            raise AssertionError(prefix)

        url = await asyncio.wait_for(read_until("http://"), 120)
        admin = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"{url}/metrics")).status_code == 404
            assert (await client.get(f"{admin}/metrics")).status_code == 200
            assert (await client.get(f"{admin}/ready")).status_code == 200
            # Whatever a client calls us.
            forged = await client.get(
                f"{url}/metrics", headers={"Host": f"127.0.0.1:{port}"}
            )
            assert forged.status_code == 404
            under_way = asyncio.create_task(client.post(f"{url}/v1/answer", json=BODY))
            await asyncio.wait_for(read_until("working"), 60)
            process.send_signal(signal.SIGTERM)
            assert (await asyncio.wait_for(under_way, 60)).status_code == 200
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert b"closed" in out
        assert process.returncode == 0
        for closed in (port, httpx.URL(url).port):
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", closed)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("taken_by", ["us", "another"])
async def test_taken_operators_port_is_no_start(
    tokenizer: ReaderTokenizer, taken_by: str
):
    """The message names the setting, and nothing stays bound."""
    listener = bind_socket("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        holder = listener if taken_by == "us" else other
        settings = build_settings(admin={"port": holder.getsockname()[1]})
        app = create_app(
            settings, build_contract(tokenizer), tokenizer, FakeEngine(tokenizer)
        )
        with pytest.raises(ConfigurationError, match="INT8QA_ADMIN__PORT"):
            await run_server(app, listener)
    assert listener.fileno() == -1


# Origins.


async def test_other_origins_are_told_nothing(service: Service):
    """No page of another site may ask, unless it is allowed."""
    for method in ("OPTIONS", "GET"):
        response = await service.client.request(
            method,
            "/v1/models",
            headers={"Origin": ORIGIN, "Access-Control-Request-Method": "GET"},
        )
        named = [name for name in response.headers if name.startswith("access-control")]
        assert named == []


async def test_allowed_origin_may_ask_with_a_key(
    tokenizer: ReaderTokenizer, tmp_path: Path
):
    """The preflight needs no key; a refusal can be read by the page that caused it."""
    path = tmp_path / "keys"
    key = generate_key()
    path.write_text(build_key("web", hash_key(key) or b"").format_line(), "utf-8")
    async with open_service(
        tokenizer,
        access={
            "keys_file": str(path),
            "allowed_origins": f" {ORIGIN}, https://b.example:8443",
        },
    ) as service:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = await service.client.options(
            "/v1/answer", headers={"Origin": ORIGIN, **asked}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in preflight.headers
        assert preflight.headers["x-frame-options"] == "DENY"
        for given, status in (({}, 401), ({"Authorization": f"Bearer {key}"}, 200)):
            response = await service.client.post(
                "/v1/answer", json=BODY, headers={"Origin": ORIGIN, **given}
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "access-control-allow-credentials" not in response.headers
        foreign = {"Origin": "https://evil.example"}
        refused = await service.client.options(
            "/v1/answer", headers={**foreign, **asked}
        )
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        answered = await service.client.post(
            "/v1/answer",
            json=BODY,
            headers={**foreign, "Authorization": f"Bearer {key}"},
        )
        assert "access-control-allow-origin" not in answered.headers


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"allowed_origins": "a.example"}, "an origin is"),
        ({"allowed_origins": "https://a.example/"}, "an origin is"),
        ({"allowed_origins": "https://A.example"}, "an origin is"),
        ({"allowed_origins": "null"}, "an origin is"),
        ({"allowed_origins": "https://*.example"}, "an origin is"),
        ({"trusted_proxies": "*"}, "IPv4 or IPv6"),
        ({"trusted_proxies": "proxy.example"}, "IPv4 or IPv6"),
        ({"trusted_proxies": "10.0.0.1/8"}, "host bits"),
    ],
)  # fmt: skip
def test_unusable_lists_are_refused(access: Mapping[str, str], message: str):
    """An origin or a network that could never match is a mistake, not a setting."""
    with pytest.raises(ValueError, match=message):
        build_settings(access=access)


# Headers, and proxies.


async def test_every_reply_is_unframed_untyped_and_uncached(service: Service):
    """Data has a policy that allows nothing; only what has a tag may be kept."""
    for method, path in (
        ("POST", "/v1/answer"), ("GET", "/v1/models"), ("GET", "/nowhere"),
        ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/"), ("DELETE", "/live"),
        ("GET", "/static-offline-docs/swagger-ui.css"),
    ):  # fmt: skip
        response = await service.client.request(method, path)
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "server" not in headers
        assert (headers.get("cache-control") == "no-store") is ("etag" not in headers)
    docs = await service.client.get("/docs")
    assert "script-src 'self'" in docs.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("trusted", "logged"),
    [
        ("", "127.0.0.1"),
        ("10.0.0.0/8", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7"),
        ("127.0.0.0/8, 203.0.113.0/24", "198.51.100.9"),
    ],
)
async def test_forwarded_addresses_are_believed_of_trusted_proxies_alone(
    tokenizer: ReaderTokenizer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trusted: str,
    logged: str,
):
    """What the log calls a refused client: the first that no trusted proxy is."""
    # Uvicorn's own variable has no say.
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    path = tmp_path / "keys"
    line = build_key("alice", hash_key(generate_key()) or b"").format_line()
    path.write_text(line, "utf-8")
    settings = build_settings(
        access={"keys_file": str(path), "trusted_proxies": trusted}
    )
    app = create_app(
        settings, build_contract(tokenizer), tokenizer, FakeEngine(tokenizer)
    )
    records = []
    note = app.state.gateway.telemetry.observe_request
    monkeypatch.setattr(
        app.state.gateway.telemetry,
        "observe_request",
        lambda record, seconds: (records.append(record), note(record, seconds)),
    )
    listener = bind_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    ready = asyncio.Event()
    server = asyncio.create_task(
        run_server(app, listener, on_ready=lambda _url: ready.set())
    )
    await asyncio.wait_for(ready.wait(), 30)
    async with httpx.AsyncClient() as client:
        response = await client.get(
            f"http://127.0.0.1:{port}/v1/models",
            headers={"X-Forwarded-For": "198.51.100.9, 203.0.113.7"},
        )
    assert response.status_code == 401
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(server, 30)
    assert [record.client for record in records] == [logged]
    assert json.loads(response.text)["status"] == 401
