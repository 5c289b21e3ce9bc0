"""`plan` as a user types it, on a repository of a contract, a tokenizer and no model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from int8qa.contract import Contract, ModelRecord, Precision
from int8qa.errors import DataFileError, MissingDependencyError
from int8qa.planning import commands, search
from int8qa.planning.commands import add_planning_commands
from int8qa.planning.cost_model import tabulate_costs
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.bench.conftest import make_run
from tests.bench.test_report import read_figures
from tests.gateway.fakes import TOKENIZER_JSON

RATE, BOUND_MS = 400.0, 90.0


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    add_planning_commands(app)
    app.command()(lambda: None)  # with a single command, Typer drops its name
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs; simulations are short."""
    monkeypatch.setattr(search, "WARM_UP", 50)
    monkeypatch.setattr(search, "COUNT", 400)
    monkeypatch.setattr("int8qa.planning.calibration.COUNT", 400)
    path = tmp_path / "model_repository"
    path.mkdir()
    shutil.copy(TOKENIZER_JSON, path / "tokenizer.json")
    contract = Contract(
        build_id="b1",
        checkpoint="acme/reader",
        tokenizer_sha256=ReaderTokenizer.from_file(TOKENIZER_JSON).fingerprint,
        pad_token_id=0,
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        max_window_tokens=384,
        sequence_buckets=(32, 64, 128, 384),
        batch_sizes=(1, 2, 4, 8),
        max_batch_tokens=1024,
        models={
            precision: ModelRecord(
                name=precision.model_name,
                engine="openvino",
                calibrator="none",
                recipe="none",
                f1=None,
                exact_match=None,
                size_bytes=1,
            )
            for precision in (Precision.INT8, Precision.FP16)
        },
    )
    contract.save(path)
    shapes = dict.fromkeys([(1, 32), (1, 128), (8, 128), (1, 384)], 1.0)
    latency = {
        f"{batch}x{length}": {
            name: {
                "p50_ms": slow * (0.8 + 0.02 * batch * length),
                "p99_ms": 9,
                "runs": 7,
            }
            for name, slow in (("int8", 1.0), ("fp16", 2.0))
        }
        for batch, length in tabulate_costs(shapes, contract).batch_s
    }
    write(
        tmp_path / "engine.json",
        "engine",
        build_id="b1",
        provenance={"machine": {"processor": "Abacus 9000", "cores": 2}},
        latency=latency,
    )
    return path


def write(path: Path, kind: str, **values: Any) -> None:
    path.write_text(json.dumps({"format_version": 1, "kind": kind} | values))


def write_gateway(
    path: Path, questions: Path, *, build_id: str = "b1", processor: str = "Abacus 9000"
) -> None:
    """A gateway that was measured; the engine's times stand for its own."""
    runs = [
        make_run("SingleStream", "int8", latency_ms={"mean": 6.0, "p50": 5.0}),
        make_run("Offline", "int8", throughput_qps=300.0),
        *(
            make_run("Server", "int8", target_qps=rate, queries=400, latency_ms=latency)
            for rate, latency in (
                (60.0, {"p50": 6.0, "p99": 12.0}),
                (9000.0, {"p50": 900.0, "p99": 2000.0}),
            )
        ),
    ]
    write(
        path,
        "gateway",
        gateway={"build_id": build_id},
        provenance={
            "data": questions.name,
            "questions": 9,
            "machine": {"processor": processor, "cores": 2},
        },
        rules={"concurrency": 32},
        runs=runs,
    )


