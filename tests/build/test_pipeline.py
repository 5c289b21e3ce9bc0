"""The whole build on a tiny checkpoint: what it writes, and when it writes again."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from int8qa.build import float_parts, latency, pipeline
from int8qa.build.accuracy import share_equal
from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.costs import tabulate_costs
from int8qa.build.engines.openvino import OpenVinoEngine
from int8qa.build.export import wrap_model
from int8qa.build.options import list_advice
from int8qa.build.parity import COMPILE, EXPORT, HALF
from int8qa.build.pipeline import (
    BuildOptions,
    BuildOutcome,
    build_repository,
    count_stages,
    is_demo,
)
from int8qa.build.quantization import RECIPES, Recipe, Rule
from int8qa.build.recipe_file import load_recipe
from int8qa.build.reference import run_torch
from int8qa.build.report import BuildProgress
from int8qa.build.repository import find_current
from int8qa.build.sites import TensorClass
from int8qa.build.subject import QuestionSources, load_subject
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
from tests.build.builds import change_options
from tests.build.tiny import (
    ARCHITECTURES,
    CALIBRATION,
    EVALUATION,
    POSITIONS,
    write_squad,
)


def make_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def build(options: BuildOptions, console: Console | None = None) -> BuildOutcome:
    progress = BuildProgress(count_stages(options), console=console or make_console())
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
        recipe=RECIPES["gemms"],
        sources=QuestionSources(calibration, evaluation),
        gate=0.0,
    )
    console = make_console()
    outcome = build(options, console)
    assert isinstance(console.file, io.StringIO)
    return Built(options, outcome, console.file.getvalue().splitlines())


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the engines at one small shape, where the times do not matter."""
    monkeypatch.setattr(latency, "LATENCY_SHAPES", ((1, 32),))
    monkeypatch.setattr(float_parts, "choose_hint", lambda _: "f32")


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
    assert manifest["manifest_version"] == 2
    recipe = manifest["recipe"]
    assert (recipe["name"], recipe["weights"]) == ("gemms", "per-channel")
    assert recipe["share_qkv"] is False
    assert {"subject": "qkv_input", "enable": True, "per_channel": None} in recipe[
        "rules"
    ]
    assert manifest["calibrator"] == "percentile-99.999"
    assert manifest["calibration_questions"] == 3
    assert manifest["calibration_windows"] == 3
    assert manifest["evaluation_questions"] == 2
    deviations = manifest["max_logit_deviation"]
    assert list(deviations) == [r.conversion for r in (EXPORT, COMPILE, HALF)]
    for rule in (EXPORT, COMPILE):
        # Two implementations never agree to the last bit: 0 would be a self-comparison.
        assert 0 < deviations[rule.conversion] <= rule.tolerance
    assert manifest["demo"] is False
    assert manifest["census"]["quantized_matmuls"] == 16
    by_class = manifest["census"]["by_class"]
    assert by_class["qkv_weight"] == {"sites": 6, "quantized": 6, "per_channel": 6}
    assert by_class["query"] == {"sites": 2, "quantized": 2, "per_channel": 0}
    assert by_class["ffn_residual"]["quantized"] == 0
    assert len(manifest["activation_amax"]) == 12 + 2 * 4
    assert len(manifest["smoothing_alpha"]) == 12
    assert manifest["mixed"] is None
    assert manifest["searched"] == {}
    assert list(manifest["models"]) == ["int8", "fp16", "fp32"]
    for name, model in manifest["models"].items():
        assert model.keys() == {
            "accuracy",
            "execution",
            "gemms",
            "attentions",
            "size_bytes",
        }
        assert model["accuracy"]["questions"] == 2
        assert 0 <= model["accuracy"]["agreement_fp16"] <= 1
        assert model["execution"]
        if name == "int8":
            assert model["gemms"].get("i8", 0) + model["gemms"].get("u8", 0) >= 12
    # 384 tokens are more than this checkpoint reads.
    assert list(manifest["latency_ms"]) == ["1x128", f"1x{POSITIONS}", "8x128"]
    for shape, row in manifest["latency"].items():
        assert row.keys() == {"int8", "fp16", "fp32"}
        for name, times in row.items():
            assert times["p50_ms"] == manifest["latency_ms"][shape][name]
            assert times["p99_ms"] >= times["p50_ms"] > 0
    assert manifest["recommended"] in {"int8", "fp16", "fp32"}
    assert manifest["verdict"].startswith("On ")
    assert "INT8 (gemms, percentile-99.999)" in manifest["verdict"]
    assert manifest["inputs"]["versions"].keys() >= {"torch", "openvino", "int8qa"}


