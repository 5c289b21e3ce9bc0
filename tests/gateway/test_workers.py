"""Several gateway processes and their parent; here the processes are tasks.

All else is as it is: the channels, the shared file, the applications, the supervision.
``tests/integration/test_workers.py`` has real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision
from int8qa.errors import ContractError, Int8qaError
from int8qa.gateway import app as app_module
from int8qa.gateway import channel as messages
from int8qa.gateway import crew as crew_module
from int8qa.gateway import workers
from int8qa.gateway.app import create_app
from int8qa.gateway.channel import open_channel
from int8qa.gateway.crew import Crew
from int8qa.gateway.key_file import build_key, generate_key, hash_key
from int8qa.gateway.load import Load
from int8qa.gateway.process import bind_socket
from int8qa.gateway.workers import run_workers
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import Settings
from tests.command_line import Run
from tests.gateway.fakes import (
    ALL,
    CONTEXT,
    KEEPER,
    QUESTION,
    TOKENIZER_JSON,
    build_contract,
    build_settings,
    wait_until,
)
from tests.gateway.test_reload import YEAR, BuildEngine, Server

INT8_ANSWERS = (
    'int8qa_request_seconds_count{outcome="ok",precision="int8",route="/v1/answer"}'
)
INT8_SECONDS = (
    'int8qa_stage_seconds_count{precision="int8",stage="inference"}',
    'int8qa_batch_windows_sum{precision="int8"}',
)


@dataclass
class Task:
    """A process that is a task; stands in for ``asyncio.subprocess.Process``."""

    site: Site
    descriptors: list[int]
    pid: int = 0
    returncode: int | None = None
    app: FastAPI | None = None
    deaf: bool = False
    """Ends for no SIGTERM."""
    signals: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = asyncio.Event()
        self._asked = asyncio.Event()
        self._work = asyncio.create_task(self._run())

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        self.signals.append(number)
        if number == signal.SIGTERM and not self.deaf:
            self._asked.set()
        if number == signal.SIGKILL:
            self._work.cancel()

    async def _run(self) -> None:
        end = socket.socket(fileno=self.descriptors[0])
        channel = await open_channel(end)
        try:
            boot = await channel.receive()
            self.returncode = await self._serve(channel, boot)
        except asyncio.CancelledError:
            self.returncode = -signal.SIGKILL
        except Int8qaError as error:
            channel.send(messages.Failed(error))
            self.returncode = 1
        finally:
            await channel.close()
            os.close(self.descriptors[1])
            self._ended.set()

    async def _serve(self, channel: messages.Channel, boot: messages.Boot) -> int:
        site = self.site
        if site.fault is not None:
            raise site.fault
        load = Load(self.descriptors[1], slot=boot.slot, slots=boot.settings.workers)
        crew = Crew(channel, boot, load)

        def open_engine(contract: Contract) -> BuildEngine:
            if contract.build_id != "test" and boot.slot == site.unable:
                raise ContractError("no road from here")
            return BuildEngine(site.tokenizer, contract, site.server)

        contract = boot.build.contract
        app = create_app(
            boot.settings,
            contract,
            site.tokenizer,
            open_engine(contract),
            open_engine=open_engine,
            crew=crew,
        )
        listening = asyncio.create_task(crew.listen())
        try:
            async with app.router.lifespan_context(app):
                await app.state.gateway.pipeline.watch.wait_ready()
                self.app = app
                channel.send(messages.Ready())
                site.places[boot.slot] = self
                await self._asked.wait()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        await crew.leave()
        return 0


@dataclass
class Site:
    """A gateway of several workers, its Triton, and its model repository."""

    tokenizer: ReaderTokenizer
    server: Server
    repository: Path
    settings: Settings
    places: dict[int, Task] = field(default_factory=dict)
    """Who serves in each place; of those who ended, the last."""
    spawned: list[Task] = field(default_factory=list)
    fault: Int8qaError | None = None
    unable: int | None = None
    """Place of a worker that can serve the first build alone."""
    urls: list[str] = field(default_factory=list)

    async def spawn(self, inherited: Sequence[int]) -> Task:
        descriptors = [os.dup(one) for one in inherited[:2]]
        self.spawned.append(Task(self, descriptors, pid=1000 + len(self.spawned)))
        return self.spawned[-1]

    @contextlib.asynccontextmanager
    async def reach(self, place: int) -> AsyncIterator[httpx.AsyncClient]:
        """A client whose connection a certain worker has accepted."""
        app = self.places[place].app
        assert app is not None
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://gateway"
        ) as one:
            yield one

    async def ask(self, place: int, **fields: object) -> httpx.Response:
        headers = fields.pop("headers", None)
        body = {"question": QUESTION, "context": CONTEXT, **fields}
        async with self.reach(place) as client:
            return await client.post("/v1/answer", json=body, headers=headers)  # type: ignore[arg-type]

    async def read_answer(self, place: int) -> str:
        response = await self.ask(place)
        assert response.status_code == 200, response.text
        return str(response.json()["answer"]["text"])

    async def read_metrics(self, place: int) -> dict[str, float]:
        async with self.reach(place) as client:
            text = (await client.get("/metrics")).text
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line and not line.startswith("#")
        }

    async def read_comparison(self, place: int) -> dict[str, object]:
        async with self.reach(place) as client:
            body: dict[str, object] = (await client.get("/v1/comparison")).json()
        for pair in body["disagreements"]:  # type: ignore[attr-defined]
            del pair["age_s"]
        return body

    async def replace(self, place: int) -> None:
        """Kill a worker, and wait for the next."""
        before = self.places[place]
        before.send_signal(signal.SIGKILL)
        await wait_until(lambda: self.places[place] is not before)

    async def agree_on(self, wanted: Callable[[dict[str, object]], bool]) -> None:
        """Wait until all workers report one comparison, and it is as wanted."""
        for _ in range(400):
            reports = [await self.read_comparison(place) for place in self.places]
            if wanted(reports[0]) and all(one == reports[0] for one in reports):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(reports)


@contextlib.asynccontextmanager
async def run_site(
    tokenizer: ReaderTokenizer,
    repository: Path,
    *,
    count: int = 2,
    fault: Int8qaError | None = None,
    **groups: object,
) -> AsyncIterator[Site]:
    contract = build_contract(tokenizer).model_copy(update={"generation": 1})
    contract.save(repository)
    shutil.copyfile(TOKENIZER_JSON, repository / TOKENIZER_FILENAME)
    server = Server()
    server.gate.set()
    server.hold(contract)
    settings = build_settings(model_repository=repository, workers=count, **groups)
    site = Site(tokenizer, server, repository, settings, fault=fault)
    listener = bind_socket("127.0.0.1", 0)
    running = asyncio.create_task(
        run_workers(settings, listener, on_ready=site.urls.append, spawn=site.spawn)
    )
    try:
        begun = asyncio.create_task(wait_until(lambda: site.urls))
        await asyncio.wait({begun, running}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if not running.done():
            yield site
            if not running.done():
                os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 20)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr("int8qa.gateway.reload.LINGER_S", 0.0)
    monkeypatch.setattr(crew_module, "TELL_INTERVAL_S", 0.005)


@pytest.fixture
async def site(
    tokenizer: ReaderTokenizer, tmp_path: Path, quick: None
) -> AsyncIterator[Site]:
    async with run_site(tokenizer, tmp_path) as running:
        yield running


async def test_metrics_are_of_all_whoever_answers(site: Site):
    """Counters and histograms add up, also over a worker that was killed."""
    for place in (0, 0, 0, 1, 1):
        assert await site.read_answer(place) == KEEPER
    for place in (0, 1, 0):
        metrics = await site.read_metrics(place)
        assert metrics[INT8_ANSWERS] == 5
        assert [metrics[name] for name in INT8_SECONDS] == [5, 5]
        assert metrics["int8qa_workers"] == 2
        assert metrics["int8qa_inflight_requests"] == 0
    await site.replace(0)
    for place in (0, 1):
        assert (await site.read_metrics(place))[INT8_ANSWERS] == 5
    await site.ask(0)
    metrics = await site.read_metrics(1)
    assert metrics[INT8_ANSWERS] == 6
    assert metrics["int8qa_workers"] == 2
    assert metrics["int8qa_worker_restarts_total"] == 1
    assert metrics['int8qa_model_ready{precision="int8"}'] == 1


async def test_comparison_is_one(site: Site):
    """Pairs of all make it, in each worker's report and gauges, and in those to come."""
    for place in (0, 1, 0):
        await site.ask(place, precision="both")
    await site.ask(1)
    await site.agree_on(lambda report: report["count"] == 3)
    report = await site.read_comparison(0)
    assert report["unpaired"]["int8"]["count"] == 4  # type: ignore[index]
    await site.replace(1)
    assert await site.read_comparison(1) == report
    metrics = await site.read_metrics(1)
    assert metrics["int8qa_comparison_agreement_ratio"] == 1
    assert metrics['int8qa_comparisons_total{agreement="same"}'] == 3


