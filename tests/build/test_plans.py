"""A build for TensorRT: the whole of it with RTX, and with a stand-in for the builder."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from int8qa.build import parity, pipeline, plans
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.engines.tensorrt_options import Flavour, PlanOptions
from int8qa.build.options import BuildOptions
from int8qa.build.pipeline import BuildOutcome, build_repository, count_stages
from int8qa.build.plans import (
    choose_unsmoothed,
    describe_changes,
    list_fusion_blocks,
    sign_softmax,
    summarize_findings,
    tell_seldom,
)
from int8qa.build.quantization import RECIPES
from int8qa.build.report import BuildProgress
from int8qa.build.repository import find_current
from int8qa.build.sites import Site, TensorClass
from int8qa.build.subject import QuestionSources, Subject, load_subject
from int8qa.build.triton_config import parse_config
from int8qa.contract import Precision, load_contract
from int8qa.errors import EnginePrecisionError, MissingDependencyError, ParityError
from tests.build.half import TENSORRT_RTX, install_builder
from tests.build.tiny import POSITIONS, CalibratedReader

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason=TENSORRT_RTX
)
RTX = PlanOptions(Flavour.RTX, ("sm80", "sm89"))
SOFTMAX_REMARK = "TensorRT has no unsigned INT8"
CONTEXT_REMARK = "attention's context is left out of SmoothQuant"


@pytest.fixture
def options(
    tiny_checkpoints: dict[str, Path], question_files: tuple[Path, Path], tmp_path: Path
) -> BuildOptions:
    """Of the tiny BERT, for RTX, everything in INT8."""
    return BuildOptions(
        model_repository=tmp_path / "models",
        checkpoint=str(tiny_checkpoints["bert"]),
        recipe=RECIPES["full"],
        sources=QuestionSources(*question_files),
        gate=0.0,
        plans=RTX,
    )


def build(options: BuildOptions, console: Console | None = None) -> BuildOutcome:
    console = console or Console(file=io.StringIO(), width=200)
    return build_repository(
        options, BuildProgress(count_stages(options), console=console)
    )


def list_files(repository: Path) -> set[str]:
    return {
        str(path.relative_to(repository))
        for path in repository.rglob("*")
        if path.is_file()
    }


@needs_rtx
def test_rtx_build(options: BuildOptions) -> None:
    """Two plans Triton can be given, what they are, and what was not measured."""
    console = Console(file=io.StringIO(), width=200)
    outcome = build(options, console)
    repository = options.model_repository
    assert list_files(repository) == {
        *("contract.json", "manifest.json", "tokenizer.json"),
        *(
            f"{model}/{name}"
            for model in ("qa_int8", "qa_fp16")
            for name in ("config.pbtxt", "1/model.plan", "1/model.py")
        ),
    }
    contract = load_contract(repository)
    assert contract == outcome.contract
    assert contract.models.keys() == {Precision.INT8, Precision.FP16}
    assert contract.recommended is None
    for precision, record in contract.models.items():
        directory = repository / record.name
        config = parse_config((directory / "config.pbtxt").read_text())
        assert (config.name, config.backend) == (precision.model_name, "python")
        assert config.max_batch_size == contract.batch_sizes[-1] == 32
        assert record.engine == "tensorrt-rtx"
        assert record.size_bytes == (directory / "1/model.plan").stat().st_size
    manifest = json.loads((repository / "manifest.json").read_text())
    # The head is the one GEMM that "full" leaves in float.
    assert manifest["models"]["int8"]["gemms"] == {"int8": 16, "half": 1}
    assert manifest["models"]["fp16"]["gemms"] == {"half": 17}
    assert manifest["models"]["int8"]["accuracy"]["questions"] == 2
    entry = manifest["tensorrt"]
    assert entry["lock"]["library"] == "tensorrt-rtx"
    assert entry["lock"]["compute_capabilities"] == ["sm80", "sm89"]
    assert entry["lock"]["version"].startswith("1.")
    assert "evidence for the graphs" in entry["accuracy"]
    assert entry["findings"] == []
    assert [profile["most"] for profile in entry["profiles"]] == [[32, POSITIONS]]
    for part in entry["models"].values():
        assert part["network"]["strongly_typed"] is True
        assert part["seconds"] > 0
        assert 0 < part["half_error"] < 0.25
    assert (manifest["latency_ms"], manifest["latency"]) == ({}, {})
    assert manifest["recommended"] is None
    assert "no speed was measured here" in manifest["verdict"]
    assert "on sm80, sm89" in manifest["verdict"]
    assert manifest["recipe"]["unsigned_softmax"] is False
    assert not any("attention.output" in name for name in manifest["smoothing_alpha"])
    remarks = " ".join(manifest["remarks"])
    assert SOFTMAX_REMARK in remarks
    assert CONTEXT_REMARK in remarks
    assert isinstance(console.file, io.StringIO)
    lines = [line.split()[0] for line in console.file.getvalue().splitlines()]
    assert {f"[{n}/11]" for n in range(1, 12)} <= set(lines)
    # And once more: nothing to do.
    assert build(options).cached


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[PlanOptions]:
    """No library and no GPU, but a builder that does as it is told; what it was told."""
    return install_builder(monkeypatch)


@pytest.mark.usefixtures("stand_in")
def test_build_on_a_gpu(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """For TensorRT's own backend: plans with profiles, and no Python beside them."""
    monkeypatch.setattr(plans, "TELL_EVERY_S", 0.0)
    console = Console(file=io.StringIO(), width=200)
    chosen = PlanOptions(Flavour.TENSORRT, hardware_compatible=True)
    outcome = build(dataclasses.replace(options, plans=chosen), console)
    repository = options.model_repository
    assert {name for name in list_files(repository) if name.startswith("qa_int8")} == {
        "qa_int8/config.pbtxt",
        "qa_int8/1/model.plan",
    }
    config = parse_config((repository / "qa_int8/config.pbtxt").read_text())
    assert config.platform == "tensorrt_plan"
    entry = outcome.manifest["tensorrt"]
    profiles = entry["profiles"]
    assert list(config.instance_group[0].profile) == [
        str(index) for index in range(len(profiles))
    ]
    assert len(profiles) > 1
    assert entry["models"]["int8"]["seconds"] == 60.0
    assert "for tensorrt 10.13.3.9 on NVIDIA L4" in outcome.manifest["verdict"]
    assert outcome.contract.models[Precision.INT8].engine == "tensorrt"
    assert isinstance(console.file, io.StringIO)
    assert "int8: Tactics, 1/2" in console.file.getvalue()


