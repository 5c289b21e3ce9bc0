"""``int8qa train``: what it hands on, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from int8qa import cli
from int8qa.build.calibration import Calibrator
from int8qa.build.quantization import RECIPES
from int8qa.errors import CheckpointError
from int8qa.training import run as run_module
from int8qa.training.options import Distillation, FakeQuantization, TrainingOptions
from int8qa.training.run import TrainingOutcome
from tests.command_line import Run
from tests.training.runs import write_articles


def make_scores(name: str, *, split: bool = False) -> dict[str, Any]:
    return {
        "file": name,
        "precision": "float",
        "total": 100,
        "exact": 61.234,
        "f1": 72.345,
        "has_ans_f1": 80.5,
        "has_ans_total": 50 if split else 100,
        "no_ans_f1": 64.25 if split else None,
        "no_ans_total": 50 if split else 0,
    }


REPORT = {"scores": [make_scores("a.json"), make_scores("é.json", split=True)]}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainingOptions, str]]:
    """Nothing is trained; options and command are noted."""
    calls: list[tuple[TrainingOptions, str]] = []

    def fake(options: TrainingOptions, *, command: str) -> TrainingOutcome:
        calls.append((options, command))
        return TrainingOutcome(REPORT, finished_before=options.resume)

    monkeypatch.setattr(run_module, "train_reader", fake)
    return calls


def test_help(run: Run) -> None:
    """The help names every option, and every option says something."""
    code, out, err = run("train", "--help")
    assert (code, err) == (0, "")
    root: Any = typer.main.get_command(cli.app)
    options = [
        name
        for parameter in root.commands["train"].params
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]
    words = out.replace(",", " ").replace("/", " ").split()
    assert [name for name in options if name not in words] == []


def test_defaults(run: Run, seen: list[tuple[TrainingOptions, str]]) -> None:
    """Left out, the package's own defaults stand."""
    assert run("train", "--data", "a.json", "--output", "out")[0] == 0
    options, command = seen[0]
    assert options == TrainingOptions(data=(Path("a.json"),), output=Path("out"))
    assert command == "int8qa train --data a.json --output out"


def test_every_option(run: Run, seen: list[tuple[TrainingOptions, str]]) -> None:
    """Each reaches the run; the command for the card is quoted as typed."""
    arguments = (
        *("--data", "a.json", "--data", "b c.json", "--output", "out"),
        *("--checkpoint", "acme/x", "--revision", "v2"),
        *("--evaluation-data", "d.json", "--evaluation-data", "e.json"),
        *("--evaluation-limit", "7", "--limit", "9", "--epochs", "1.5"),
        *("--batch", "16", "--learning-rate", "1e-5", "--layer-decay", "0.8"),
        *("--weight-decay", "0.1", "--warmup", "0.2", "--dropout", "0.3"),
        *("--seed", "4", "--keep-order", "--negatives", "0.25"),
        *("--max-window-tokens", "128", "--doc-stride", "32"),
        *("--precision", "bf16", "--dtype", "fp32", "--save-minutes", "1"),
        *("--resume", "--qat", "--recipe", "full", "--calibrator", "percentile-99.9"),
        *("--no-smooth", "--target", "tensorrt-rtx", "--distill-from", "self"),
        *("--temperature", "3", "--distill-weight", "0.5"),
    )
    assert run("train", *arguments)[0] == 0
    options, command = seen[0]
    assert options == TrainingOptions(
        data=(Path("a.json"), Path("b c.json")),
        output=Path("out"),
        checkpoint="acme/x",
        revision="v2",
        evaluation=(Path("d.json"), Path("e.json")),
        evaluation_limit=7,
        limit=9,
        epochs=1.5,
        batch=16,
        learning_rate=1e-5,
        layer_decay=0.8,
        weight_decay=0.1,
        warmup=0.2,
        dropout=0.3,
        seed=4,
        keep_order=True,
        negatives=0.25,
        max_window_tokens=128,
        doc_stride=32,
        precision="bf16",
        dtype="fp32",
        save_minutes=1.0,
        quantization=FakeQuantization(
            RECIPES["full"],
            Calibrator("percentile", 99.9),
            smooth=False,
            tensorrt=True,
        ),
        distillation=Distillation("self", temperature=3.0, weight=0.5),
        resume=True,
    )
    assert "'b c.json'" in command