def test_contract(built: Built) -> None:
    """The contract is the gateway's side of the manifest."""
    repository = built.options.model_repository
    contract = load_contract(repository)
    assert contract == built.outcome.contract
    assert contract.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert contract.max_window_tokens == POSITIONS
    assert contract.sequence_buckets == tuple(range(16, POSITIONS + 1, 16))
    tokenizer = ReaderTokenizer.from_file(repository / "tokenizer.json")
    assert contract.tokenizer_sha256 == tokenizer.fingerprint
    assert contract.models.keys() == set(Precision)
    int8, fp32 = contract.models[Precision.INT8], contract.models[Precision.FP32]
    assert (int8.calibrator, int8.recipe) == ("percentile-99.999", "gemms")
    assert (fp32.calibrator, fp32.recipe) == ("none", "none")
    assert contract.verdict == built.outcome.manifest["verdict"]
    assert contract.recommended == Precision(built.outcome.manifest["recommended"])
    assert contract.batch_ms == tabulate_costs(
        contract, built.outcome.manifest["cost_ms"]
    )


def test_files(built: Built) -> None:
    """Three models Triton can load, and nothing else; sizes are the files'."""
    repository = built.options.model_repository
    files = modification_times(repository)
    # Only where the CPU has VNNI: tests/build/test_float_parts.py.
    assert files.keys() - {"qa_int8/1/cpu.json"} == {
        *("contract.json", "manifest.json", "tokenizer.json"),
        *(
            f"{precision.model_name}/{name}"
            for precision in Precision
            for name in (
                *("config.pbtxt", "1/model.py", "1/properties.json"),
                *("1/model.xml", "1/model.bin"),
            )
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
    assert set(labels) == {f"[{n}/12]" for n in range(1, 13)}


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
        {"calibrator": Calibrator("mse")},
        {"calibrator": Calibrator("search")},
        {"recipe": RECIPES["full"]},
        {"recipe": dataclasses.replace(RECIPES["linear"], per_channel=False)},
        {"recipe": dataclasses.replace(RECIPES["linear"], share_qkv=True)},
        {"recipe": dataclasses.replace(RECIPES["full"], name="linear")},
        {"smooth": False},
        {"mixed": True},
        {"calibration_limit": 1},
        {"evaluation_limit": 1},
        {"gate": 0.5},
    ],
    ids=[
        *("force", "max", "percentile", "finer-percentile", "mse", "search", "full"),
        *("per-tensor", "share-qkv", "other-rules", "plain", "mixed"),
        *("calibration-limit", "evaluation-limit", "gate"),
    ],
)
def test_changed_option_rebuilds(built: Built, change: dict[str, Any]) -> None:
    """Every option that shapes the outcome is part of its identity."""
    with pytest.raises(AssertionError, match="a build was started"):
        build(change_options(built.options, **change))


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_changed_questions_rebuild(built: Built, tmp_path: Path, split: str) -> None:
    """Questions count by their content: a copy is the same, an edit is not."""
    source: Path = getattr(built.options.sources, split)
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    sources = dataclasses.replace(built.options.sources, **{split: copy})
    options = dataclasses.replace(built.options, sources=sources)
    assert build(options).cached
    copy.write_bytes(source.read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="a build was started"):
        build(options)


