"""Contestants in turns, with small servers in their place: order, failures, sums."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from int8qa.bench import peer_race, peer_rounds
from int8qa.bench.peer_race import PeerOptions
from int8qa.bench.peer_rounds import bench_peers, check_checkpoint, choose_groups
from int8qa.bench.peer_scores import compare_reference, compare_rounds
from int8qa.bench.peer_servers import choose_pinning, clean_variables
from int8qa.bench.peers import REFERENCE, Contestant, Variant, list_contestants
from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.contract import CONTRACT_FILENAME, Precision
from int8qa.errors import ConfigurationError
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.bench.conftest import QUESTIONS
from tests.gateway.fakes import TOKENIZER_JSON, build_contract

FAKE = str(Path(__file__).with_name("peer_fakes.py"))
RIGHT = "behind the bar"


def make_contestant(name: str, *arguments: str, **changes: Any) -> Contestant:
    values: dict[str, Any] = {
        "name": name,
        "group": name,
        "title": f"The {name}",
        "precision": "int8",
        "serve": ("{python}", FAKE, "--port", "{port}", *arguments),
        "ready": "http://127.0.0.1:{port}/ready",
        "load": ("{python}", "-m", "int8qa.bench.peer_load"),
        "concurrencies": (1, 4),
    }
    return Contestant(**values | changes)


@pytest.fixture
def options(
    question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PeerOptions:
    """A checkout with no peer in it, a repository with no engine."""
    monkeypatch.setattr(peer_rounds, "check_checkpoint", lambda *_: None)
    peers = tmp_path / "bench" / "peers"
    peers.mkdir(parents=True)
    (peers / "reading.py").touch()
    repository = tmp_path / "repository"
    repository.mkdir()
    contract = build_contract(ReaderTokenizer.from_file(TOKENIZER_JSON))
    (repository / CONTRACT_FILENAME).write_text(contract.model_dump_json())
    return PeerOptions(
        repository=repository,
        checkpoint=str(demo_checkpoint_directory()),
        peers=peers,
        data=question_file,
        rounds=2,
    )


def enter(monkeypatch: pytest.MonkeyPatch, *contestants: Contestant) -> None:
    monkeypatch.setattr(peer_rounds, "list_contestants", lambda *_: list(contestants))


def test_rounds_take_turns(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second round in reverse; the same questions to all; F1 of the answers."""
    enter(
        monkeypatch,
        make_contestant(REFERENCE, "--answer", RIGHT),
        make_contestant("wrong", "--answer", "on the roof", precision="fp32"),
    )
    said: list[str] = []
    result = bench_peers(options, said.append)
    rounds = [line for line in said if line.startswith("[round")]
    order = [line.partition("] ")[2].partition(":")[0] for line in rounds]
    assert order == [REFERENCE, "wrong", "wrong", REFERENCE]
    right, wrong = result["contestants"]
    assert (right["f1"], right["exact_match"]) == (100.0, 100.0)
    assert wrong["f1"] < 50.0
    for row in (right, wrong):
        assert row["status"] == "measured"
        assert len(row["tuning"]) == 2
        assert [run["round"] for run in row["runs"]] == [1, 2]
        assert row["qps"] > 0
        assert row["p99_ms"] >= row["p50_ms"] > 0
    assert result["problems"] == []
    assert result["provenance"]["questions"] == QUESTIONS
    assert result["rules"]["rounds"] == 2
    ratio = compare_reference(result, "wrong")
    assert ratio is not None
    assert ratio > 0


