"""API keys at the door: who passes, who does not, and what is said of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from int8qa.client import GatewayClient
from int8qa.errors import ConfigurationError, GatewayRequestError
from int8qa.gateway import access
from int8qa.gateway.key_file import build_key, generate_key, hash_key
from int8qa.gateway.logs import configure_logging
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    build_settings,
    listen,
    open_service,
    wait_until,
)

BODY = {"question": QUESTION, "context": CONTEXT}


@dataclass
class KeyFile:
    """A key file on disk, and the keys it was made from."""

    path: Path
    keys: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, **limits: object) -> str:
        key = self.keys[name] = generate_key()
        line = build_key(name, hash_key(key) or b"", **limits)  # type: ignore[arg-type]
        self.lines[name] = line.format_line()
        self.write()
        return key

    def remove(self, name: str) -> None:
        del self.lines[name]
        self.write()

    def write(self) -> None:
        self.path.write_text("\n".join(self.lines.values()) + "\n", "utf-8")


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    made = KeyFile(tmp_path / "keys")
    made.add("alice")
    made.add("prometheus", scope="metrics")
    return made


@pytest.fixture(autouse=True)
def _quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = access.KeyRing.watch
    monkeypatch.setattr(access.KeyRing, "watch", lambda ring: watch(ring, 0.01))


@pytest_asyncio.fixture
async def keyed(
    tokenizer: ReaderTokenizer, key_file: KeyFile
) -> AsyncIterator[Service]:
    """A gateway that asks for keys."""
    async with open_service(
        tokenizer, access={"keys_file": str(key_file.path)}
    ) as service:
        yield service


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def read_counts(service: Service, key_file: KeyFile) -> dict[str, float]:
    """``int8qa_key_requests_total`` by "key result"."""
    text = (
        await service.client.get(
            "/metrics", headers=bearer(key_file.keys["prometheus"])
        )
    ).text
    counts = {}
    for line in text.splitlines():
        if line.startswith("int8qa_key_requests_total{"):
            labels, _, value = line.rpartition(" ")
            _, key, _, result, _ = labels.split('"')
            counts[f"{key} {result}"] = float(value)
    return counts


async def test_good_key_passes(keyed: Service, key_file: KeyFile):
    """A key of the file answers, whatever the case of the scheme's name."""
    for scheme in ("Bearer", "bearer", "BEARER"):
        response = await keyed.client.post(
            "/v1/answer",
            json=BODY,
            headers={"Authorization": f"{scheme} {key_file.keys['alice']}"},
        )
        assert response.status_code == 200
        assert response.json()["answer"]["text"] == KEEPER


@pytest.mark.parametrize(
    ("headers", "slug", "challenge"),
    [
        ([], "missing-key", 'Bearer realm="int8qa"'),
        (["Bearer"], "missing-key", 'Bearer realm="int8qa"'),
        (["Bearer "], "missing-key", 'Bearer realm="int8qa"'),
        (["Basic YTpi"], "missing-key", 'Bearer realm="int8qa"'),
        (["KEY"], "missing-key", 'Bearer realm="int8qa"'),
        (["Bearer KEY extra"], "missing-key", 'Bearer realm="int8qa"'),
        (["Bearer KEY", "Bearer KEY"], "missing-key", 'Bearer realm="int8qa"'),
        (["Bearer hunter2"], "unknown-key", 'Bearer realm="int8qa", error="invalid_token"'),
        (["Bearer KEYx"], "unknown-key", 'Bearer realm="int8qa", error="invalid_token"'),
        (["Bearer OTHER"], "unknown-key", 'Bearer realm="int8qa", error="invalid_token"'),
    ],
)  # fmt: skip
async def test_without_a_good_key_nobody_passes(
    keyed: Service, key_file: KeyFile, headers: list[str], slug: str, challenge: str
):
    """401 as a problem with the challenge of RFC 6750; the engine hears nothing."""
    calls = len(keyed.engine.calls)
    given = [
        (
            "Authorization",
            value.replace("KEY", key_file.keys["alice"]).replace(
                "OTHER", generate_key()
            ),
        )
        for value in headers
    ]
    response = await keyed.client.post("/v1/answer", json=BODY, headers=given)
    assert response.status_code == 401
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"] == challenge
    assert response.json()["type"] == f"urn:int8qa:problem:{slug}"
    assert response.json()["instance"] == response.headers["x-request-id"]
    assert response.headers["x-frame-options"] == "DENY"
    assert len(keyed.engine.calls) == calls


