"""One build after the other, under requests, with an engine in memory."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn

from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision
from int8qa.errors import ContractError, ModelLoadError
from int8qa.gateway.app import create_app
from int8qa.gateway.reload import Reloader
from int8qa.gateway.server import GatewayServer
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    ALL,
    KEEPER,
    TOKENIZER_JSON,
    FakeEngine,
    Service,
    build_contract,
    build_settings,
    wait_until,
)

YEAR = "1907"
"""What readers of the second build answer; those of the first name the keeper."""


@dataclass
class Server:
    """What a Triton holds: which build under which name, and what it was asked."""

    loaded: dict[str, str] = field(default_factory=dict)
    refused: str | None = None
    asked: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Of the first build's models."""

    def hold(self, contract: Contract) -> None:
        self.loaded = {
            contract.triton_name(precision): contract.build_id
            for precision in contract.models
        }


class BuildEngine(FakeEngine):
    """An engine of one build in a server that may hold several."""

    def __init__(
        self, tokenizer: ReaderTokenizer, contract: Contract, server: Server
    ) -> None:
        first = contract.build_id == "test"
        super().__init__(
            tokenizer, phrases=dict.fromkeys(ALL, (KEEPER if first else YEAR,))
        )
        if first:
            self.open_gate = server.gate
        self.contract, self.server = contract, server

    async def ready(self, precision: Precision) -> bool:
        self.probes += 1
        return self.contract.triton_name(precision) in self.server.loaded

    async def check_contract(self, precision: Precision) -> None:
        name = self.contract.triton_name(precision)
        if self.server.loaded.get(name) != self.contract.build_id:
            raise ContractError(f"{name} is of another build")

    async def load(self, precision: Precision) -> None:
        name = self.contract.triton_name(precision)
        self.server.asked.append(f"load {name}")
        if name == self.server.refused:
            raise ModelLoadError(f"Triton did not load {name}: no such plan")
        self.server.loaded[name] = self.contract.build_id

    async def unload(self, precision: Precision) -> None:
        name = self.contract.triton_name(precision)
        self.server.asked.append(f"unload {name}")
        del self.server.loaded[name]


class Log:
    """Keeps errors."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, dict[str, object]]] = []

    def error(self, event: str, **entry: object) -> None:
        self.errors.append((event, entry))

    def info(self, event: str, **entry: object) -> None:
        """Not of interest."""


@dataclass
class Reloading:
    """A gateway with a repository to reload from."""

    service: Service
    server: Server
    contract: Contract
    repository: Path
    reloader: Reloader

    def publish(self, generation: int = 2, **changes: object) -> Contract:
        """What a build does, as far as the gateway can see."""
        changed = {"build_id": "second", "generation": generation, **changes}
        contract = self.contract.model_copy(update=changed)
        contract.save(self.repository)
        return contract

    async def reload(self) -> None:
        self.reloader.request()
        await asyncio.wait_for(self.reloader.wait_idle(), 10)

    async def read_build(self) -> str:
        return str((await self.service.client.get("/v1/models")).json()["build_id"])

    async def read_answer(self) -> str:
        response = await self.service.ask()
        assert response.status_code == 200, response.text
        return str(response.json()["answer"]["text"])


@contextlib.asynccontextmanager
async def open_reloading(
    tokenizer: ReaderTokenizer,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    precisions: tuple[Precision, ...] = ALL,
) -> AsyncIterator[Reloading]:
    monkeypatch.setattr("int8qa.gateway.reload.LINGER_S", 0.0)
    contract = build_contract(tokenizer, precisions)
    contract = contract.model_copy(update={"generation": 1})
    contract.save(repository)
    shutil.copyfile(TOKENIZER_JSON, repository / TOKENIZER_FILENAME)
    server = Server()
    server.gate.set()
    server.hold(contract)

    def open_engine(contract: Contract) -> BuildEngine:
        return BuildEngine(tokenizer, contract, server)

    settings = build_settings(model_repository=repository)
    engine = open_engine(contract)
    app = create_app(settings, contract, tokenizer, engine, open_engine=open_engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        ) as client,
    ):
        service = Service(app, engine, client, settings)
        await service.wait_ready()
        yield Reloading(service, server, contract, repository, app.state.reloader)


@pytest.fixture
async def one(
    tokenizer: ReaderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Reloading]:
    async with open_reloading(tokenizer, tmp_path, monkeypatch) as running:
        yield running


async def test_requests_end_on_the_build_they_began_with(one: Reloading) -> None:
    """Old ones are answered by the old models, which stay until then; new by new."""
    one.server.gate.clear()
    early = [asyncio.create_task(one.service.ask(precision=p.value)) for p in ALL]
    await wait_until(lambda: len(one.service.engine.calls) == 3)
    one.publish()
    assert await one.read_build() == "test", "a build changes nothing by itself"
    one.reloader.request()
    await wait_until(lambda: one.reloader.current.contract.build_id == "second")
    assert await one.read_build() == "second"
    assert await one.read_answer() == YEAR
    assert set(one.server.loaded.values()) == {"test", "second"}
    assert (await one.service.client.get("/ready")).status_code == 200

    one.server.gate.set()
    for response in await asyncio.gather(*early):
        assert response.status_code == 200
        assert response.json()["answer"]["text"] == KEEPER
    await asyncio.wait_for(one.reloader.wait_idle(), 10)
    assert set(one.server.loaded.values()) == {"second"}
    assert one.server.asked == [
        *("load qa_int8_2", "load qa_fp16_2", "load qa_fp32_2"),
        *("unload qa_int8", "unload qa_fp16", "unload qa_fp32"),
    ]
    assert await one.read_answer() == YEAR
    metrics = await one.service.read_metrics()
    assert metrics['int8qa_model_ready{precision="int8"}'] == 1
    assert metrics['int8qa_serving_precision{precision="int8"}'] == 1


async def test_failed_load(one: Reloading) -> None:
    """Whichever model does not load, the old build serves and nothing else is left."""
    one.server.refused = "qa_fp16_2"
    one.publish()
    await one.reload()
    assert await one.read_build() == "test"
    assert await one.read_answer() == KEEPER
    assert set(one.server.loaded) == {"qa_int8", "qa_fp16", "qa_fp32"}
    assert one.server.asked[-1] == "unload qa_int8_2"
    metrics = await one.service.read_metrics()
    assert metrics['int8qa_model_ready{precision="int8"}'] == 1

    one.server.refused = None
    await one.reload()
    assert await one.read_answer() == YEAR


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer_sha256": "0" * 64}, "tokenizer"),
        ({"generation": 1}, "deleted in between"),
        ({"generation": 0}, "--beside"),
        ({"generation": -1}, "not a contract"),
    ],
)
async def test_repository_that_does_not_fit(
    one: Reloading,
    changes: dict[str, object],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build that cannot be served beside the old one is refused before any load."""
    log = Log()
    monkeypatch.setattr(one.reloader, "_log", log)
    one.publish(**changes)
    await one.reload()
    ((event, entry),) = log.errors
    assert event == "reload_failed"
    assert why in str(entry["reason"])
    assert entry["serving"] == "test"
    assert not one.server.asked
    assert await one.read_answer() == KEEPER


