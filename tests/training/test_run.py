"""Whole runs of a tiny BERT: what is learned, what is written, what a break costs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.build.quantization import RECIPES, quantizers_by_name
from int8qa.build.stored_ranges import RANGES_FILENAME, read_ranges
from int8qa.errors import (
    BuildError,
    CheckpointError,
    ConfigurationError,
    DataFileError,
    RepositoryError,
)
from int8qa.training import run as run_module
from int8qa.training.options import Distillation, FakeQuantization, TrainingOptions
from int8qa.training.run import TrainingOutcome
from int8qa.training.workspace import REPORT_FILENAME
from tests.training.runs import (
    HELD_OUT,
    KilledError,
    deliver,
    kill_at,
    make_options,
    train,
    write_articles,
)

WEIGHTS = "model.safetensors"
FULL = FakeQuantization(RECIPES["full"], Calibrator("max"))
QAT = {
    "quantization": FULL,
    "distillation": Distillation(weight=0.5),
    "learning_rate": 2e-4,
}
"""All that a run can have: quantizers, SmoothQuant, a teacher; dropout besides."""


def same_files(left: Path, right: Path, *names: str) -> bool:
    return all((left / n).read_bytes() == (right / n).read_bytes() for n in names)


@dataclasses.dataclass(frozen=True)
class Finished:
    options: TrainingOptions
    outcome: TrainingOutcome
    lines: list[str]

    @property
    def report(self) -> dict[str, Any]:
        return self.outcome.report

    @property
    def output(self) -> Path:
        return self.options.output


def finish(options: TrainingOptions) -> Finished:
    console = Console(file=io.StringIO(), width=200)
    outcome = train(options, console=console)
    assert isinstance(console.file, io.StringIO)
    return Finished(options, outcome, console.file.getvalue().splitlines())


@pytest.fixture(scope="module")
def learned(
    encoder: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A bare encoder, trained to know eight questions by heart, in fp16."""
    root = tmp_path_factory.mktemp("learned")
    again = write_articles(root / "again.json", HELD_OUT)
    return finish(
        make_options(
            encoder,
            questions,
            root / "out",
            epochs=30.0,
            learning_rate=3e-3,
            dropout=0.0,
            dtype="fp16",
            evaluation=(again,),
            save_minutes=10.0,
        )
    )