def test_who_does_not_run_is_not_dropped(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No environment, no server: each has a row with its reason."""
    folder = options.peers / "uninstallable"
    folder.mkdir()
    (folder / "requirements.txt").write_text("./no-such-package-here\n")
    enter(
        monkeypatch,
        make_contestant("uninstallable", environment="uninstallable"),
        make_contestant("unstartable", "--broken"),
        make_contestant(REFERENCE, "--answer", RIGHT, concurrencies=(2,)),
    )
    result = bench_peers(options)
    by_name = {row["name"]: row for row in result["contestants"]}
    assert list(by_name) == ["uninstallable", "unstartable", REFERENCE]
    assert by_name["uninstallable"]["status"] == "not run"
    assert "no-such-package-here" in by_name["uninstallable"]["reason"]
    assert "no engine here" in by_name["unstartable"]["reason"]
    assert by_name[REFERENCE]["status"] == "measured"
    assert len(result["problems"]) == 2
    assert not (options.peers.parent / ".venvs" / "uninstallable").exists()


def test_server_that_dies_under_load(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it lost is counted; it is never taken for fast."""
    dying = make_contestant(
        "mortal",
        *("--answer", RIGHT, "--die-after", str(QUESTIONS + 4)),
        concurrencies=(1,),
    )
    enter(monkeypatch, dying)
    result = bench_peers(options)
    (row,) = result["contestants"]
    assert row["status"] == "not run"
    assert "failed requests" in row["reason"]
    assert row["tuning"][0]["failures"]


def test_model_that_cannot_be_exported(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who serves it stays out."""
    needs = make_contestant("needs", "--answer", "{onnx}", concurrencies=(1,))
    enter(monkeypatch, needs, make_contestant(REFERENCE, "--answer", RIGHT))
    failed = SimpleNamespace(returncode=1, stderr="…\nExportError: no such operator\n")
    monkeypatch.setattr(peer_race, "export_model", lambda *_: failed)
    rows = bench_peers(options)["contestants"]
    assert [row["status"] for row in rows] == ["not run", "measured"]
    assert "ExportError: no such operator" in rows[0]["reason"]


def test_fastest_variant_is_taken(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among those that run: one that does not start costs the contestant nothing."""
    variants = (
        Variant("broken", ("--broken",)),
        Variant("good", ("--answer", RIGHT), {"pad": 384}),
    )
    enter(monkeypatch, make_contestant("tuned", variants=variants))
    result = bench_peers(options)
    (row,) = result["contestants"]
    assert row["status"] == "measured"
    assert row["variant"] == "good"
    assert row["concurrency"] in {1, 4}
    assert row["f1"] == 100.0


def test_groups() -> None:
    """`--peer int8qa` is all its precisions; an unknown name lists the known."""
    everybody = list_contestants(list(Precision), 2)
    names = [one.name for one in choose_groups(everybody, ["int8qa", "triton"])]
    assert names == ["int8qa-int8", "int8qa-fp16", "int8qa-fp32", "triton"]
    assert choose_groups(everybody, []) == everybody
    with pytest.raises(ConfigurationError, match="engine, stock, int8qa, triton"):
        choose_groups(everybody, ["vllm"])


def test_contestants_programs_are_in_the_checkout() -> None:
    """Every file and placeholder that a command names exists."""
    peers = Path(__file__).parents[2] / "bench" / "peers"
    everybody = list_contestants(list(Precision), 2)
    assert REFERENCE in {one.name for one in everybody}
    values = dict.fromkeys(
        ("port", "health_port", "repository", "checkpoint", "onnx", "stock", "work"),
        "x",
    )
    values |= {"python": "p", "peer_python": "p", "peers": str(peers)}
    for one in everybody:
        for word in (*one.serve, *one.load, one.ready, *one.settings.values()):
            filled = word.format_map(values)
            if filled.startswith(str(peers)):
                assert Path(filled).is_file(), filled
        if one.environment:
            assert (peers / one.environment / "requirements.txt").is_file()
        assert len({variant.name for variant in one.variants}) == len(one.variants)


def test_only_the_loader_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last core; where there is one core or no taskset, to none."""
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/taskset")
    assert choose_pinning([0, 1, 5]) == ["taskset", "--cpu-list", "5"]
    assert choose_pinning([0]) == []
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert choose_pinning([0, 1]) == []


def test_variables_of_the_user_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither threads nor settings of int8qa; what a contestant sets comes in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("INT8QA_API_KEY", "secret")
    found = clean_variables({"INT8QA_PORT": "1234"})
    assert "OMP_NUM_THREADS" not in found
    assert "INT8QA_API_KEY" not in found
    assert found["INT8QA_PORT"] == "1234"
    assert "PATH" in found


def test_another_checkpoint_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Peers would answer with other weights than int8qa."""
    manifest = {"checkpoint": {"name": "one", "sha256": "a"}}
    monkeypatch.setattr(peer_rounds, "read_manifest", lambda _: manifest)
    for sha256, refused in (("a", False), ("b", True)):
        files = SimpleNamespace(name="two", sha256=sha256)
        monkeypatch.setattr(peer_rounds, "resolve_checkpoint", lambda _, f=files: f)
        if refused:
            with pytest.raises(ConfigurationError, match="another checkpoint"):
                check_checkpoint("two", tmp_path)
        else:
            check_checkpoint("two", tmp_path)


def test_no_checkout(options: PeerOptions, tmp_path: Path) -> None:
    """The message says where the peers are."""
    (options.peers / "reading.py").unlink()
    with pytest.raises(ConfigurationError, match="in a checkout of int8qa"):
        bench_peers(options)


def test_ratios_are_of_the_same_rounds() -> None:
    """Round 2 was slow for both; round 3 has only one of them."""

    def row(name: str, **rates: float) -> dict[str, Any]:
        runs = [{"round": int(k[1:]), "qps": v} for k, v in rates.items()]
        return {"name": name, "runs": runs}

    result = {
        "contestants": [
            row(REFERENCE, r1=90.0, r2=30.0, r3=90.0),
            row("peer", r1=30.0, r2=10.0),
            row("absent"),
        ]
    }
    assert compare_reference(result, "peer") == 3.0
    assert compare_rounds(result, "peer", REFERENCE) == pytest.approx(1 / 3)
    assert compare_reference(result, "absent") is None
    assert compare_reference(result, "unknown") is None