async def test_guard_trips_in_all(
    tokenizer: ReaderTokenizer, tmp_path: Path, quick: None
):
    """Disagreements seen by different workers count together, and the switch once."""
    comparison = {"fraction": 0, "guard": "fallback", "guard_pairs": 4}
    async with run_site(tokenizer, tmp_path, comparison=comparison) as site:
        for task in site.places.values():
            assert task.app is not None
            engine = task.app.state.reloader._engine
            engine.phrases = {**engine.phrases, Precision.INT8: (YEAR,)}
        for place in (0, 1, 0, 1):
            await site.ask(place, precision="both")
        await site.agree_on(lambda report: report["guard"]["state"] == "tripped")  # type: ignore[index]
        await site.replace(1)
        for place in (0, 1):
            assert (await site.ask(place)).json()["precision"] == "fp16"
            metrics = await site.read_metrics(place)
            assert metrics["int8qa_guard_tripped"] == 1
            assert metrics['int8qa_guard_switches_total{to="fp16"}'] == 1
            assert metrics['int8qa_diversions_total{to="fp16"}'] == 1
            assert metrics['int8qa_serving_precision{precision="int8"}'] == 0


async def test_replays_of_all_are_counted(
    tokenizer: ReaderTokenizer, tmp_path: Path, quick: None
):
    """What each asks again makes one report."""
    comparison = {"fraction": 1, "capacity_share": 1}
    async with run_site(tokenizer, tmp_path, comparison=comparison) as site:
        await asyncio.gather(*[site.ask(place) for place in (0, 1, 0, 1)])
        report: dict[str, object] = {}
        while report.get("count") != 4:
            await asyncio.sleep(0.02)
            report = await site.read_comparison(0)
        assert report["sampling"]["replayed"] == 4  # type: ignore[index]
        metrics = await site.read_metrics(1)
        assert metrics["int8qa_comparison_busy_seconds_total"] > 0