def plan(repository: Path, questions: Path, *more: str) -> Result:
    return invoke(
        *("--rate", f"{RATE}", "--p99", f"{BOUND_MS}ms"),
        *("--model-repository", f"{repository}", "--traffic", f"{questions}"),
        *("--bench", f"{repository.parent / 'engine.json'}", *more),
    )


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """Nine questions of one short window each."""
    paragraphs = [
        {
            "context": f"The key to room {n} hangs behind the bar. "
            * (1 + 3 * (n % 3)),
            "qas": [
                {
                    "id": f"q{n}",
                    "question": f"Where is the key to room {n}?",
                    "answers": [{"text": "The key", "answer_start": 0}],
                }
            ],
        }
        for n in range(9)
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def test_plan_and_page(repository: Path, question_file: Path, tmp_path: Path) -> None:
    """The answer first; then what is measured, assumed, predicted and how well."""
    gateway, output = tmp_path / "gateway.json", tmp_path / "out"
    write_gateway(gateway, question_file)
    found = plan(
        repository,
        question_file,
        *("--bench", f"{gateway}", "--validate", f"{gateway}"),
        *("--price-per-hour", "0.36", "--output", f"{output}"),
    )
    assert found.exit_code == 0, found.output
    result = json.loads((output / "plan.json").read_text())
    int8, fp16 = (result["precisions"][name] for name in ("int8", "fp16"))
    replicas = int8["plan"]["replicas"]
    assert 1 <= replicas <= fp16["plan"]["replicas"]
    assert int8["cost_per_million"] == pytest.approx(
        replicas * 0.36 / 3600 / RATE * 1e6
    )
    assert int8["gateway_cores"] == pytest.approx(0.9e-3 * RATE)
    assert int8["overheads"]["request_s"]["source"] == "measured"
    assert fp16["overheads"]["request_s"]["source"] == "assumed"
    assert result["traffic"]["questions"] == 9
    good, hopeless = result["validation"]
    assert good["p99"]["measured_ms"] == 12.0
    assert "saturated" in hopeless["skipped"]
    for text in (
        f"400 questions/s with p99 ≤ 90 ms takes {replicas} replicas in INT8 (",
        "questions.json",
        "assumed",
        "Held against 1 Server tests",
        "Kingman",
    ):
        assert text in found.stdout
    page = (output / "plan.html").read_text()
    assert "src=" not in page.partition("<script")[0]
    for text in ("p99 measured", "saturated", "Kingman", "Abacus 9000", "assumed"):
        assert text in page
    figures = read_figures(page)
    fleet, cost = figures["fleet"]["choices"]
    assert [line["name"] for line in fleet["figure"]["data"]] == [
        "INT8",
        "INT8, extrapolated",
        "FP16",
        "FP16, extrapolated",
    ]
    assert [row[0] for row in fleet["rows"]] == [
        "10",
        "100",
        "1,000",
        "10,000",
        "100,000",
    ]
    assert fleet["rows"][0][1] == "1"
    assert fleet["rows"][-1][1].startswith("~")
    assert cost["label"] == "Cost of a million questions"
    assert set(re.findall(r"var\((--[\w-]+)\)", json.dumps(figures))) <= set(
        re.findall(r"(--[\w-]+):", page)
    )


def test_json_alone(repository: Path, question_file: Path) -> None:
    """On standard output; nothing is written; the curve never falls."""
    before = set(repository.parent.iterdir())
    found = plan(repository, question_file, "--json", "--precision", "int8")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert list(result["precisions"]) == ["int8"]
    assert result["validation"] == []
    curve = [point["precisions"]["int8"]["replicas"] for point in result["curve"]]
    assert curve == sorted(curve)
    assert result["curve"][-1]["rate_qps"] == 1e5
    assert set(repository.parent.iterdir()) == before


def test_unreachable_bound(repository: Path, question_file: Path) -> None:
    """It says so, and how long a lone question takes; the page has no curve."""
    found = invoke(
        *("--rate", "5", "--p99", "0.001s", "--precision", "int8"),
        *("--model-repository", f"{repository}", "--traffic", f"{question_file}"),
        *("--bench", f"{repository.parent / 'engine.json'}"),
        *("--output", f"{repository.parent / 'out'}"),
    )
    assert found.exit_code == 0, found.output
    assert "No number of INT8 does" in found.stdout
    page = (repository.parent / "out" / "plan.html").read_text()
    assert "No number of replicas keeps to the bound." in page


def test_files_that_do_not_fit_are_remarked(
    repository: Path, question_file: Path, tmp_path: Path
) -> None:
    """Another build, questions, machine: a plan all the same, with its doubts."""
    gateway = tmp_path / "gateway.json"
    write_gateway(
        gateway, tmp_path / "others.json", build_id="b0", processor="Abacus 1"
    )
    found = plan(
        repository,
        question_file,
        *("--bench", f"{gateway}", "--precision", "int8"),
    )
    assert found.exit_code == 0, found.output
    assert "remark: the gateway's tests are of build b0" in found.stderr
    assert "remark: a gateway was measured with others.json" in found.stderr
    assert "measured on Abacus 1, 2 cores, the engines on Abacus 9000" in found.stderr


def test_one_result_of_a_kind(repository: Path, question_file: Path) -> None:
    """Two engine results could only contradict each other."""
    engine = repository.parent / "engine.json"
    found = plan(repository, question_file, "--bench", f"{engine}")
    assert isinstance(found.exception, DataFileError)
    assert "2 results of `int8qa bench engine`" in str(found.exception)


def test_precision_without_times(repository: Path, question_file: Path) -> None:
    """Named, with what was timed."""
    found = plan(repository, question_file, "--precision", "fp32")
    assert isinstance(found.exception, DataFileError)
    assert "timed int8, fp16, not fp32" in str(found.exception)


@pytest.mark.parametrize("text", ["100", "0ms", "-5ms", "1 minute"])
def test_durations_have_units(text: str) -> None:
    """A bare number could be either."""
    found = invoke("--rate", "1", f"--p99={text}")
    assert found.exit_code == 2
    assert "no duration such as 100ms" in found.output


def test_without_simpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is read, with what to install."""
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda _: None)
    found = invoke("--rate", "1", "--p99", "1s")
    assert isinstance(found.exception, MissingDependencyError)
    assert "pip install simpy" in str(found.exception)
