"""A rehearsal's clients, builds, accounting and page, without a Triton."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from int8qa.bench import rehearsal as rehearsal_module
from int8qa.bench.rehearsal import Rehearsal, RehearsalOptions
from int8qa.bench.rehearsal_clients import NO_ANSWER, NOBODY, Asked, Clients
from int8qa.bench.rehearsal_fleet import choose_hosts, prepare_builds
from int8qa.bench.rehearsal_result import (
    Phase,
    Record,
    SentAgain,
    build_result,
    measure_triton,
    read_sent_again,
)
from int8qa.bench.report import write_report
from int8qa.build.triton_config import openvino_model_config, parse_config
from int8qa.contract import Contract, Precision, load_contract
from int8qa.errors import ContractError, GatewayRequestError
from int8qa.settings import EmbeddedSettings
from tests.bench.test_commands import invoke
from tests.bench.test_report import read_figures
from tests.records import make_model_record
from tests.stub_gateway import Reply, answer_reply, problem_reply, run_gateway

BODIES = [{"question": "Where?", "context": "There."}]


async def test_clients_spread_over_who_is_in_service() -> None:
    """In turn over both, then the one alone; with none a request has failed."""
    with (
        run_gateway(lambda _: answer_reply("there")) as one,
        run_gateway(lambda _: answer_reply("there")) as two,
    ):
        clients = Clients([one.url, two.url], BODIES, seed=1)
        for _ in range(6):
            await clients.send()
        clients.in_service[1] = False
        for _ in range(4):
            await clients.send()
        await clients.send(1)
        clients.in_service[0] = False
        await clients.send()
        await clients.finish()
        assert len(one.requests) == 3 + 4
        assert len(two.requests) == 3 + 1
    assert [asked.failure for asked in clients.ended] == [None] * 11 + [NOBODY]
    assert clients.under_way == [0, 0]


async def test_failures_are_counted_and_not_asked_again() -> None:
    """A refusal and a reply without an answer have failed, once each."""
    replies = iter([problem_reply(503, "later"), Reply({}), Reply("nonsense")])
    with run_gateway(lambda _: next(replies)) as gateway:
        clients = Clients([gateway.url], BODIES, seed=1)
        for _ in range(3):
            await clients.send()
        await clients.finish()
        assert len(gateway.requests) == 3
    failures = Counter(asked.failure for asked in clients.ended)
    assert failures == {"HTTP 503": 1, NO_ANSWER: 2}


async def test_rush_keeps_so_many_under_way() -> None:
    """Each client has one request at a time, for as long as the rush lasts."""
    with run_gateway(lambda _: answer_reply("there")) as gateway:
        clients = Clients([gateway.url], BODIES, seed=1)
        await clients.rush(0.2, 3)
        await clients.finish()
    assert len(clients.ended) >= 3
    assert {asked.failure for asked in clients.ended} == {None}


def make_build(path: Path, build_id: str, *, generation: int = 0) -> Path:
    """As much of a model repository as is looked at."""
    record = make_model_record(engine="openvino")
    contract = Contract(
        build_id=build_id,
        generation=generation,
        checkpoint="acme/reader",
        tokenizer_sha256="0" * 64,
        pad_token_id=0,
        inputs=("input_ids",),
        max_window_tokens=32,
        sequence_buckets=(32,),
        batch_sizes=(1, 2),
        max_batch_tokens=64,
        models={Precision.INT8: record},
    )
    model = path / contract.triton_name(Precision.INT8)
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.bin").write_text(f"engine of {build_id}")
    config = openvino_model_config(
        Precision.INT8,
        inputs=contract.inputs,
        sequence_buckets=contract.sequence_buckets,
        batch_sizes=contract.batch_sizes,
        max_batch_tokens=1024,
    )
    (model / "config.pbtxt").write_text(config)
    (path / "tokenizer.json").write_text("{}")
    contract.save(path)
    return path


def read_stamp(path: Path) -> str:
    """The build that the model of a repository says it is of."""
    contract = load_contract(path)
    config = path / contract.triton_name(Precision.INT8) / "config.pbtxt"
    return str(parse_config(config.read_text()).parameters["build_id"].string_value)


def test_one_build_becomes_two_that_can_be_told_apart(tmp_path: Path) -> None:
    """Copies with ids of their own and the same engines; the original is untouched."""
    source = make_build(tmp_path / "source", "b1")
    older, newer = prepare_builds(source, None, tmp_path)
    assert (read_stamp(older), read_stamp(newer)) == ("b1", "b1-newer")
    assert load_contract(newer).build_id == "b1-newer"
    for path in (older, newer):
        engine = path / "qa_int8" / "1" / "model.bin"
        assert engine.read_text() == "engine of b1"
    assert read_stamp(source) == ""


def test_builds_that_say_who_they_are_are_served_in_place(tmp_path: Path) -> None:
    """Those made with --beside; and one and the same build twice is refused."""
    one = make_build(tmp_path / "one", "b1", generation=1)
    two = make_build(tmp_path / "two", "b2", generation=3)
    assert prepare_builds(one, two, tmp_path / "place") == [one, two]
    unmarked = make_build(tmp_path / "unmarked", "b3")
    found = prepare_builds(one, unmarked, tmp_path / "place")
    assert found == [one, tmp_path / "place" / "newer"]
    assert read_stamp(found[1]) == "b3"
    with pytest.raises(ContractError, match="hold the same build, b1"):
        prepare_builds(one, one, tmp_path / "place")


def test_each_triton_has_an_address() -> None:
    """Of its own where loopback has so many, and always one that is loopback."""
    hosts = choose_hosts()
    assert len(hosts) == 3
    assert len(set(hosts)) in {1, 3}
    assert all(host.startswith("127.") for host in hosts)


def write_metrics(requests: int, executions: int, windows: int, queue_us: int) -> str:
    """Of one Triton, in two models of which one does nothing."""
    values = {
        "nv_inference_request_success": requests,
        "nv_inference_exec_count": executions,
        "nv_inference_count": windows,
        "nv_inference_queue_duration_us": queue_us,
    }
    return "".join(
        f"# HELP {name} x\n# TYPE {name} counter\n"
        f'{name}{{model="qa_int8",version="1"}} {value}\n'
        f'{name}{{model="qa_fp16",version="1"}} 0\n'
        for name, value in values.items()
    )


def test_merging_is_counted_by_tritons_own_counters() -> None:
    """Requests over executions, of the phase alone."""
    before, after = write_metrics(10, 10, 20, 0), write_metrics(40, 25, 80, 60_000)
    use = measure_triton("rush", "t1", before, after)
    assert (use.requests, use.executions, use.windows) == (30, 15, 60)
    assert use.queue_ms == 2.0
    assert measure_triton("rush", "t1", after, after).queue_ms is None


def test_batches_sent_again_are_read_from_the_log() -> None:
    """By the run's clock; other lines and damaged ones are passed over."""
    line = (
        '{"event":"batch_sent_again","reason":"late",'
        '"timestamp":"2026-11-23T12:00:10.500000Z"}'
    )
    lines = ['{"event":"request"}', line, '{"event":"batch_sent_again",', "Traceback"]
    found = read_sent_again(lines, 1, 1795435200.0)
    assert found == [SentAgain(10.5, 1, "late")]