async def test_reload_reaches_all(site: Site):
    """One loads the models; all change over; one unloads, when the last has drained."""
    contract = build_contract(site.tokenizer)
    changes = {"build_id": "second", "generation": 2}
    contract.model_copy(update=changes).save(site.repository)
    site.server.gate.clear()
    late = asyncio.create_task(site.ask(1))
    await wait_until(lambda: find_calls(site, 1))
    os.kill(os.getpid(), signal.SIGUSR1)
    await wait_until(lambda: list_builds(site) == ["second", "second"])
    assert [await site.read_answer(place) for place in (0, 1)] == [YEAR, YEAR]
    assert "unload qa_int8" not in site.server.asked, "a request is still on it"
    site.server.gate.set()
    assert (await late).json()["answer"]["text"] == KEEPER
    await wait_until(lambda: set(site.server.loaded.values()) == {"second"})
    assert site.server.asked == [
        *(f"load qa_{name}_2" for name in ALL),
        *(f"unload qa_{name}" for name in ALL),
    ]
    await site.replace(0)
    assert await site.read_answer(0) == YEAR


async def test_reload_in_none_if_one_cannot(site: Site):
    """What the first has loaded is unloaded, and nothing has changed.

    A worker that is replaced meanwhile begins with what the others serve, not with what
    lies there.
    """
    contract = build_contract(site.tokenizer)
    changes = {"build_id": "second", "generation": 2}
    contract.model_copy(update=changes).save(site.repository)
    site.unable = 1
    os.kill(os.getpid(), signal.SIGUSR1)
    await wait_until(lambda: "unload qa_fp32_2" in site.server.asked)
    assert set(site.server.loaded.values()) == {"test"}
    assert list_builds(site) == ["test", "test"]
    await site.replace(0)
    assert [await site.read_answer(place) for place in (0, 1)] == [KEEPER, KEEPER]

    site.unable = None
    os.kill(os.getpid(), signal.SIGUSR1)
    await wait_until(lambda: list_builds(site) == ["second", "second"])


async def test_lost_models_are_asked_for_once(site: Site):
    """Each worker sees that Triton lacks them; together they do not storm it."""
    site.server.refused = "qa_int8"
    site.server.loaded.clear()
    await wait_until(lambda: site.server.asked)
    for place in (0, 1):
        probes = count_probes(site, place)
        await wait_until(lambda p=place, n=probes: count_probes(site, p) >= n + 30)
    assert site.server.asked == ["load qa_int8"]