@pytest.mark.slow
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
        sources=QuestionSources(calibration, evaluation),
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

    def refuse(int8: Any, *, gate: float, advice: list[str]) -> list[str]:
        raise AccuracyGateError(f"{gate}: {len(advice)}")

    monkeypatch.setattr(pipeline, "check_gate", refuse)
    with pytest.raises(AccuracyGateError, match=r"0\.25"):
        build(dataclasses.replace(built.options, gate=0.25))
    assert modification_times(built.options.model_repository) == before


@pytest.fixture(scope="module")
def answered(
    tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Questions to which the tiny BERT's own float answers are the right ones.

    A random reader is right by no other measure, and a gate needs something to lose.
    """
    root = tmp_path_factory.mktemp("answered")
    words = [
        "mill",
        "ferry",
        "pump",
        "valve",
        "tower",
        "river",
        "bolt",
        "ridge",
        "lamp",
        "cable",
        "door",
        "wheel",
    ]
    paragraphs = [
        (
            " ".join(f"{words[(i * j) % 11]} {words[(i + j) % 12]}" for j in range(9)),
            ((f"Which {word} is it?", words[0]),),
        )
        for i, word in enumerate(words, start=1)
    ]
    draft = write_squad(root / "draft.json", [(f"mill {c}", q) for c, q in paragraphs])
    subject = load_subject(
        resolve_checkpoint(str(tiny_checkpoints["bert"])),
        QuestionSources(write_squad(root / "other.json", CALIBRATION), draft),
        root / "tokenizer.json",
    )
    reader = wrap_model(subject.checkpoint.model)
    found = subject.answer(run_torch(reader, subject.inputs)).texts
    assert all(found.values())
    pairs = [(q.context, ((q.question, found[q.id]),)) for q in subject.questions]
    return write_squad(root / "answered.json", pairs)


def options_for(
    built: Built, tmp_path: Path, *, evaluation: Path | None = None, **change: Any
) -> BuildOptions:
    """Of the tiny BERT, into a repository of its own."""
    options = change_options(
        built.options, model_repository=tmp_path / "models", **change
    )
    return (
        options
        if evaluation is None
        else change_options(options, evaluation=evaluation)
    )


COARSE = Calibrator("percentile", 51.0)
"""Cuts off half of all values, so that most answers change."""


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize(
    "name",
    [
        name if name == "bert" else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_full_recipe(
    built: Built, tiny_checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Every architecture builds in full INT8: attention and residual adds as well."""
    options = options_for(
        built,
        tmp_path,
        checkpoint=str(tiny_checkpoints[name]),
        recipe=RECIPES["full"],
    )
    manifest = build(options).manifest
    gemms = 13 if name == "electra" else 12  # it projects its embeddings
    census = manifest["census"]
    # Two layers, each with the GEMMs of scores and context.
    assert census["quantized_matmuls"] == gemms + 4
    assert census["matmuls"] == gemms + 5  # the head stays in float
    ints = manifest["models"]["int8"]["gemms"]
    assert ints.get("i8", 0) + ints.get("u8", 0) >= gemms
    by_class = census["by_class"]
    parts = ("query", "key", "value", "softmax", "attention_residual", "ffn_residual")
    for part in parts:
        assert by_class[part] == {"sites": 2, "quantized": 2, "per_channel": 0}, part
    for part in ("attention_output", "ffn_output"):
        assert by_class[part] == {"sites": 2, "quantized": 0, "per_channel": 0}, part
    assert manifest["recipe"]["unsigned_softmax"] is True
    assert by_class["layernorm_input"]["quantized"] == 0
    assert by_class["classifier_weight"]["quantized"] == 0
    weights = [count for part, count in by_class.items() if part.endswith("_weight")]
    assert sum(count["per_channel"] for count in weights) == gemms
    contract = load_contract(options.model_repository)
    assert contract.models[Precision.INT8].recipe == "full"


@pytest.mark.slow
@pytest.mark.usefixtures("one_shape")
def test_coarse_and_shared_scales(built: Built, tmp_path: Path) -> None:
    """Coarser grids, and more tensors than ``full`` has, where the recipe says so.

    One scale per weight, one for Q, K and V, signed probabilities, both addends.
    """
    addends = (TensorClass.ATTENTION_OUTPUT, TensorClass.FFN_OUTPUT)
    recipe = Recipe(
        "coarse",
        (
            *RECIPES["full"].rules,
            *(Rule(enable=True, tensor_class=one) for one in addends),
        ),
        per_channel=False,
        share_qkv=True,
        unsigned_softmax=False,
    )
    options = options_for(built, tmp_path, recipe=recipe)
    manifest = build(options).manifest
    assert manifest["recipe"]["weights"] == "per-tensor"
    assert manifest["recipe"]["share_qkv"] is True
    assert manifest["recipe"]["unsigned_softmax"] is False
    by_class = manifest["census"]["by_class"]
    for part in ("attention_output", "ffn_output", "softmax"):
        assert by_class[part] == {"sites": 2, "quantized": 2, "per_channel": 0}, part
    assert by_class["qkv_weight"] == {"sites": 6, "quantized": 6, "per_channel": 0}
    assert not any(count["per_channel"] for count in by_class.values())
    amax = manifest["activation_amax"]
    assert not any(name.endswith("weight_quantizer") for name in amax)
    for layer in range(2):
        path = f"bert.encoder.layer.{layer}.attention.self"
        assert len({amax[f"{path}.{part}_bmm_quantizer"] for part in "qkv"}) == 1
    separate = options_for(built, tmp_path / "separate", recipe=RECIPES["full"])
    amax = build(separate).manifest["activation_amax"]
    path = "bert.encoder.layer.0.attention.self"
    assert len({amax[f"{path}.{part}_bmm_quantizer"] for part in "qkv"}) == 3


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize(
    "method",
    [*(pytest.param(m, marks=pytest.mark.slow) for m in ("mse", "entropy")), "search"],
)
def test_calibrators(built: Built, tmp_path: Path, method: Any) -> None:
    """Every calibrator builds, is recorded, and chooses ranges of its own."""
    options = options_for(built, tmp_path, calibrator=Calibrator(method), smooth=False)
    console = make_console()
    manifest = build(options, console).manifest
    assert manifest["calibrator"] == method
    assert manifest["smoothing_alpha"] == {}
    amax = manifest["activation_amax"]
    assert len(amax) == 12 + 2 * 4  # the GEMMs' inputs, attention's operands
    assert all(value > 0 for value in amax.values())
    contract = load_contract(options.model_repository)
    assert contract.models[Precision.INT8].calibrator == method
    assert isinstance(console.file, io.StringIO)
    stages = console.file.getvalue()
    if method == "search":
        assert manifest["searched"].keys() == amax.keys()
        assert "[12/12]" in stages
    else:
        assert manifest["searched"] == {}
        assert "[11/11]" in stages


@pytest.mark.usefixtures("one_shape")
def test_recipe_of_ones_own(built: Built, tmp_path: Path) -> None:
    """A YAML file leaves out what it says; manifest and contract bear its name."""
    path = tmp_path / "careful.yaml"
    path.write_text(
        "name: careful\nbase: linear\nrules:\n"
        "  - {class: ffn_out_input, enable: false}\n"
        "  - {class: ffn_out_weight, enable: false}\n"
        '  - {quantizers: "*.layer.1.attention.self.key.weight_quantizer", axis: null}\n'
    )
    options = options_for(built, tmp_path, recipe=load_recipe(str(path)))
    outcome = build(options)
    manifest = outcome.manifest
    assert manifest["recipe"]["name"] == "careful"
    assert manifest["recipe"]["rules"][-2:] == [
        {"subject": "ffn_out_weight", "enable": False, "per_channel": None},
        {
            "subject": "*.layer.1.attention.self.key.weight_quantizer",
            "enable": True,
            "per_channel": False,
        },
    ]
    assert manifest["census"]["quantized_matmuls"] == 10
    by_class = manifest["census"]["by_class"]
    assert by_class["ffn_out_weight"]["quantized"] == 0
    assert by_class["qkv_weight"] == {"sites": 6, "quantized": 6, "per_channel": 5}
    assert outcome.contract.models[Precision.INT8].recipe == "careful"


@pytest.mark.usefixtures("one_shape")
def test_failed_gate_says_what_to_try(
    built: Built, answered: Path, tmp_path: Path
) -> None:
    """Measured, allowed, and the three next things to try."""
    options = options_for(
        built, tmp_path, evaluation=answered, gate=0.99, calibrator=COARSE, smooth=False
    )
    with pytest.raises(AccuracyGateError) as caught:
        build(options)
    message = str(caught.value)
    assert "% of FP32's F1" in message
    assert "over 12 questions" in message
    assert "the gate asks for 99 %" in message
    advice = list_advice(options, RECIPES["gemms"])
    assert all(step in message for step in advice[:3])
    assert advice[3] not in message
    assert not options.model_repository.exists()


def options_to_mix(built: Built, answered: Path, tmp_path: Path) -> BuildOptions:
    """A build that loses too much until some units are back in float."""
    return options_for(
        built,
        tmp_path,
        evaluation=answered,
        gate=0.9,
        recipe=RECIPES["linear"],
        calibrator=Calibrator("percentile", 97.0),
        smooth=False,
        mixed=True,
    )


@pytest.mark.usefixtures("one_shape")
def test_mixed_moves_units_to_float(
    built: Built, answered: Path, tmp_path: Path
) -> None:
    """What is moved runs in float in graph and engine, and its price is reported."""
    options = options_to_mix(built, answered, tmp_path)
    console = make_console()
    outcome = build(options, console)
    manifest = outcome.manifest
    mixed = manifest["mixed"]
    moved = mixed["moved"]
    assert moved
    assert len(set(moved)) == len(moved)
    by_count = {step["units_in_float"]: step for step in mixed["steps"]}
    assert by_count[len(moved)]["f1_ratio"] >= 0.9
    assert by_count[len(moved)]["added"] == moved[-1]
    # The smallest number that passes, among those measured.
    assert all(step["f1_ratio"] < 0.9 for n, step in by_count.items() if n < len(moved))
    # Of 8 units of the two layers, Q, K and V are one of three GEMMs.
    gemms = 12 - sum(3 if unit.endswith("qkv") else 1 for unit in moved)
    assert manifest["census"]["quantized_matmuls"] == gemms
    ints = manifest["models"]["int8"]["gemms"]
    assert ints.get("i8", 0) + ints.get("u8", 0) == gemms
    accuracy = manifest["models"]["int8"]["accuracy"]
    assert accuracy["f1_ratio"] >= 0.9
    # All of INT8's figures are the mixed model's, none the pure one's.
    step = by_count[len(moved)]
    assert (accuracy["f1_ratio"], accuracy["agreement"]) == (
        step["f1_ratio"],
        step["agreement"],
    )
    subject = load_subject(
        resolve_checkpoint(options.checkpoint), options.sources, tmp_path / "t.json"
    )
    int8, fp16 = (
        subject.answer(
            OpenVinoEngine(
                options.model_repository / precision.model_name / "1/model.xml"
            ).infer
        )
        for precision in (Precision.INT8, Precision.FP16)
    )
    assert accuracy["agreement_fp16"] == share_equal(int8, fp16)
    assert list(mixed["speed_of_pure_int8"]) == ["1x32"]
    assert manifest["latency_ms"]["1x32"].keys() == {
        *("int8", "fp16", "fp32", "pure int8"),
    }
    # Only what runs in INT8 has a range.
    assert len(manifest["activation_amax"]) == gemms
    assert outcome.contract.models[Precision.INT8].recipe == "linear+mixed"
    assert isinstance(console.file, io.StringIO)
    assert f"{len(moved)} units in float, the last {moved[-1]}" in " ".join(
        console.file.getvalue().split()
    )
    assert not (options.model_repository / "mixed").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_shape")
def test_each_engine_is_checked_once(
    built: Built, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as it is compiled, for what it was compiled to; each remark is kept."""
    checked: list[tuple[Precision, int]] = []

    def remark(
        execution: Any,
        precision: Precision,
        *,
        quantized_gemms: int,
        quantized_attentions: int,
    ) -> Any:
        assert quantized_attentions == 0
        checked.append((precision, quantized_gemms))
        assert sum(execution.gemms.values()) > 12
        return [f"{precision} is slow"]

    monkeypatch.setattr(pipeline, "check_execution", remark)
    options = options_to_mix(built, answered, tmp_path)
    manifest = build(options).manifest
    assert manifest["mixed"]["moved"]
    left = manifest["census"]["quantized_matmuls"]
    assert checked == [
        (Precision.FP32, 0),
        (Precision.FP16, 0),
        (Precision.INT8, 12),
        (Precision.INT8, left),
    ]
    assert manifest["remarks"] == [f"{name} is slow" for name, _ in checked]


@pytest.mark.slow
@pytest.mark.usefixtures("one_shape")
def test_mixed_without_need(built: Built, answered: Path, tmp_path: Path) -> None:
    """A model that passes as it is stays whole."""
    options = options_for(
        built, tmp_path, evaluation=answered, gate=0.0, mixed=True, smooth=False
    )
    manifest = build(options).manifest
    assert manifest["mixed"] == {"moved": [], "speed_of_pure_int8": {}, "steps": []}
    assert manifest["census"]["quantized_matmuls"] == 16


@pytest.mark.usefixtures("one_shape")
def test_mixed_that_cannot_reach_the_gate(
    built: Built, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but one unit in float and still too little: nothing is published."""

    def spoil(reference: Any, answers: Any, questions: Any) -> Any:
        measured = compare(reference, answers, questions)
        return dataclasses.replace(measured, f1_ratio=min(measured.f1_ratio, 0.9))

    compare = pipeline.compare_answers
    monkeypatch.setattr(pipeline, "compare_answers", spoil)
    options = options_for(
        built,
        tmp_path,
        recipe=RECIPES["linear"],
        evaluation=answered,
        gate=1.0,
        mixed=True,
        smooth=False,
    )
    with pytest.raises(
        AccuracyGateError, match="even with 7 of 8 units in float"
    ) as caught:
        build(options)
    message = str(caught.value)
    assert all(step in message for step in list_advice(options, RECIPES["linear"])[:3])
    assert "--mixed" not in message
    assert "--gate 0.8" in message
    assert not options.model_repository.exists()


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
        sources=QuestionSources(
            write_squad(tmp_path / "a.json", CALIBRATION),
            write_squad(tmp_path / "b.json", (*EVALUATION, CALIBRATION[1])),
        ),
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
        build(change_options(built.options, evaluation=path))


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"gate": 1.5}, BuildError, "the gate is 1.5; allowed: 0"),
        ({"gate": float("nan")}, BuildError, "the gate is nan"),
        ({"calibration": Path("none.json")}, DataFileError, "no such file: none.json"),
        ({"evaluation": Path()}, DataFileError, "no such file"),
        ({"checkpoint": "./none"}, CheckpointError, "no such checkpoint directory"),
    ],
)
def test_options_are_checked_first(
    built: Built, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """A slip in the options is found before any work is done."""
    with pytest.raises(kind, match=message):
        build(change_options(built.options, **change))


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