def make_record() -> Record:
    """Two phases in which all went well."""
    record = Record(
        capacity=20.0,
        rate=5.0,
        phases=[Phase("rush", 0.0, 2.0), Phase("Triton killed", 2.0, 4.0)],
        events=[(2.0, "Triton 1 is killed")],
        asked=[Asked(0.5 * n, n % 2, 0.01 * (n + 1), None) for n in range(8)],
        sent_again=[SentAgain(2.1, 0, "late"), SentAgain(2.2, 1, "unavailable")],
        serving=[(0.0, [3, 3]), (2.5, [2, None])],
        under_way_at_drain=4,
        early_windows=0,
        newer_since_s=3.0,
        newer_windows={"sent": 7, "computed": 7},
    )
    before, after = write_metrics(0, 0, 0, 0), write_metrics(30, 15, 60, 0)
    record.uses = [measure_triton("rush", "127.0.0.2:8001", before, after)]
    return record


def test_requests_belong_to_the_phase_they_were_sent_in() -> None:
    """Counts, percentiles and batches sent again, phase by phase and by second."""
    result = build_result(make_record())
    rush, killed = result["phases"]
    assert (rush["asked"], rush["answered"], rush["failed"]) == (4, 4, {})
    assert (rush["p50_ms"], rush["slowest_ms"]) == (30.0, 40.0)
    assert (killed["asked"], killed["slowest_ms"]) == (4, 80.0)
    assert rush["sent_again"] == {}
    assert killed["sent_again"] == {"late": 1, "unavailable": 1}
    assert result["seconds"]["answered"] == [2, 2, 2, 2]
    assert result["serving"]["gateways"] == [[3, 2], [3, None]]
    assert result["tritons"][0]["requests_per_execution"] == 2.0
    assert result["tritons"][0]["windows_per_execution"] == 4.0
    assert (result["problems"], result["remarks"]) == ([], [])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"asked": [Asked(2.0, 0, 0.1, "HTTP 503"), Asked(3.0, 0, 0.1, None)]},
            "1 of 2 requests failed (1 × HTTP 503)",
        ),
        ({"early_windows": 3}, "the newer Triton computed 3 windows while all"),
        ({"newer_windows": {"sent": 7, "computed": 5}}, "builds were mixed"),
        ({"newer_windows": {"sent": 7, "computed": 9}}, "builds were mixed"),
        ({"problems": ["Triton 1 was not ready"]}, "Triton 1 was not ready"),
    ],
)
def test_what_makes_a_rehearsal_fail(changes: dict[str, Any], expected: str) -> None:
    """A failed request, a batch with the wrong build, what did not come back."""
    record = make_record()
    for name, value in changes.items():
        setattr(record, name, value)
    (problem,) = build_result(record)["problems"]
    assert problem.startswith(expected)