@pytest.mark.slow
def test_options_reach_the_builder(
    options: BuildOptions, stand_in: list[PlanOptions]
) -> None:
    """Both plans are built as asked; for another GPU they are built again."""
    first = build(options)
    assert stand_in == [RTX, RTX]
    assert build(options).cached
    other = PlanOptions(Flavour.RTX, ("sm86",))
    second = build(dataclasses.replace(options, plans=other))
    assert stand_in[2:] == [other, other]
    assert first.contract.build_id != second.contract.build_id
    assert find_current(options.model_repository, second.contract.build_id)


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_other_network_than_asked_for(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose GEMMs are not the recipe's publishes nothing."""
    linear = dataclasses.replace(options, recipe=RECIPES["linear"])
    with pytest.raises(EnginePrecisionError, match=r"16 GEMMs .* recipe has 12"):
        build(linear)
    monkeypatch.setattr(parity, "HALVED_TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="float16 graph from float32 graph"):
        build(linear)
    assert not options.model_repository.exists()


def test_missing_builder_is_found_first(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No minutes of calibration before the word that there is no TensorRT."""

    def refuse(options: PlanOptions) -> None:
        raise MissingDependencyError(f"no {options.flavour}")

    monkeypatch.setattr(pipeline, "check_builder", refuse)
    monkeypatch.setattr(
        pipeline, "resolve_checkpoint", lambda *_, **__: pytest.fail("work was started")
    )
    with pytest.raises(MissingDependencyError, match="no tensorrt-rtx"):
        build_repository(options)


def test_changes_to_a_recipe(calibrated: Callable[[str], CalibratedReader]) -> None:
    """Only what a recipe quantizes is spoken of; ``linear`` loses nothing."""
    sites = calibrated("bert").sites
    full, linear = RECIPES["full"], RECIPES["linear"]
    plan = full.choose(sites)
    remarks = describe_changes(full, plan, smooth=True)
    assert [remark.startswith(SOFTMAX_REMARK) for remark in remarks] == [True, False]
    assert remarks[1].startswith(CONTEXT_REMARK)
    assert len(describe_changes(full, plan, smooth=False)) == 1
    signed = sign_softmax(full)
    assert not signed.choose(sites).unsigned
    assert describe_changes(signed, plan, smooth=False) == []
    assert describe_changes(linear, linear.choose(sites), smooth=True) == []


def test_context_is_smoothed_where_the_value_is_float() -> None:
    """There the product folds into the value GEMM; with an INT8 value it cannot."""
    value = Site("v", TensorClass.VALUE, 0, 0)
    context = Site("c", TensorClass.CONTEXT, 0, 1)
    assert choose_unsmoothed([context]) == frozenset()
    assert choose_unsmoothed([context, value]) == {TensorClass.CONTEXT}


@pytest.fixture
def subject(
    tiny_checkpoints: dict[str, Path], question_files: tuple[Path, Path], tmp_path: Path
) -> Subject:
    """The tiny BERT with its questions."""
    files = resolve_checkpoint(str(tiny_checkpoints["bert"]))
    return load_subject(files, QuestionSources(*question_files), tmp_path / "t.json")


@pytest.mark.parametrize("leaves_out", [True, False])
def test_fusion_blocks(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, leaves_out: bool
) -> None:
    """A build's graph keeps the rules; with context smoothed each layer breaks one."""
    if not leaves_out:
        monkeypatch.setattr(plans, "choose_unsmoothed", lambda sites: frozenset())
    found = list_fusion_blocks(subject, RECIPES["full"], smooth=True)
    names = [finding.rule.name for finding in found]
    assert names == ([] if leaves_out else 2 * ["product-behind-attention"])
    remarks = summarize_findings(found)
    assert len(remarks) == (not leaves_out)
    assert all("2 places" in remark for remark in remarks)


def test_steps_are_told_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder takes thousands of steps; people want to know that it lives."""
    said: list[str] = []
    now = [0.0]
    monkeypatch.setattr(plans.time, "monotonic", lambda: now[0])
    tell = tell_seldom(said.append, "int8")
    for second in range(25):
        now[0] = float(second)
        tell("Tactics", second, 25)
    assert said == ["      int8: Tactics, 10/25", "      int8: Tactics, 20/25"]
