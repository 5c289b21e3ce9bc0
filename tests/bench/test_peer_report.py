"""The table keeps every row; the page and the README say the same."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects
import pytest
from typer.testing import CliRunner

from int8qa.bench import peer_rounds
from int8qa.bench.commands import add_bench_commands
from int8qa.bench.peer_load import Outcome
from int8qa.bench.peer_race import Entry, PeerOptions, describe_load
from int8qa.bench.peer_report import (
    render_peers,
    tabulate_peers,
    write_markdown,
    write_peers_verdict,
)
from int8qa.bench.peer_scores import summarize
from int8qa.bench.peers import list_contestants
from int8qa.bench.report import write_files
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError
from int8qa.reader.squad import SquadQuestion

BENCH = Path(__file__).parents[2] / "bench"
RATES = {
    "engine-int8": 100.0,
    "engine-fp16": 50.0,
    "stock": 62.5,
    "int8qa-int8": 90.0,
    "int8qa-fp16": 47.0,
    "triton": 45.0,
    "litserve": 180.0,
    "transformers": 30.0,
}


@pytest.fixture
def peers(result: dict[str, Any]) -> dict[str, Any]:
    """Of `bench peers`: LitServe won, transformers failed, nobody was left out."""
    questions = [SquadQuestion("q", "?", "four", ("four",), (0,))]
    rows = []
    for contestant in list_contestants([Precision.INT8, Precision.FP16], 2):
        entry = Entry(contestant, variant=contestant.variants[0], concurrency=8)
        if contestant.name == "transformers":
            entry.reason = "the environment | cannot be made"
        else:
            for number in range(3):
                rate = RATES[contestant.name] * (1.0 + 0.1 * number)
                outcome = Outcome(1 / rate, [12.0 + number], {"q": "four"})
                entry.outcomes.append(outcome)
                entry.runs.append({"round": number + 1} | describe_load(outcome))
            entry.tuning = [
                {"variant": entry.variant.name, "concurrency": 8}
                | describe_load(outcome)
            ]
        rows.append(summarize(entry, questions, {"litserve": "0.2"}))
    provenance = result["provenance"]
    return {
        "format_version": 1,
        "kind": "peers",
        "provenance": provenance | {"data": "questions.json", "questions": 1},
        "checkpoint": "acme/reader",
        "build_id": "b" * 64,
        "rules": {
            "rounds": 3,
            "tuning_questions": 1,
            "warm_up_questions": 1,
            "cores": [0, 1],
            "pinning": "taskset --cpu-list 1",
        },
        "contestants": rows,
        "remarks": ["the machine was busy"],
        "problems": ["transformers not run: the environment cannot be made"],
    }


def test_rows_that_are_not_won_stay(peers: dict[str, Any]) -> None:
    """Who is faster than int8qa, and who did not run, is in the table."""
    rows = {row[0]: row for row in tabulate_peers(peers)["rows"]}
    assert len(rows) == 6
    lit = next(row for title, row in rows.items() if title.startswith("LitServe"))
    assert lit[2] == "198"
    assert lit[-1] == "0.50×"
    failed = next(row for title, row in rows.items() if title.startswith("transfor"))
    assert failed[2] == "not run: the environment | cannot be made"
    assert {len(row) for row in rows.values()} == {7}


def test_verdict(peers: dict[str, Any]) -> None:
    """Share of the ceiling by precision, ratio to each peer that ran."""
    verdict = write_peers_verdict(peers)
    for part in (
        "90 % of the engine alone in INT8",
        "94 % of the engine alone in FP16",
        "1.91× int8qa FP16",
        "2.00× triton",
        "0.50× litserve",
        "INT8 engine alone answers 1.60× as many as the stock graph.",
    ):
        assert part in verdict
    assert "transformers" not in verdict
    assert "× stock" not in verdict
    peers["contestants"] = []
    assert "not both measured" in write_peers_verdict(peers)


def test_page(peers: dict[str, Any], tmp_path: Path) -> None:
    """A figure that plotly takes, doubts, tuning and rounds; nothing from elsewhere."""
    data, page = write_files(peers, tmp_path, "peers", render_peers)
    assert json.loads(data.read_text(encoding="utf-8")) == peers
    text = page.read_text(encoding="utf-8")
    assert "src=" not in text.partition("<script")[0]
    for fact in (
        "taskset --cpu-list 1",
        "cannot be made",
        "1 gateway worker",
        "litserve",
    ):
        assert fact in text
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL
    )
    assert found is not None
    (choice,) = json.loads(found[1])["speed"]["choices"]
    drawn = re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(choice["figure"]))
    plotly.graph_objects.Figure(json.loads(drawn))
    (bars,) = choice["figure"]["data"]
    assert len(bars["x"]) == len(bars["y"]) == len(RATES) - 1


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_table", BENCH / "generate_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_table(
    peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written between the marks; `--check` finds what was changed by hand."""
    script = load_script()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    path = tmp_path / "bench" / "results" / "peers.json"
    path.write_text(json.dumps(peers), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{script.BEGIN}\nold\n{script.END}\n\nb\n")
    monkeypatch.setattr("sys.argv", ["generate_table.py", "--check"])
    with pytest.raises(SystemExit, match="generate_table"):
        script.main(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate_table.py"])
    script.main(tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# a\n")
    assert text.endswith("\n\nb\n")
    assert "old" not in text
    assert "environment \\| cannot" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.split(r"(?<!\\)\|", line)) for line in table}
    assert len(table) == 2 + len(RATES)
    assert cells == {9}
    monkeypatch.setattr("sys.argv", ["generate_table.py", "--check"])
    script.main(tmp_path)
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="README"):
        script.main(tmp_path)


def test_results_that_are_kept() -> None:
    """What lies in `bench/results` makes a table, and names nobody's directories."""
    for path in (BENCH / "results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        kept = json.loads(text)
        assert kept["kind"] == "peers"
        assert kept["provenance"]["machine"]["processor"]
        assert write_markdown(kept).count("\n") > len(kept["contestants"])
        assert not re.search(r'"/(home|root|tmp|work|Users)/', text)


def test_command(
    peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table and provenance on standard output; who did not run is an error."""
    import typer

    asked: list[PeerOptions] = []

    def bench(options: PeerOptions, _: Any) -> dict[str, Any]:
        asked.append(options)
        return peers

    monkeypatch.setattr(peer_rounds, "bench_peers", bench)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    add_bench_commands(app)
    arguments = ("--peer", "litserve", "--limit", "5", "--rounds", "2")
    found = CliRunner().invoke(app, ["bench", "peers", *arguments, "--output", "out"])
    assert isinstance(found.exception, GatewayRequestError)
    assert "not everybody was measured: transformers" in str(found.exception)
    (options,) = asked
    assert (options.groups, options.limit, options.rounds) == (("litserve",), 5, 2)
    assert "LitServe" in found.stdout
    assert "Cores: services 0, 1; what loads them: taskset" in found.stdout
    assert json.loads(Path("out/peers.json").read_text())["kind"] == "peers"
    found = CliRunner().invoke(app, ["bench", "peers", "--json"])
    assert json.loads(found.stdout) == peers
