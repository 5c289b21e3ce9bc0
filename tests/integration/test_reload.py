"""A rebuilt repository goes live in a real Triton while questions come in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from int8qa.build.repository import stage_repository
from int8qa.build.triton_config import parse_config
from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision, load_contract
from int8qa.embedded import TritonState, TritonSupervisor, locate_triton
from int8qa.errors import MissingDependencyError
from int8qa.gateway import reload
from int8qa.gateway.app import create_app
from int8qa.gateway.triton import TritonEngine
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import EmbeddedSettings, Settings

pytestmark = pytest.mark.triton
PAIR = (Precision.INT8, Precision.FP16)
SAME = dict(zip(PAIR, PAIR, strict=True))
SWAPPED = dict(zip(PAIR, PAIR[::-1], strict=True))
BUCKETS = (32, 64)
"""Few lengths to warm up: this is about builds, not about speed."""
QUESTION = {
    "question": "When was the lighthouse finished?",
    "context": "Work on the Norrvik lighthouse began in 1884. It was finished in May "
    "1887 and cost 41,200 crowns.",
}
LIMIT_S = 60.0


def publish(
    source: Path,
    target: Path,
    build_id: str,
    engines: dict[Precision, Precision],
    *,
    damaged: bool = False,
) -> Contract:
    """Build from engines that exist: each precision gets the one of ``engines``."""
    built = load_contract(source)
    contract = built.model_copy(
        update={
            "build_id": build_id,
            "sequence_buckets": BUCKETS,
            "max_window_tokens": BUCKETS[-1],
            "models": {precision: built.models[precision] for precision in PAIR},
            "batch_ms": {
                precision: {length: costs[length] for length in BUCKETS}
                for precision, costs in built.batch_ms.items()
                if precision in PAIR
            },
        }
    )
    with stage_repository(target) as staged:
        shutil.copyfile(
            source / TOKENIZER_FILENAME, staged.directory / TOKENIZER_FILENAME
        )
        for precision, engine in engines.items():
            origin = source / built.triton_name(engine)
            directory = staged.model_directory(precision.model_name)
            for name in ("model.py", "model.xml", "model.bin", "properties.json"):
                shutil.copyfile(origin / "1" / name, directory / name)
            if damaged:
                (directory / "model.xml").write_text("no model")
            config = parse_config((origin / "config.pbtxt").read_text())
            config.parameters["sequence_buckets"].string_value = json.dumps(BUCKETS)
            staged.write_config(precision.model_name, str(config))
        return staged.publish(contract, {}, beside=True)


@dataclass
class Traffic:
    """Questions without a pause, each of both precisions; what came back."""

    client: httpx.AsyncClient
    answers: list[httpx.Response] = field(default_factory=list)
    over: bool = False

    async def run(self) -> None:
        while not self.over:
            body = {**QUESTION, "precision": "both"}
            self.answers.append(await self.client.post("/v1/answer", json=body))

    async def wait_for_more(self, count: int) -> None:
        wanted = len(self.answers) + count
        while len(self.answers) < wanted:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


def read_scores(response: httpx.Response) -> tuple[float, float]:
    found = response.json()["comparison"]
    return found["int8"]["answer"]["score"], found["fp16"]["answer"]["score"]


@contextlib.asynccontextmanager
async def run_up(repository: Path) -> AsyncIterator[tuple[FastAPI, TritonSupervisor]]:
    """What `int8qa up` runs, in this process and without a socket."""
    try:
        installation = locate_triton()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        model_repository=repository,
        comparison={"fraction": 0},
    )
    tokenizer = ReaderTokenizer.from_file(repository / TOKENIZER_FILENAME)
    async with TritonSupervisor(
        installation=installation,
        model_repository=repository,
        settings=EmbeddedSettings(stop_timeout_s=5.0),
        control_key="k",
    ) as supervisor:

        def open_engine(contract: Contract) -> TritonEngine:
            return TritonEngine(supervisor.grpc_url, contract, control_key="k")

        contract = load_contract(repository)
        app = create_app(
            settings,
            contract,
            tokenizer,
            open_engine(contract),
            open_engine=open_engine,
        )
        async with app.router.lifespan_context(app):
            await app.state.gateway.pipeline.watch.wait_ready()
            yield app, supervisor


async def test_rebuilt_models_go_live_without_a_failed_request(
    demo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question is answered, by one build and never by halves of two.

    The second build has the engines of the first the other way round, so scores tell
    which build answered. The third has no engines at all, and the second serves on.
    """
    monkeypatch.setattr(reload, "LINGER_S", 0.0)
    repository = tmp_path / "model_repository"
    publish(demo_repository, repository, "one", SAME)
    async with (
        run_up(repository) as (app, supervisor),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway"
        ) as client,
    ):
        traffic = Traffic(client)
        asking = [asyncio.create_task(traffic.run()) for _ in range(3)]
        await traffic.wait_for_more(10)

        second = publish(demo_repository, repository, "two", SWAPPED)
        assert second.generation == 2
        await traffic.wait_for_more(3)
        assert app.state.gateway.contract.build_id == "one"
        app.state.reloader.request()
        await asyncio.wait_for(app.state.reloader.wait_idle(), LIMIT_S)
        assert app.state.gateway.contract == second
        begun_after = len(traffic.answers) + len(asking)
        await traffic.wait_for_more(10)

        publish(demo_repository, repository, "three", SWAPPED, damaged=True)
        app.state.reloader.request()
        await asyncio.wait_for(app.state.reloader.wait_idle(), LIMIT_S)
        assert app.state.gateway.contract == second
        # The processes of unloaded models are no crash: Triton was never restarted.
        await traffic.wait_for_more(10)
        assert (supervisor.state, supervisor.restarts) == (TritonState.READY, 0)
        traffic.over = True
        await asyncio.gather(*asking)

    assert Counter(answer.status_code for answer in traffic.answers).keys() == {200}
    scores = [read_scores(answer) for answer in traffic.answers]
    int8, fp16 = scores[0]
    gap = abs(int8 - fp16)
    assert gap > 1e-3, "this question does not tell the engines apart"
    first = [score == pytest.approx((int8, fp16), abs=gap / 4) for score in scores]
    then = [score == pytest.approx((fp16, int8), abs=gap / 4) for score in scores]
    assert all(a != b for a, b in zip(first, then, strict=True)), "of one build each"
    assert not any(first[begun_after:])
    assert sum(first) > 10