async def test_keys_are_limited_together(
    tokenizer: ReaderTokenizer, tmp_path: Path, quick: None
):
    """A key's questions a second, and its requests at once, are those of all workers."""
    key = generate_key()
    file = tmp_path / "keys"
    line = build_key(
        "shop", hash_key(key) or b"", rate_per_s=0.01, burst=4, concurrent=2
    )
    file.write_text(f"{line.format_line()}\n")
    access = {"keys_file": str(file)}
    async with run_site(tokenizer, tmp_path, access=access) as site:
        headers = {"Authorization": f"Bearer {key}"}

        async def ask(place: int) -> int:
            return (await site.ask(place, headers=headers)).status_code

        site.server.gate.clear()
        two = [asyncio.create_task(ask(0)) for _ in range(2)]
        await wait_until(lambda: count_under_way(site, 1) == 2)
        assert await ask(1) == 429
        site.server.gate.set()
        assert await asyncio.gather(*two) == [200, 200]
        await wait_until(lambda: count_under_way(site, 1) == 0)
        assert [await ask(1), await ask(1)] == [200, 200]
        assert await ask(1) == 429, "two of the four were asked of the other worker"


async def test_who_cannot_begin_ends_all(
    tokenizer: ReaderTokenizer, tmp_path: Path, quick: None
):
    """At the start a worker's reason is the whole gateway's."""
    fault = ContractError("the tokenizer is another")
    with pytest.raises(ContractError, match="the tokenizer is another"):
        async with run_site(tokenizer, tmp_path, fault=fault):
            raise AssertionError("it began")


async def test_who_cannot_begin_again_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    """Later it is logged, and the others serve on."""
    monkeypatch.setattr(workers, "_MAX_RESTART_DELAY_S", 0.01)
    site.fault = ContractError("for now")
    site.places[0].send_signal(signal.SIGKILL)
    await wait_until(lambda: len(site.spawned) >= 4)
    assert await site.read_answer(1) == KEEPER
    before, site.fault = site.places[0], None
    await wait_until(lambda: site.places[0] is not before)
    assert await site.read_answer(0) == KEEPER


async def test_end_in_bounded_time(
    tokenizer: ReaderTokenizer,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """SIGTERM asks all to drain; again, again; who does not end is killed."""
    monkeypatch.setattr(workers, "STOP_MARGIN_S", 0.5)
    limits = {"shutdown_timeout_s": 0}
    async with run_site(tokenizer, tmp_path, limits=limits) as site:
        site.places[1].deaf = True
        os.kill(os.getpid(), signal.SIGTERM)
        await wait_until(lambda: site.places[1].signals)
        os.kill(os.getpid(), signal.SIGINT)
        await wait_until(lambda: site.places[1].returncode is not None)
    assert site.places[0].returncode == 0
    assert site.places[1].signals[:2] == [signal.SIGTERM, signal.SIGTERM]
    assert site.places[1].returncode == -signal.SIGKILL
    assert len(site.spawned) == 2


def list_builds(site: Site) -> list[str]:
    apps = [site.places[place].app for place in sorted(site.places)]
    return [app.state.gateway.contract.build_id for app in apps if app is not None]


def find_calls(site: Site, place: int) -> list[object]:
    app = site.places[place].app
    assert app is not None
    return list(app.state.reloader._engine.calls)


def count_probes(site: Site, place: int) -> int:
    app = site.places[place].app
    assert app is not None
    return int(app.state.reloader._engine.probes)


def count_under_way(site: Site, place: int) -> int:
    app = site.places[place].app
    assert app is not None
    (client,) = app.state.crew._keys._clients.values()
    return int(client.count_under_way())


@pytest.mark.parametrize(
    ("arguments", "environment", "served"),
    [
        ((), {}, ("alone", 1)),
        (("--workers", "1"), {"INT8QA_WORKERS": "4"}, ("alone", 1)),
        (("--workers", "3"), {}, ("together", 3)),
        ((), {"INT8QA_WORKERS": "4"}, ("together", 4)),
    ],
)
def test_command_takes_a_number(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    served: tuple[str, int],
):
    """The option wins over the variable; with one there is no parent."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        app_module, "serve", lambda s, on_ready: seen.append(("alone", s.workers))
    )
    monkeypatch.setattr(
        workers,
        "serve_workers",
        lambda s, on_ready: seen.append(("together", s.workers)),
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("serve", *arguments).code == 0
    assert seen == [served]


@pytest.mark.parametrize("number", ["0", "65", "many"])
def test_command_refuses_other_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: str
):
    """As an option that is usage; as a variable, configuration, and named."""
    finished = run("serve", "--workers", number)
    assert finished.code == 64
    assert "--workers" in finished.err
    monkeypatch.setenv("INT8QA_WORKERS", number)
    finished = run("serve")
    assert finished.code == 78
    assert "INT8QA_WORKERS" in finished.err
