"""An engine in memory, and a gateway around it.

The fake finds given phrases by their token ids and puts its highest logits there, so
answers are known without a model; it can be stopped, slowed and broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

import int8qa
from int8qa.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    TOKEN_TYPE_IDS,
    Contract,
    ModelRecord,
    Precision,
)
from int8qa.errors import ContractError, EngineUnavailableError, ModelLoadError
from int8qa.gateway.app import create_app
from int8qa.gateway.connections import build_protocol
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import LimitSettings, Settings

TOKENIZER_JSON = Path(int8qa.__file__).parent / "data" / "checkpoint" / "tokenizer.json"
CONTEXT = (
    "The lighthouse at Måløy was built in 1907. Its keeper, Solveig Bråten, logged "
    "every passing ship 🚢 until 1952."
)
QUESTION = "Who was the keeper?"
KEEPER = "Solveig Bråten"
ALL = (Precision.INT8, Precision.FP16, Precision.FP32)


def build_contract(
    tokenizer: ReaderTokenizer,
    precisions: Sequence[Precision] = ALL,
    *,
    recommended: Precision | None = None,
    verdict: str = "",
) -> Contract:
    return Contract(
        build_id="test",
        checkpoint="acme/minilm-test",
        tokenizer_sha256=tokenizer.fingerprint,
        pad_token_id=tokenizer.pad_id,
        inputs=(INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS),
        max_window_tokens=384,
        sequence_buckets=(32, 64, 128, 256, 384),
        batch_sizes=(1, 2, 4, 8),
        max_batch_tokens=3072,
        models={
            precision: ModelRecord(
                name=precision.model_name,
                engine="fake",
                calibrator="max" if precision is Precision.INT8 else "none",
                recipe="linear" if precision is Precision.INT8 else "none",
                f1=80.5,
                exact_match=70.25,
                size_bytes=1000,
            )
            for precision in precisions
        },
        recommended=recommended,
        verdict=verdict,
    )


@dataclass
class FakeEngine:
    """Implements ``Engine``."""

    tokenizer: ReaderTokenizer
    phrases: Mapping[Precision, Sequence[str]] = field(
        default_factory=lambda: dict.fromkeys(ALL, (KEEPER,))
    )
    down: EngineUnavailableError | None = None
    mismatch: ContractError | None = None
    fault: Exception | None = None
    faulty: frozenset[Precision] = frozenset(ALL)
    """Precisions that ``fault`` strikes."""
    nonsense: str | None = None
    open_gate: asyncio.Event = field(default_factory=asyncio.Event)
    gates: dict[Precision, asyncio.Event] = field(default_factory=dict)
    """Likewise for single precisions."""
    calls: list[tuple[Precision, tuple[int, ...]]] = field(default_factory=list)
    connected: bool = False
    probes: int = 0
    cancelled: int = 0

    def __post_init__(self) -> None:
        self.open_gate.set()

    async def connect(self) -> None:
        self.connected = True

    async def close(self) -> None:
        self.connected = False

    async def ready(self, precision: Precision) -> bool:
        self.probes += 1
        if self.down is not None:
            raise self.down
        return True

    async def check_contract(self, precision: Precision) -> None:
        if self.mismatch is not None:
            raise self.mismatch

    async def holds(self, precision: Precision) -> bool:
        with contextlib.suppress(ContractError):
            if await self.ready(precision):
                await self.check_contract(precision)
                return True
        return False

    async def load(self, precision: Precision) -> None:
        raise ModelLoadError(f"{precision} is not for loading")

    async def unload(self, precision: Precision) -> None:
        raise ModelLoadError(f"{precision} is not for unloading")

    async def infer(
        self, precision: Precision, batch: PaddedBatch, timeout_s: float | None
    ) -> BatchLogits:
        if self.down is not None:
            raise self.down
        self.calls.append((precision, batch.input_ids.shape))
        try:
            await self.open_gate.wait()
            if precision in self.gates:
                await self.gates[precision].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fault is not None and precision in self.faulty:
            raise self.fault
        start = np.zeros(batch.input_ids.shape, dtype=np.float32)
        end = np.zeros_like(start)
        for row, ids in enumerate(batch.input_ids.tolist()):
            first, last = self._locate(precision, ids)
            start[row, first] = end[row, last] = 10.0
        if self.nonsense == "nan":
            start[:] = np.nan
        if self.nonsense == "shape":
            start = start[:, 1:]
        return BatchLogits(start, end)

    def _locate(self, precision: Precision, ids: list[int]) -> tuple[int, int]:
        separator = int(self.tokenizer.template.between_ids[0])
        context = ids.index(separator) + 1
        for phrase in self.phrases[precision]:
            wanted = self.tokenizer.encode(phrase).ids.tolist()
            for first in range(context, len(ids) - len(wanted)):
                if ids[first : first + len(wanted)] == wanted:
                    return first, first + len(wanted) - 1
        return 0, 0


@dataclass
class Service:
    """A running gateway and a client of it."""

    app: FastAPI
    engine: FakeEngine
    client: httpx.AsyncClient
    settings: Settings

    async def ask(self, **fields: object) -> httpx.Response:
        body = {"question": QUESTION, "context": CONTEXT, **fields}
        return await self.client.post("/v1/answer", json=body)

    async def wait_ready(self) -> None:
        watch = self.app.state.gateway.pipeline.watch
        await asyncio.wait_for(watch.wait_ready(), 10)

    async def read_metrics(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line and not line.startswith("#")
        }


def build_settings(**groups: object) -> Settings:
    values: dict[str, object] = {
        "triton": {"probe_interval_s": 0.02},
        # What a test asks is what the engine sees, unless it says otherwise.
        "comparison": {"fraction": 0},
        # No gateway of a test compares itself with what is built in this checkout.
        "model_repository": Path("no-such-model-repository"),
        **groups,
    }
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def open_service(
    tokenizer: ReaderTokenizer,
    *,
    engine: FakeEngine | None = None,
    precisions: Sequence[Precision] = ALL,
    recommended: Precision | None = None,
    verdict: str = "",
    wait: bool = True,
    **groups: object,
) -> AsyncIterator[Service]:
    engine = engine or FakeEngine(tokenizer)
    settings = build_settings(**groups)
    contract = build_contract(
        tokenizer, precisions, recommended=recommended, verdict=verdict
    )
    app = create_app(settings, contract, tokenizer, engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        ) as client,
    ):
        service = Service(app, engine, client, settings)
        if wait:
            await service.wait_ready()
        yield service


@contextlib.asynccontextmanager
async def listen(service: Service) -> AsyncIterator[str]:
    """Put a service, whose lifespan runs already, on a free port; yield its URL."""
    async with listen_app(service.app, service.settings.limits) as url:
        yield url


@contextlib.asynccontextmanager
async def listen_app(
    app: ASGIApp, limits: LimitSettings, *, keep_alive_s: int = 5
) -> AsyncIterator[str]:
    """Put any application behind the gateway's own protocol; yield its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            http=build_protocol(limits),
            ws="none",
            timeout_keep_alive=keep_alive_s,
        )
    )
    # Signals stay the test runner's.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 20)


async def wait_until(condition: object, *, limit_s: float = 10) -> None:
    """Wait for a condition that nothing announces; fails after ``limit_s``."""
    assert callable(condition)

    async def watch() -> None:
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.005)

    await asyncio.wait_for(watch(), limit_s)
