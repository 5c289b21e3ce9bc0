"""The whole build on a tiny checkpoint: what it writes, and when it writes again."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from int8qa.build import pipeline
from int8qa.build.calibration import Calibrator
from int8qa.build.parity import COMPILE, EXPORT, HALF
from int8qa.build.pipeline import (
    BuildOptions,
    BuildOutcome,
    build_repository,
    is_demo,
    questions_file,
)
from int8qa.build.report import BuildProgress
from int8qa.build.repository import find_current
from int8qa.build.triton_config import parse_config
from int8qa.contract import Precision, load_contract
from int8qa.errors import (
    AccuracyGateError,
    BuildError,
    CheckpointError,
    DataFileError,
    ParityError,
)
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.build.tiny import CALIBRATION, EVALUATION, POSITIONS, write_squad


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def build(options: BuildOptions, console: Console | None = None) -> BuildOutcome:
    progress = BuildProgress(stages=11, console=console or make_console())
    return build_repository(options, progress)


def modification_times(repository: Path) -> dict[str, int]:
    return {
        str(path.relative_to(repository)): path.stat().st_mtime_ns
        for path in sorted(repository.rglob("*"))
        if path.is_file()
    }


@dataclasses.dataclass(frozen=True)
class Built:
    options: BuildOptions
    outcome: BuildOutcome
    lines: list[str]


@pytest.fixture(scope="module")
def built(
    tiny_checkpoints: dict[str, Path],
    question_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """A repository of the tiny BERT, built once; leave it as it is."""
    calibration, evaluation = question_files
    options = BuildOptions(
        model_repository=tmp_path_factory.mktemp("built") / "models",
        checkpoint=str(tiny_checkpoints["bert"]),
        calibration_data=calibration,
        evaluation_data=evaluation,
        gate=0.0,
    )
    console = make_console()
    outcome = build(options, console)
    assert isinstance(console.file, io.StringIO)
    return Built(options, outcome, console.file.getvalue().splitlines())


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the engines at one small shape, where the times do not matter."""
    monkeypatch.setattr(pipeline, "LATENCY_SHAPES", ((1, 32),))


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts to build is told apart from whoever finds it current."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a build was started")

    monkeypatch.setattr(pipeline._Build, "run", refuse)


def test_manifest(built: Built) -> None:
    """The manifest names inputs, counts, accuracy, times and the verdict."""
    manifest = built.outcome.manifest
    stored = json.loads((built.options.model_repository / "manifest.json").read_text())
    assert {key: stored[key] for key in manifest} == json.loads(json.dumps(manifest))
    assert manifest["checkpoint"]["name"] == "tiny-bert"
    assert manifest["recipe"] == "linear"
    assert manifest["calibrator"] == "percentile-99.999"
    assert manifest["calibration_questions"] == 3
    assert manifest["evaluation_questions"] == 2
    deviations = manifest["max_logit_deviation"]
    assert list(deviations) == [r.conversion for r in (EXPORT, COMPILE, HALF)]
    for rule in (EXPORT, COMPILE):
        # Two implementations never agree to the last bit: 0 would be a self-comparison.
        assert 0 < deviations[rule.conversion] <= rule.tolerance
    assert manifest["demo"] is False
    assert manifest["census"]["quantized_matmuls"] == 12
    assert len(manifest["activation_amax"]) == 12
    assert list(manifest["models"]) == ["int8", "fp16", "fp32"]
    for name, model in manifest["models"].items():
        assert model.keys() == {"accuracy", "execution", "gemms", "size_bytes"}
        assert model["accuracy"]["questions"] == 2
        assert model["execution"]
        if name == "int8":
            assert model["gemms"]["i8"] >= 12
    # 384 tokens are more than this checkpoint reads.
    assert list(manifest["latency_ms"]) == ["1x128", f"1x{POSITIONS}", "8x128"]
    assert manifest["recommended"] in {"int8", "fp16", "fp32"}
    assert manifest["verdict"].startswith("Verdict: ")
    assert manifest["inputs"]["versions"].keys() >= {"torch", "openvino", "int8qa"}


def test_contract(built: Built) -> None:
    """The contract is the gateway's side of the manifest."""
    repository = built.options.model_repository
    contract = load_contract(repository)
    assert contract == built.outcome.contract
    assert contract.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert contract.max_window_tokens == POSITIONS
    assert contract.sequence_buckets == tuple(range(32, POSITIONS + 1, 32))
    tokenizer = ReaderTokenizer.from_file(repository / "tokenizer.json")
    assert contract.tokenizer_sha256 == tokenizer.fingerprint
    assert contract.models.keys() == set(Precision)
    int8, fp32 = contract.models[Precision.INT8], contract.models[Precision.FP32]
    assert (int8.calibrator, int8.recipe) == ("percentile-99.999", "linear")
    assert (fp32.calibrator, fp32.recipe) == ("none", "none")
    assert contract.verdict == built.outcome.manifest["verdict"]