async def test_nothing_new(one: Reloading) -> None:
    """The build that serves is not loaded twice; one more request is not lost."""
    await one.reload()
    assert not one.server.asked
    one.reloader.request()
    one.publish()
    one.reloader.request()
    await asyncio.wait_for(one.reloader.wait_idle(), 10)
    assert await one.read_answer() == YEAR


async def test_triton_came_back_with_the_new_build(one: Reloading) -> None:
    """Who was restarted has loaded what is there now; the gateway follows by itself."""
    one.server.hold(one.publish())
    await wait_until(lambda: one.reloader.current.contract.build_id == "second")
    assert await one.read_answer() == YEAR
    assert "load qa_int8_2" not in one.server.asked


async def test_triton_with_the_old_build(
    tokenizer: ReaderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway started after a build has its models loaded, if they are not."""
    async with open_reloading(tokenizer, tmp_path, monkeypatch) as one:
        one.server.loaded.clear()
        await wait_until(lambda: len(one.server.loaded) == 3)
        await asyncio.wait_for(one.reloader.wait_idle(), 10)
        assert await one.read_answer() == KEEPER
        assert one.server.asked == [f"load qa_{name}" for name in ALL]


async def test_another_set_of_precisions(
    tokenizer: ReaderTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and models are those of the new build, not a mixture."""
    both = (Precision.INT8, Precision.FP16)
    async with open_reloading(tokenizer, tmp_path, monkeypatch, both) as one:
        await one.service.ask(precision="both")
        models = build_contract(tokenizer).models
        one.publish(models={p: models[p] for p in (Precision.INT8, Precision.FP32)})
        await one.reload()
        assert await one.read_answer() == YEAR
        metrics = await one.service.read_metrics()
        assert 'int8qa_model_f1{precision="fp32"}' in metrics
        assert 'int8qa_model_f1{precision="fp16"}' not in metrics
        assert (await one.service.ask(precision="both")).status_code == 422
        assert math.isnan(metrics["int8qa_comparison_agreement_ratio"])


async def test_signal_asks_for_a_reload(one: Reloading) -> None:
    """SIGUSR1 reloads; afterwards the signal is its former owner's again."""
    before = signal.getsignal(signal.SIGUSR1)
    server = GatewayServer(
        uvicorn.Config(one.service.app), one.reloader, drain_timeout_s=1
    )
    one.publish()
    with server.capture_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        await wait_until(lambda: one.reloader.current.contract.build_id == "second")
    assert signal.getsignal(signal.SIGUSR1) is before