def test_batch_sent_again_may_be_computed_twice() -> None:
    """More windows than were sent are a fault only where nothing was sent twice."""
    record = make_record()
    record.newer_windows = {"sent": 7, "computed": 9}
    record.sent_again.append(SentAgain(3.5, 1, "late"))
    assert build_result(record)["problems"] == []


def test_refusals_in_the_rush_are_no_failures() -> None:
    """It asks for everything there is; who is refused then is only remarked."""
    record = make_record()
    record.asked[0] = Asked(0.0, 0, 0.1, "HTTP 503")
    result = build_result(record)
    assert result["problems"] == []
    assert result["remarks"][0].startswith("1 of 4 requests failed (1 × HTTP 503)")
    assert result["phases"][0]["failed"] == {"HTTP 503": 1}


def test_rate_too_near_the_capacity_is_remarked() -> None:
    """Such a rate says nothing about failures with capacity left."""
    record = make_record()
    record.rate = 15.0
    (remark,) = build_result(record)["remarks"]
    assert "15 questions/s are more than 50 % of the 20.0" in remark


PROVENANCE = {
    "machine": {
        "processor": "Abacus",
        "cores": 2,
        "features": [],
        "memory_gb": 1,
        "system": "Linux",
        "load_before": 0.0,
    },
    "versions": {},
    "started_at": "",
    "command": "int8qa bench rehearsal",
}


def make_result(record: Record) -> dict[str, Any]:
    return build_result(record) | {
        "provenance": PROVENANCE,
        "addresses": ["127.0.0.2:8001"],
        "builds": ["b1", "b2"],
    }


def test_page_has_the_time_line_and_every_table(tmp_path: Path) -> None:
    """Events and phases are marked where they were; gaps of a gateway stay gaps."""
    record = make_record()
    record.asked.append(Asked(3.9, 0, 0.1, "HTTP <i>503</i>"))
    data, page = write_report(make_result(record), tmp_path)
    assert json.loads(data.read_text())["capacity"] == 20.0
    text = page.read_text()
    for words in (
        "5 requests in 2 s",
        "1 of 5 requests failed",
        "it had 4 requests under way",
        "rush, 127.0.0.2:8001",
        "computed by the newer build",
    ):
        assert words in text
    assert "<i>503" not in text
    (choice,) = read_figures(text)["timeline"]["choices"]
    assert [row[1] for row in choice["rows"]] == ["Triton 1 is killed"]
    lines = {line["name"]: line for line in choice["figure"]["data"]}
    assert lines["gateway 2"]["y"][1] is None
    assert lines["failed"]["y"] == [0, 0, 0, 1]
    marks = [shape["x0"] for shape in choice["figure"]["layout"]["shapes"]]
    assert marks == [2.0, 0.0, 2.0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RehearsalOptions]:
    """No Triton: a finished result comes back; at some rates it has not gone well."""
    options: list[RehearsalOptions] = []

    def run(given: RehearsalOptions, say: Any) -> dict[str, Any]:
        options.append(given)
        say("[0 s] Triton 1 is killed")
        record = make_record()
        if given.rate == 66.0:
            record.problems = ["Triton 1 was not ready"]
        if given.rate == 99.0:
            raise KeyboardInterrupt
        return make_result(record)

    monkeypatch.setattr(rehearsal_module, "run_rehearsal", run)
    return options


def test_command_prints_phases_and_writes_the_report(
    asked: list[RehearsalOptions], tmp_path: Path
) -> None:
    """Options arrive; a row for each phase, the verdict, and the files."""
    build = make_build(tmp_path / "build", "b1")
    found = invoke(
        *("rehearsal", "--model-repository", str(build), "--load", "0.1"),
        *("--phase-seconds", "5", "--output", str(tmp_path / "out")),
    )
    assert found.exit_code == 0, found.output
    (options,) = asked
    assert (options.repository, options.newer) == (build, None)
    assert (options.load, options.rate, options.phase_s) == (0.1, None, 5.0)
    assert "Triton killed" in found.stdout
    assert "30 requests in 15 executions, of 4.00 windows" in found.stdout
    assert "4 requests in 2 s" in found.stdout
    assert "Triton 1 is killed" in found.stderr
    assert (tmp_path / "out" / "rehearsal.html").is_file()