def test_files(built: Built) -> None:
    """Three models Triton can load, and nothing else; sizes are the files'."""
    repository = built.options.model_repository
    files = modification_times(repository)
    assert files.keys() == {
        *("contract.json", "manifest.json", "tokenizer.json"),
        *(
            f"{precision.model_name}/{name}"
            for precision in Precision
            for name in ("config.pbtxt", "1/model.py", "1/model.xml", "1/model.bin")
        ),
    }
    for precision in Precision:
        text = (repository / precision.model_name / "config.pbtxt").read_text()
        config = parse_config(text)
        assert config.name == precision.model_name
        size = sum(
            (repository / precision.model_name / "1" / name).stat().st_size
            for name in ("model.xml", "model.bin")
        )
        assert built.outcome.contract.models[precision].size_bytes == size
    assert [path.name for path in repository.parent.iterdir()] == [repository.name]


def test_every_stage_is_shown(built: Built) -> None:
    """The number of stages promised is the number shown."""
    labels = [line.split()[0] for line in built.lines if line.startswith("[")]
    assert set(labels) == {f"[{n}/11]" for n in range(1, 12)}


@pytest.mark.usefixtures("no_build")
def test_second_build_is_a_cache_hit(built: Built) -> None:
    """The same options on the same machine touch no file."""
    before = modification_times(built.options.model_repository)
    outcome = build(built.options)
    assert outcome.cached
    assert outcome.contract == built.outcome.contract
    assert outcome.manifest["build_id"] == built.outcome.manifest["build_id"]
    assert modification_times(built.options.model_repository) == before


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    "change",
    [
        {"force": True},
        {"calibrator": Calibrator("max")},
        {"calibrator": Calibrator("percentile", 99.9999)},
        {"calibrator": Calibrator("percentile", 99.9999999)},
        {"calibration_limit": 1},
        {"evaluation_limit": 1},
        {"gate": 0.5},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_changed_option_rebuilds(built: Built, change: dict[str, Any]) -> None:
    """Every option that shapes the outcome is part of its identity."""
    with pytest.raises(AssertionError, match="a build was started"):
        build(dataclasses.replace(built.options, **change))


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize("split", ["calibration_data", "evaluation_data"])
def test_changed_questions_rebuild(built: Built, tmp_path: Path, split: str) -> None:
    """Questions count by their content: a copy is the same, an edit is not."""
    source: Path = getattr(built.options, split)
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    options = dataclasses.replace(built.options, **{split: copy})
    assert build(options).cached
    copy.write_bytes(source.read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="a build was started"):
        build(options)


@pytest.mark.usefixtures("one_shape")
def test_force_rebuilds(
    tiny_checkpoints: dict[str, Path],
    question_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """A model without token types, twice: the same identity, files written anew."""
    calibration, evaluation = question_files
    options = BuildOptions(
        model_repository=tmp_path / "models",
        checkpoint=str(tiny_checkpoints["distilbert"]),
        calibrator=Calibrator("max"),
        calibration_data=calibration,
        evaluation_data=evaluation,
        gate=0.0,
    )
    first = build(options)
    assert first.contract.inputs == ("input_ids", "attention_mask")
    before = modification_times(options.model_repository)
    second = build(dataclasses.replace(options, force=True))
    assert not second.cached
    assert second.contract.build_id == first.contract.build_id
    after = modification_times(options.model_repository)
    assert after.keys() == before.keys()
    assert all(after[name] > before[name] for name in before)
    # The same numbers, too: nothing in a build is left to chance but the clock, and
    # the running numbers in OpenVINO's names of constants.
    for precision in Precision:
        left, right = (
            outcome.manifest["models"][str(precision)] for outcome in (first, second)
        )
        assert left["accuracy"] == right["accuracy"]
        assert left["gemms"] == right["gemms"]


@pytest.mark.usefixtures("one_shape")
def test_gate_leaves_the_target_as_it_was(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that loses too much publishes nothing."""
    before = modification_times(built.options.model_repository)

    def refuse(int8: Any, *, gate: float) -> None:
        raise AccuracyGateError(f"{gate}")

    monkeypatch.setattr(pipeline, "check_gate", refuse)
    with pytest.raises(AccuracyGateError, match=r"0\.25"):
        build(dataclasses.replace(built.options, gate=0.25))
    assert modification_times(built.options.model_repository) == before


@pytest.mark.parametrize("rule", ["EXPORT", "COMPILE"])
def test_unfaithful_conversion(
    built: Built, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """An export or a compilation that deviates from torch publishes nothing."""
    strict = dataclasses.replace(getattr(pipeline, rule), tolerance=-1.0)
    monkeypatch.setattr(pipeline, rule, strict)
    with pytest.raises(ParityError, match=strict.conversion):
        build(dataclasses.replace(built.options, force=True))
    assert find_current(built.options.model_repository, built.outcome.contract.build_id)


def test_overlapping_questions(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Questions in both files are counted and refused, whatever their ids."""
    options = BuildOptions(
        model_repository=tmp_path / "models",
        checkpoint=str(tiny_checkpoints["bert"]),
        calibration_data=write_squad(tmp_path / "a.json", CALIBRATION),
        evaluation_data=write_squad(tmp_path / "b.json", (*EVALUATION, CALIBRATION[1])),
    )
    with pytest.raises(DataFileError, match="1 questions are in both"):
        build(options)
    assert not options.model_repository.exists()


def test_only_impossible_questions(built: Built, tmp_path: Path) -> None:
    """Nothing can be measured on questions without answers."""
    document = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "A mill.",
                        "qas": [
                            {
                                "id": "1",
                                "question": "Who?",
                                "answers": [],
                                "is_impossible": True,
                            }
                        ],
                    }
                ]
            }
        ]
    }
    path = tmp_path / "impossible.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataFileError, match="has no answerable question"):
        build(dataclasses.replace(built.options, evaluation_data=path))


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"recipe": "cubic"}, BuildError, "unknown recipe cubic; known are linear"),
        ({"gate": 1.5}, BuildError, "the gate is 1.5; allowed: 0"),
        ({"gate": float("nan")}, BuildError, "the gate is nan"),
        ({"calibration_data": Path("none.json")}, DataFileError, "no such file"),
        ({"evaluation_data": Path()}, DataFileError, "no such file"),
        ({"checkpoint": "./none"}, CheckpointError, "no such checkpoint directory"),
    ],
)
def test_options_are_checked_first(
    built: Built, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """A slip in the options is found before any work is done."""
    with pytest.raises(kind, match=message):
        build(dataclasses.replace(built.options, **change))


def test_checkpoint_that_reads_too_little(
    copied_checkpoint: Path, built: Built
) -> None:
    """A model of fewer positions than the smallest bucket cannot be served."""
    from safetensors.torch import load_file, save_file

    path = copied_checkpoint / "model.safetensors"
    weights = load_file(path)
    key = "bert.embeddings.position_embeddings.weight"
    weights[key] = weights[key][:16].clone()
    save_file(weights, path, metadata={"format": "pt"})
    config = copied_checkpoint / "config.json"
    text = config.read_text().replace(f": {POSITIONS},", ": 16,")
    config.write_text(text)
    options = dataclasses.replace(built.options, checkpoint=str(copied_checkpoint))
    with pytest.raises(CheckpointError, match="reads at most 16 tokens"):
        build(options)


def test_demo_is_what_nobody_chose_anything_for(tmp_path: Path) -> None:
    """Any choice but place and force makes a repository its owner's."""
    plain = BuildOptions(model_repository=tmp_path, force=True)
    assert plain.is_default
    others: dict[str, Any] = {
        "checkpoint": "acme/reader",
        "calibrator": pipeline.Calibrator("max"),
        "smooth": False,
        "calibration_limit": 10,
        "calibration_data": tmp_path / "mine.json",
        "evaluation_data": tmp_path / "mine.json",
        "gate": 0.5,
    }
    for name, value in others.items():
        assert not dataclasses.replace(plain, **{name: value}).is_default, name


@pytest.mark.parametrize(
    ("manifest", "demo"),
    [
        ({"demo": True, "inputs": {"recipe": "of a former version"}}, True),
        ({"demo": False}, False),
        ({"demo": "yes"}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_demo_is_known_by_its_mark(tmp_path: Path, manifest: Any, demo: bool) -> None:
    """The mark counts, whatever version built it; without one it is an owner's."""
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert is_demo(tmp_path) is demo


def test_own_questions_are_default() -> None:
    """The defaults are the project's questions, told apart from a user's file."""
    options = BuildOptions()
    assert options.calibration_data == questions_file("calibration")
    assert pipeline._data_name(options.evaluation_data, "evaluation") == "own"
    # The evaluation file as calibration data is a choice, not the default.
    assert pipeline._data_name(options.evaluation_data, "calibration") != "own"