@pytest.fixture(scope="module")
def quantized(
    checkpoint: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Six steps of QAT with distillation and dropout, never interrupted."""
    root = tmp_path_factory.mktemp("quantized")
    held_out = write_articles(root / "held-out.json", HELD_OUT)
    return finish(
        make_options(
            checkpoint,
            questions,
            root / "out",
            dropout=0.1,
            evaluation=(held_out,),
            **QAT,
        )
    )


def test_loss_falls(learned: Finished) -> None:
    """Eight questions are soon known by heart."""
    losses = [loss for _, loss in learned.report["losses"]]
    assert [step for step, _ in learned.report["losses"]] == [10, 20, 30, 40, 50, 60]
    assert losses[-1] < 0.3 * losses[0]


def test_checkpoint_is_one_for_the_build(learned: Finished) -> None:
    """Plain fp16 weights with a head, config, tokenizer, card and report; no more."""
    assert {path.name for path in learned.output.iterdir()} == {
        *("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
        *("README.md", REPORT_FILENAME),
    }
    weights = load_file(learned.output / WEIGHTS)
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float16"}
    assert "qa_outputs.weight" in weights
    loaded = load_checkpoint(resolve_checkpoint(str(learned.output)))
    assert not quantizers_by_name(loaded.model)


def test_report_and_card(learned: Finished) -> None:
    """Both say what happened; the report on disk is the one returned."""
    report = learned.report
    path = learned.output / REPORT_FILENAME
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert report["steps"] == 60
    assert report["start"]["name"] == "tiny-encoder"
    assert report["start"]["fresh_head"] is True
    (count,) = report["data"]
    assert (count["questions"], count["windows"], count["skipped"]) == (8, 8, 0)
    (scores,) = report["scores"]
    assert (scores["file"], scores["precision"]) == ("again.json", "float")
    assert scores["total"] == 2
    card = (learned.output / "README.md").read_text()
    assert "its question answering head is new" in card
    assert f"{report['losses'][-1][1]:.3f} at step 60" in card
    assert report["weights_sha256"] in path.read_text()


def test_progress(learned: Finished) -> None:
    """A line a stage, numbered to the end."""
    stages = [line for line in learned.lines if line.startswith("[")]
    titles = [line.partition("] ")[2].split(":")[0] for line in stages]
    assert list(dict.fromkeys(titles)) == [
        "load the checkpoint",
        "read the questions",
        "train, 60 steps",
        "measure float on again.json",
    ]
    assert stages[-1].startswith("[4/4]")


def test_fake_quantization_is_trained_with(
    checkpoint: Path, questions: Path, tmp_path: Path, readers: list[Any]
) -> None:
    """Every tensor of the recipe is rounded in the steps; others are not."""
    seen: list[set[str]] = []

    def look(_step: int) -> None:
        quantizers = quantizers_by_name(readers[0].model)
        on = {name for name, quantizer in quantizers.items() if quantizer.is_enabled}
        assert readers[0].training
        assert all(quantizers[name].amax is not None for name in on)
        seen.append(on)

    train(
        make_options(checkpoint, questions, tmp_path / "out", epochs=1.0, **QAT), look
    )
    stored = read_ranges(tmp_path / "out")
    assert stored is not None
    assert seen == [set(stored.grids)] * 2
    assert any("p_bmm_quantizer" in name for name in seen[0])


def test_qat_writes_plain_weights_and_ranges(
    quantized: Finished, checkpoint: Path
) -> None:
    """The weights are trained, under their old names; the ranges lie beside them."""
    before, after = (
        load_file(directory / WEIGHTS) for directory in (checkpoint, quantized.output)
    )
    assert before.keys() == after.keys()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not before[name].equal(after[name])
    # A few steps at a small rate: still the same model, so the scales were taken back.
    assert (before[name] - after[name]).abs().max() < 0.01
    stored = read_ranges(quantized.output)
    assert stored is not None
    assert (stored.recipe, stored.calibrator) == ("full", "max")
    assert stored.scales
    assert quantized.report["quantized_tensors"] == len(stored.grids)


def test_qat_is_measured_twice(quantized: Finished) -> None:
    """In float, and with the rounding it was trained with."""
    precisions = [scores["precision"] for scores in quantized.report["scores"]]
    assert precisions == ["float", "int8"]
    assert quantized.report["teacher"]["name"] == "tiny-bert"
    assert (
        "Trained with INT8's rounding" in (quantized.output / "README.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4])
def test_killed_qat_ends_the_same(
    quantized: Finished, tmp_path: Path, step: int
) -> None:
    """KilledError before there was a checkpoint, or after, and resumed: the same bits."""
    options = dataclasses.replace(quantized.options, output=tmp_path / "out")
    with pytest.raises(KilledError):
        train(options, kill_at(step))
    assert not (tmp_path / "out" / WEIGHTS).exists()
    report = train(dataclasses.replace(options, resume=True)).report
    assert same_files(options.output, quantized.output, WEIGHTS, RANGES_FILENAME)
    assert report["resumed"] == 1
    assert report["steps"] == 6
    assert report["scores"] == quantized.report["scores"]
    assert "resumed 1 times" in (options.output / "README.md").read_text()


@pytest.mark.slow
def test_killed_many_times(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    """A run that is killed after each step ends as one that never was."""
    whole = make_options(checkpoint, questions, tmp_path / "whole", negatives=0.5)
    expected = train(whole).report
    options = dataclasses.replace(whole, output=tmp_path / "out", resume=True)
    for step in range(2, expected["steps"] + 1, 2):
        with pytest.raises(KilledError):
            train(options, kill_at(step))
    report = train(options).report
    assert same_files(options.output, whole.output, WEIGHTS)
    assert report["losses"] == expected["losses"]
    assert report["resumed"] == expected["steps"] // 2


@pytest.mark.slow
def test_sigkill(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    """A process that the kernel ends leaves what another goes on from, exactly."""
    whole = make_options(checkpoint, questions, tmp_path / "whole")
    train(whole)
    script = """
        import os, signal, sys
        from pathlib import Path
        from tests.training.runs import make_options, train
        def on_step(done):
            if done == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        train(make_options(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])), on_step)
    """
    output = tmp_path / "out"
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), checkpoint, questions, output],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr.decode()
    names = {path.name for path in (output / ".training").iterdir()}
    assert "checkpoint-3" in names
    report = train(dataclasses.replace(whole, output=output, resume=True)).report
    assert report["resumed"] == 1
    assert same_files(output, whole.output, WEIGHTS)


@pytest.mark.slow
def test_half_written_checkpoint(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    """What was being written when the machine ended is not gone on from."""
    options = make_options(checkpoint, questions, tmp_path / "out")
    with pytest.raises(KilledError):
        train(options, kill_at(4))
    partial = options.output / ".training" / "partial" / "checkpoint-4"
    partial.mkdir(parents=True)
    (partial / "optimizer.pt").write_bytes(b"half")
    whole = dataclasses.replace(options, output=tmp_path / "whole")
    train(whole)
    train(dataclasses.replace(options, resume=True))
    assert same_files(options.output, whole.output, WEIGHTS)
    assert not (options.output / ".training").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_gently(
    checkpoint: Path, questions: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The step under way is kept, though no checkpoint was due, and one line says so."""
    options = make_options(checkpoint, questions, tmp_path / "out", save_minutes=60.0)
    console = Console(file=io.StringIO(), width=200)

    def on_step(done: int) -> None:
        if done == 2:
            deliver(number)

    with pytest.raises(KeyboardInterrupt):
        train(options, on_step, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "stopped after step 2 of 6; the same command with --resume goes on" in text
    again = Console(file=io.StringIO(), width=200)
    train(dataclasses.replace(options, resume=True), console=again)
    assert isinstance(again.file, io.StringIO)
    assert "going on after step 2" in again.file.getvalue()


def test_finished_before(learned: Finished) -> None:
    """To resume what is finished does nothing and tells so; other options do not fit."""
    options = dataclasses.replace(learned.options, resume=True)
    before = (learned.output / REPORT_FILENAME).stat().st_mtime_ns
    outcome = train(options)
    assert outcome.finished_before
    assert outcome.report["steps"] == 60
    assert (learned.output / REPORT_FILENAME).stat().st_mtime_ns == before
    with pytest.raises(ConfigurationError, match=r"another epochs;"):
        train(dataclasses.replace(options, epochs=40.0))
    with pytest.raises(RepositoryError, match="is not empty"):
        train(learned.options)


def test_resumed_with_other_options(
    checkpoint: Path, questions: Path, encoder: Path, tmp_path: Path
) -> None:
    """A run goes on as it began, or not at all; the message names what differs."""
    options = make_options(checkpoint, questions, tmp_path / "out")
    with pytest.raises(KilledError):
        train(options, kill_at(2))
    with pytest.raises(RepositoryError, match=r"unfinished run; add --resume"):
        train(options)
    resumed = dataclasses.replace(options, resume=True)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1, "batch": 2}, "batch, seed"),
        ({"checkpoint": str(encoder)}, "checkpoint"),
        ({"data": (questions, questions)}, "data"),
        ({"quantization": FULL, "learning_rate": 1e-3}, "dropout, quantization"),
    ]
    for change, named in changes:
        with pytest.raises(ConfigurationError, match=f"another {named};"):
            train(dataclasses.replace(resumed, **change))
    # What does not change the outcome may change.
    train(dataclasses.replace(resumed, save_minutes=9.0, dtype="fp16"))


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The readers that are trained, once they are, to be looked into or spoiled."""
    made: list[Any] = []
    make = run_module._Run._make_trainer

    def watch(self: Any, reader: Any, *arguments: Any) -> Any:
        made.append(reader)
        return make(self, reader, *arguments)

    monkeypatch.setattr(run_module._Run, "_make_trainer", watch)
    return made


def test_diverged(
    checkpoint: Path, questions: Path, tmp_path: Path, readers: list[Any]
) -> None:
    """A loss that is no number ends the run at the next look at it, in one line."""
    options = make_options(checkpoint, questions, tmp_path / "out", epochs=20.0)

    def spoil(done: int) -> None:
        if done == 3:
            readers[0].model.qa_outputs.weight.data.fill_(float("nan"))

    with pytest.raises(BuildError, match=r"nan at step 10: the run has diverged"):
        train(options, spoil)
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_weights_too_large_for_fp16(
    checkpoint: Path, questions: Path, tmp_path: Path, readers: list[Any]
) -> None:
    """Weights that float16 cannot hold are not written as infinity."""

    def spoil(done: int) -> None:
        if done == 1:
            readers[0].model.qa_outputs.bias.data.fill_(1e6)

    options = make_options(
        checkpoint, questions, tmp_path / "out", epochs=0.5, dtype="fp16"
    )
    with pytest.raises(BuildError, match=r"not finite \(qa_outputs\.bias\)"):
        train(options, spoil)


def test_nothing_is_left_of_a_run_that_never_began(
    checkpoint: Path, encoder: Path, questions: Path, tmp_path: Path
) -> None:
    """What is wrong with data and checkpoint is found before the first step."""
    output = tmp_path / "out"
    options = make_options(checkpoint, questions, output)
    one = write_articles(tmp_path / "one.json", HELD_OUT)
    refusals: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"checkpoint": str(encoder), "quantization": FULL}, CheckpointError, "--qat"),
        ({"evaluation": (questions,)}, DataFileError, "8 questions of .* Split them"),
        ({"data": (one,), "negatives": 1.0}, DataFileError, "--negatives"),
    ]
    for change, error, message in refusals:
        with pytest.raises(error, match=message):
            train(dataclasses.replace(options, **change))
        assert not output.exists()


def test_other_peoples_files_stay(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    """A directory that holds anything else is never touched."""
    (tmp_path / "notes.txt").write_text("mine")
    options = make_options(checkpoint, questions, tmp_path)
    for resume in (False, True):
        with pytest.raises(RepositoryError, match="holds no run to resume"):
            train(dataclasses.replace(options, resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bf16(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    """Matrices in bf16 train the same float32 weights to nearby values."""
    outcomes = {}
    for precision in ("fp32", "bf16"):
        options = make_options(
            checkpoint, questions, tmp_path / precision, precision=precision
        )
        outcomes[precision] = train(options).report
        assert outcomes[precision]["precision"] == precision
    name = "bert.encoder.layer.0.output.dense.weight"
    found = [load_file(tmp_path / each / WEIGHTS)[name] for each in outcomes]
    assert not found[0].equal(found[1])
    assert (found[0] - found[1]).abs().max() < 0.02