def test_defaults_of_qat(run: Run, seen: list[tuple[TrainingOptions, str]]) -> None:
    """The build's recipe, calibrator and smoothing; a teacher only if named."""
    run("train", "--data", "a.json", "--output", "out", "--qat", "--target", "openvino")
    assert seen[0][0].quantization == FakeQuantization()
    assert seen[0][0].distillation is None
    run(
        "train", "--data", "a.json", "--output", "out", "--distill-from", "acme/teacher"
    )
    assert seen[1][0].distillation == Distillation("acme/teacher")
    assert seen[1][0].quantization is None


def test_what_is_printed(run: Run, seen: list[tuple[TrainingOptions, str]]) -> None:
    """Scores on standard output; what to do next on standard error."""
    code, out, err = run("train", "--data", "a.json", "--output", "my out")
    assert code == 0
    assert out.splitlines() == [
        "a.json, float: EM 61.23, F1 72.34 (100 questions)",
        (
            "é.json, float: EM 61.23, F1 72.34, HasAns F1 80.50, NoAns 64.25 "
            "(100 questions)"
        ),
    ]
    assert err == "my out is ready; next: int8qa build --checkpoint 'my out'\n"
    options = ("--qat", "--recipe", "full", "--target", "tensorrt", "--resume")
    _, _, err = run("train", "--data", "a.json", "--output", "out", *options)
    assert err == (
        "out was finished already; next: int8qa build --checkpoint out --recipe full "
        "--target tensorrt\n"
    )


def test_json(run: Run, seen: list[tuple[TrainingOptions, str]]) -> None:
    """The report and nothing else, names beyond ASCII readable."""
    code, out, err = run("train", "--data", "a.json", "--output", "out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == REPORT
    assert "é.json" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--recipe", "full"), ("--recipe", "needs --qat")),
        (("--calibrator", "max"), ("--calibrator", "needs --qat")),
        (("--no-smooth",), ("--smooth", "needs --qat")),
        (("--target", "tensorrt"), ("--target", "needs --qat")),
        (("--temperature", "2"), ("--distill-from", "need it")),
        (("--distill-weight", "1"), ("--distill-from", "need it")),
        (("--qat", "--calibrator", "best"), ("--calibrator", "'best'", "search")),
        (("--precision", "int8"), ("--precision", "bf16")),
        (("--limit", "0"), ("--limit", "1")),
    ],
)
def test_usage(
    run: Run,
    seen: list[tuple[TrainingOptions, str]],
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    """Options that do not go together end with 64, before anything is read."""
    code, out, err = run("train", "--data", "a.json", "--output", "out", *arguments)
    assert (code, out, seen) == (64, "", [])
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--data", "absent.json", "--output", "out"), 66, "no such file: absent.json"),
        (("--data", "a.json", "--output", "a.json"), 73, "a.json is a file"),
        (
            ("--data", "a.json", "--output", "out", "--epochs", "0"),
            78,
            "--epochs is 0; allowed",
        ),
        (
            ("--data", "a.json", "--output", "out", "--checkpoint", "./absent"),
            66,
            "no such checkpoint directory: ./absent",
        ),
    ],
)
def test_refusals(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, part: str
) -> None:
    """One line on standard error, and the code of its kind."""
    write_articles(tmp_path / "a.json")
    found, out, err = run("train", *arguments)
    assert (found, out) == (code, "")
    assert part in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_errors_of_a_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run raises is a line and a code; stopped by a signal it is 130."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_module, "train_reader", fail)
    error: BaseException = CheckpointError("it is no reader")
    assert run("train", "--data", "a.json", "--output", "out") == (
        cli.exit_code(CheckpointError("")),
        "",
        "int8qa: it is no reader\n",
    )
    error = KeyboardInterrupt()
    assert run("train", "--data", "a.json", "--output", "out")[0] == 130


def test_a_whole_run(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    """From files to files, by the command alone."""
    write_articles(tmp_path / "a.json")
    arguments = (
        *("--checkpoint", checkpoint, "--data", "a.json", "--output", "out"),
        *("--epochs", "1", "--precision", "fp32", "--json"),
    )
    code, out, err = run("train", *arguments)
    assert code == 0, err
    report = json.loads(out)
    assert report["command"].startswith("int8qa train --checkpoint")
    assert report["steps"] == 1
    assert report["scores"] == []
    assert "[3/3] train, 1 steps" in err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    code, out, err = run("train", *arguments)
    assert (code, out) == (73, "")
    assert "is not empty and holds no run to resume" in err