async def test_scopes_are_kept_apart(keyed: Service, key_file: KeyFile):
    """A key for metrics asks nothing, and a key for questions reads no metrics."""
    alice, prometheus = (key_file.keys[name] for name in ("alice", "prometheus"))
    for key, method, path, needed in (
        (alice, "GET", "/metrics", "metrics"),
        (prometheus, "POST", "/v1/answer", "ask"),
        (prometheus, "GET", "/v1/models", "ask"),
    ):
        response = await keyed.client.request(method, path, headers=bearer(key))
        assert response.status_code == 403, path
        assert response.json()["type"].endswith("out-of-scope")
        assert response.headers["www-authenticate"].endswith(
            f'error="insufficient_scope", scope="{needed}"'
        )
    response = await keyed.client.get("/metrics", headers=bearer(prometheus))
    assert response.status_code == 200
    response = await keyed.client.get("/v1/models", headers=bearer(alice))
    assert response.status_code == 200


def iter_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Routes with a path; FastAPI may keep those of a router together."""
    for route in routes:
        if getattr(route, "path", None) is None:
            yield from iter_routes(route.original_router.routes)
        else:
            yield route


async def test_only_a_known_few_paths_are_open(keyed: Service):
    """Every route of the application wants a key but health, the page and the docs."""
    open_paths = set()
    for route in iter_routes(keyed.app.routes):
        path = route.path
        for method in getattr(route, "methods", None) or {"GET"}:
            url = path.replace("{name}", "page.js").replace("{model_id:path}", "x")
            if path == "/static-offline-docs":
                url += "/swagger-ui.css"
            response = await keyed.client.request(method, url)
            if response.status_code != 401:
                open_paths.add(f"{method} {path}")
    assert open_paths == {
        "GET /live", "GET /ready", "GET /", "HEAD /", "GET /static/{name}",
        "HEAD /static/{name}", "GET /docs", "GET /docs/oauth2-redirect",
        "GET /openapi.json", "HEAD /openapi.json", "GET /static-offline-docs",
    }  # fmt: skip
    for path in ("/nowhere", "//metrics", "/static/../metrics", "/live/", "/METRICS"):
        request = httpx.Request("GET", f"http://gateway{path}")
        assert (await keyed.client.send(request)).status_code in {401, 404}, path


async def test_document_tells_the_truth_about_keys(keyed: Service, service: Service):
    """Each operation documents a key exactly if it wants one; without keys, none."""
    document = (await keyed.client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = path.replace("{model_id}", "x")
            response = await keyed.client.request(method, url)
            wants = response.status_code == 401
            assert ("security" in operation) == wants, path
            documented = {"401", "403", "429"} <= operation["responses"].keys()
            assert documented == wants, path
    open_document = (await service.client.get("/openapi.json")).json()
    assert "securitySchemes" not in open_document["components"]
    assert "401" not in json.dumps(open_document["paths"])


async def test_rate_is_limited_by_key(tokenizer: ReaderTokenizer, key_file: KeyFile):
    """Beyond its burst a key gets 429 and is told when; others are not touched."""
    slow = key_file.add("slow", rate_per_s=0.01, burst=2)
    async with open_service(
        tokenizer, access={"keys_file": str(key_file.path)}
    ) as service:
        statuses = []
        for _ in range(3):
            response = await service.client.post(
                "/v1/answer", json=BODY, headers=bearer(slow)
            )
            statuses.append(response.status_code)
        assert statuses == [200, 200, 429]
        assert response.json()["type"].endswith("rate-limited")
        assert 90 <= int(response.headers["retry-after"]) <= 100
        response = await service.client.post(
            "/v1/answer", json=BODY, headers=bearer(key_file.keys["alice"])
        )
        assert response.status_code == 200
        counts = await read_counts(service, key_file)
        assert counts["slow allowed"] == 2
        assert counts["slow rate-limited"] == 1


async def test_items_of_a_batch_count_one_each(
    tokenizer: ReaderTokenizer, key_file: KeyFile
):
    """A batch is no way around the rate; a refused one costs a single question."""
    slow = bearer(key_file.add("slow", rate_per_s=0.1, burst=20))
    async with open_service(
        tokenizer, access={"keys_file": str(key_file.path)}, limits={"max_items": 30}
    ) as service:
        for items, status in ((31, 413), (30, 200), (1, 429)):
            response = await service.client.post(
                "/v1/answers", json={"items": [BODY] * items}, headers=slow
            )
            assert response.status_code == status
        # 20, less 1, less 30: a debt of 11 and the next.
        assert 115 <= int(response.headers["retry-after"]) <= 120


async def test_concurrency_is_limited_by_key(
    tokenizer: ReaderTokenizer, key_file: KeyFile
):
    """One more than may be under way is refused at once, and later passes."""
    pair = bearer(key_file.add("pair", concurrent=2))
    engine = FakeEngine(tokenizer)
    async with open_service(
        tokenizer, engine=engine, access={"keys_file": str(key_file.path)}
    ) as service:
        engine.open_gate.clear()
        first = [
            asyncio.create_task(
                service.client.post("/v1/answer", json=BODY, headers=pair)
            )
            for _ in range(2)
        ]
        ring = find_ring(service)
        await wait_until(lambda: ring.find(key_file.keys["pair"]).in_flight == 2)
        response = await service.client.post("/v1/answer", json=BODY, headers=pair)
        assert response.status_code == 429
        assert response.json()["type"].endswith("too-many-at-once")
        assert response.headers["retry-after"] == "1"
        engine.open_gate.set()
        assert [(await task).status_code for task in first] == [200, 200]
        response = await service.client.post("/v1/answer", json=BODY, headers=pair)
        assert response.status_code == 200


def find_ring(service: Service) -> access.KeyRing:
    """The key ring behind an application's middleware."""
    (ring,) = (
        middleware.kwargs["keys"]
        for middleware in service.app.user_middleware
        if middleware.cls is access.AccessGate
    )
    assert isinstance(ring, access.KeyRing)
    return ring