def test_command_fails_after_the_report(
    asked: list[RehearsalOptions], tmp_path: Path
) -> None:
    """A problem is an error, and its report is there to say more."""
    build = make_build(tmp_path / "build", "b1")
    arguments = ("--model-repository", str(build), "--output", str(tmp_path / "out"))
    found = invoke("rehearsal", "--rate", "66", *arguments)
    assert isinstance(found.exception, GatewayRequestError)
    assert str(found.exception).endswith("Triton 1 was not ready")
    assert (tmp_path / "out" / "rehearsal.json").is_file()
    assert len(asked) == 1


def test_interrupted_command_says_what_is_left(
    asked: list[RehearsalOptions], tmp_path: Path
) -> None:
    """Nothing runs, nothing was written."""
    build = make_build(tmp_path / "build", "b1")
    arguments = ("--model-repository", str(build), "--output", str(tmp_path / "out"))
    found = invoke("rehearsal", "--rate", "99", *arguments)
    assert found.exit_code == 130
    assert "nothing is left running, and no report was written" in found.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert len(asked) == 1


class FakeFleet:
    """Tritons and gateways that do as they are told at once, and remember it."""

    def __init__(self, urls: list[str], logs: Path) -> None:
        self.addresses = [f"127.0.0.{n}:8001" for n in (2, 3, 4)]
        self.urls = urls
        self.done: list[str] = []
        self.serving = [3, 3]
        self.comes_back = True
        self._logs = logs

    def log_path(self, gateway: int) -> Path:
        path = self._logs / f"gateway-{gateway}.jsonl"
        path.write_text("")
        return path

    async def kill(self, number: int) -> None:
        self.done.append(f"kill {number}")
        if not self.comes_back:
            self.serving = [2, 2]

    def freeze(self, number: int) -> None:
        self.done.append(f"freeze {number}")

    def resume(self, number: int) -> None:
        self.done.append(f"resume {number}")

    async def replace(self, number: int) -> None:
        self.done.append(f"replace {number}")
        self.serving = [2, 2]

    async def drain(self, number: int) -> int:
        self.done.append(f"drain {number}")
        return 0

    async def start_newer(self, number: int) -> None:
        self.done.append(f"start {number}")
        self.serving = [2, 1]

    async def read_triton(self, number: int) -> str:
        return write_metrics(0, 0, 0, 0)

    async def read_gateway(self, number: int) -> str:
        count = self.serving[number]
        return f'int8qa_tritons{{precision="int8",state="serving"}} {count}\n'


@pytest.mark.parametrize("comes_back", [True, False])
async def test_everything_happens_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """One trouble a phase; a Triton that does not come back fails the run."""
    monkeypatch.setattr(rehearsal_module, "RUSH_S", 0.1)
    monkeypatch.setattr(rehearsal_module, "PRE_STOP_S", 0.01)
    monkeypatch.setattr(rehearsal_module, "RECOVERY_TIMEOUT_S", 0.1)
    with (
        run_gateway(lambda _: answer_reply("there")) as one,
        run_gateway(lambda _: answer_reply("there")) as two,
    ):
        fleet = FakeFleet([one.url, two.url], tmp_path)
        fleet.comes_back = comes_back
        options = RehearsalOptions(
            repository=tmp_path,
            output=tmp_path,
            embedded=EmbeddedSettings(),
            rate=50.0,
            phase_s=0.1,
        )
        clients = Clients(fleet.urls, BODIES, seed=1)
        said: list[str] = []
        rehearsal = Rehearsal(fleet, clients, options, said.append)  # type: ignore[arg-type]
        await rehearsal.run()
    assert fleet.done == [
        *("kill 0", "freeze 1", "resume 1", "replace 2", "drain 1", "start 1")
    ]
    record = rehearsal.record
    assert [phase.name for phase in record.phases] == [
        "rush",
        "undisturbed",
        "Triton killed",
        "Triton stopped",
        "Triton replaced",
        "gateway drained",
        "two builds",
    ]
    result = build_result(record)
    assert result["capacity"] > 0
    assert sum(phase["asked"] for phase in result["phases"]) == len(record.asked)
    assert any("is killed" in line for line in said)
    assert bool(result["problems"]) is not comes_back
    if not comes_back:
        assert "the gateways use [2, 2] Tritons each, not [3, 3]" in str(
            result["problems"]
        )