async def test_concurrency_is_given_back_however_a_request_ends(
    tokenizer: ReaderTokenizer, key_file: KeyFile
):
    """Bad bodies, engine failures and cancelled requests leave nothing under way."""
    one = bearer(key_file.add("one", concurrent=1))
    engine = FakeEngine(tokenizer)
    async with open_service(
        tokenizer, engine=engine, access={"keys_file": str(key_file.path)}
    ) as service:
        ring = find_ring(service)
        client = ring.find(key_file.keys["one"])
        assert (
            await service.client.post("/v1/answer", content=b"{", headers=one)
        ).status_code == 400
        assert client.in_flight == 0
        engine.fault = RuntimeError("broken")
        await service.client.post("/v1/answer", json=BODY, headers=one)
        assert client.in_flight == 0
        engine.fault = None
        engine.open_gate.clear()
        task = asyncio.create_task(
            service.client.post("/v1/answer", json=BODY, headers=one)
        )
        await wait_until(lambda: client.in_flight == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert client.in_flight == 0
        engine.open_gate.set()


async def test_changed_file_counts_without_a_restart(keyed: Service, key_file: KeyFile):
    """New keys pass, removed ones do not, requests under way are not touched."""
    alice = key_file.keys["alice"]
    keyed.engine.open_gate.clear()
    under_way = asyncio.create_task(
        keyed.client.post("/v1/answer", json=BODY, headers=bearer(alice))
    )
    ring = find_ring(keyed)
    await wait_until(lambda: ring.find(alice).in_flight == 1)
    bob = key_file.add("bob")
    await wait_until(lambda: ring.find(bob) is not None)
    key_file.remove("alice")
    await wait_until(lambda: ring.find(alice) is None)
    keyed.engine.open_gate.set()
    assert (await under_way).status_code == 200
    for key, status in ((bob, 200), (alice, 401)):
        response = await keyed.client.post("/v1/answer", json=BODY, headers=bearer(key))
        assert response.status_code == status


async def test_file_swapped_by_a_link_counts(
    tokenizer: ReaderTokenizer, tmp_path: Path
):
    """As Kubernetes renews a secret: the link moves to another directory."""
    before, after = (KeyFile(tmp_path / name / "keys") for name in ("one", "two"))
    for made in (before, after):
        made.path.parent.mkdir()
        made.add("alice")
    data = tmp_path / "..data"
    data.symlink_to(tmp_path / "one")
    async with open_service(
        tokenizer, access={"keys_file": str(data / "keys")}
    ) as service:
        ring = find_ring(service)
        assert ring.find(before.keys["alice"]) is not None
        fresh = tmp_path / "..new"
        fresh.symlink_to(tmp_path / "two")
        fresh.replace(data)
        await wait_until(lambda: ring.find(after.keys["alice"]) is not None)
        assert ring.find(before.keys["alice"]) is None


@pytest.mark.parametrize("damage", ["line", "empty", "gone"])
async def test_broken_file_leaves_the_last_good_keys(
    tokenizer: ReaderTokenizer, key_file: KeyFile, restored_logging: None, damage: str
):
    """It is logged once, shown as a metric, and mended by a good file."""
    stream = io.StringIO()
    settings = build_settings(log_format="json")
    async with open_service(
        tokenizer, access={"keys_file": str(key_file.path)}
    ) as service:
        configure_logging(settings, stream=stream)
        alice = bearer(key_file.keys["alice"])
        metrics = bearer(key_file.keys["prometheus"])
        if damage == "gone":
            key_file.path.unlink()
        else:
            key_file.path.write_text("" if damage == "empty" else "alice\n", "utf-8")
        await wait_until(lambda: "key_file_refused" in stream.getvalue())
        await asyncio.sleep(0.1)  # ten more readings
        assert stream.getvalue().count("key_file_refused") == 1
        expected = {"line": ":1: after the name", "empty": "no key", "gone": "cannot"}
        assert expected[damage] in stream.getvalue()
        response = await service.client.post("/v1/answer", json=BODY, headers=alice)
        assert response.status_code == 200
        text = (await service.client.get("/metrics", headers=metrics)).text
        assert "\nint8qa_key_file_sound 0.0" in text
        key_file.write()
        await wait_until(lambda: "key_file_read" in stream.getvalue())
        text = (await service.client.get("/metrics", headers=metrics)).text
        assert "\nint8qa_key_file_sound 1.0" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the API keys"), ("alice\n", ":1: "), ("", "holds no key")],
)
async def test_broken_file_is_no_start(
    tokenizer: ReaderTokenizer, tmp_path: Path, content: str | None, message: str
):
    """A gateway whose keys cannot be read opens to nobody; it does not open at all."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(ConfigurationError, match=message):
        async with open_service(tokenizer, access={"keys_file": str(path)}):
            pass


async def test_log_and_metrics_name_the_key_and_never_hold_it(
    keyed: Service, key_file: KeyFile, restored_logging: None
):
    """Names of the file are the only label values; a wrong key is nowhere."""
    stream = io.StringIO()
    configure_logging(build_settings(log_format="json"), stream=stream)
    wrong = generate_key()
    for key in (key_file.keys["alice"], wrong, "hunter2"):
        await keyed.client.post("/v1/answer", json=BODY, headers=bearer(key))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    passed, refused, refused_too = [one for one in lines if one["event"] == "request"]
    assert passed["key"] == "alice"
    assert "client" not in passed
    assert refused["problem"] == refused_too["problem"] == "unknown-key"
    assert refused["outcome"] == "denied"
    assert refused["client"] == "127.0.0.1"
    assert "key" not in refused
    counts = await read_counts(keyed, key_file)
    assert counts["alice allowed"] == 1
    assert counts["- unknown-key"] == 2
    assert {name.split()[0] for name in counts} == {"-", "alice", "prometheus"}
    metrics = await keyed.client.get(
        "/metrics", headers=bearer(key_file.keys["prometheus"])
    )
    for secret in (*key_file.keys.values(), wrong, "hunter2"):
        assert secret not in stream.getvalue()
        assert secret not in metrics.text


async def test_clients_bring_their_key(
    keyed: Service, key_file: KeyFile, monkeypatch: pytest.MonkeyPatch
):
    """Hugging Face's client by its token, our own by INT8QA_API_KEY."""
    alice = key_file.keys["alice"]
    async with listen(keyed) as url:

        def ask(token: str) -> str:
            client = InferenceClient(model=url, token=token)
            found = client.question_answering(question=QUESTION, context=CONTEXT)
            return str(found.answer)  # type: ignore[union-attr]

        assert await asyncio.to_thread(ask, alice) == KEEPER
        with pytest.raises(HfHubHTTPError, match="not known here"):
            await asyncio.to_thread(ask, generate_key())
        monkeypatch.delenv("INT8QA_API_KEY", raising=False)
        async with GatewayClient(url) as client:
            with pytest.raises(GatewayRequestError, match="INT8QA_API_KEY"):
                await client.answer(BODY)
        monkeypatch.setenv("INT8QA_API_KEY", alice)
        async with GatewayClient(url) as client:
            assert (await client.answer(BODY))["answer"]["text"] == KEEPER


async def test_large_body_without_a_key_is_not_waited_for(
    keyed: Service, key_file: KeyFile
):
    """401 comes before the body, and the connection serves the next request."""
    async with listen(keyed) as url:
        address = httpx.URL(url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        head = "POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        status = await asyncio.wait_for(reader.readline(), 20)
        assert status.startswith(b"HTTP/1.1 401")
        writer.close()
