"""Ranges that lie beside a checkpoint's weights: written, read, refused, built with."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from int8qa.build import latency, pipeline
from int8qa.build.calibration import Calibrator, set_ranges, share_ranges
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.identity import identify_build
from int8qa.build.options import BuildOptions
from int8qa.build.pipeline import build_repository, count_stages
from int8qa.build.plans import choose_unsmoothed, sign_softmax
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    insert_quantizers,
    switch_quantizers,
)
from int8qa.build.quantized import QuantizedReader
from int8qa.build.report import BuildProgress
from int8qa.build.sites import find_sites
from int8qa.build.stored_ranges import (
    RANGES_FILENAME,
    StoredRanges,
    choose_stored,
    has_ranges,
    read_ranges,
    take_ranges,
    write_ranges,
)
from int8qa.build.subject import QuestionSources
from int8qa.contract import load_contract
from int8qa.errors import CheckpointError
from int8qa.reader.windows import Window
from tests.build.tiny import TinyReader, make_reader, random_feed

FULL = RECIPES["full"]


@dataclasses.dataclass(frozen=True)
class Stored:
    reader: TinyReader
    plan: Plan
    ranges: StoredRanges


@pytest.fixture(scope="module")
def stored(windows: list[Window]) -> Stored:
    """The tiny BERT in full, smoothed, with ranges that no calibration comes to."""
    reader = make_reader("bert")
    quantized = QuantizedReader(reader.wrapped, windows, reader.inputs, [FULL])
    quantized.smooth(Calibrator("max"))
    quantized.collect()
    ranges = quantized.choose(Calibrator("percentile", 97.0))
    set_ranges(reader.model, {name: 0.9 * amax for name, amax in ranges.items()})
    found = take_ranges(reader.model, quantized.plan, "percentile-97")
    return Stored(reader, quantized.plan, found)


@pytest.fixture
def checkpoint(copied_checkpoint: Path, stored: Stored) -> Path:
    """The tiny BERT's directory with ranges beside the weights."""
    write_ranges(copied_checkpoint, stored.ranges)
    return copied_checkpoint


def same(left: StoredRanges, right: StoredRanges) -> bool:
    plain = ("recipe", "calibrator", "grids")
    return (
        all(getattr(left, name) == getattr(right, name) for name in plain)
        and left.ranges.keys() == right.ranges.keys()
        and left.scales.keys() == right.scales.keys()
        and all(
            np.array_equal(left.ranges[name], right.ranges[name])
            for name in left.ranges
        )
        and all(left.scales[name].equal(right.scales[name]) for name in left.scales)
    )


def choose_plan(**change: Any) -> Plan:
    reader = make_reader("bert")
    insert_quantizers(reader.model)
    sites = find_sites(reader.wrapped, reader.inputs)
    recipe = dataclasses.replace(RECIPES[change.pop("name", "full")], **change)
    return recipe.choose(sites)


def test_written_and_read(stored: Stored, tmp_path: Path) -> None:
    """Nothing is lost, and the same ranges are the same bytes: the file is hashed."""
    assert not has_ranges(tmp_path)
    assert read_ranges(tmp_path) is None
    path = write_ranges(tmp_path, stored.ranges)
    assert path.name == RANGES_FILENAME
    assert has_ranges(tmp_path)
    found = read_ranges(tmp_path)
    assert found is not None
    assert same(found, stored.ranges)
    first = path.read_bytes()
    assert all(write_ranges(tmp_path, found).read_bytes() == first for _ in range(9))


def test_what_is_taken(stored: Stored) -> None:
    """A range for each tensor of the plan, per channel where its grid is, and scales."""
    ranges = stored.ranges
    assert ranges.ranges.keys() == stored.plan.names
    assert ranges.grids.keys() == stored.plan.names
    assert (ranges.recipe, ranges.calibrator) == ("full", "percentile-97")
    for site in stored.plan.sites:
        amax = ranges.ranges[site.name]
        if site.is_weight:
            assert amax.shape in {(32, 1), (64, 1)}
        else:
            assert isinstance(amax, float)
    assert ranges.scales
    assert all(name.endswith(".input_quantizer") for name in ranges.scales)


def test_applied(stored: Stored) -> None:
    """A reader loaded anew computes what the one they were taken from does."""
    fresh = make_reader("bert")
    insert_quantizers(fresh.model)
    plan = FULL.choose(find_sites(fresh.wrapped, fresh.inputs))
    switch_quantizers(fresh.model, plan)
    stored.ranges.apply(fresh.model)
    feed = random_feed(fresh, [20, 11], 24)
    found, expected, exact = (
        np.stack(reader.run_torch(feed))
        for reader in (fresh, stored.reader, make_reader("bert"))
    )
    # Weights at the lowest code alone differ, by one step.
    error = np.sqrt(np.square(found - expected).mean())
    assert error < 0.2 * np.sqrt(np.square(exact - expected).mean())
    assert same(take_ranges(fresh.model, plan, "percentile-97"), stored.ranges)
    cut = 0
    for site in plan.sites:
        if site.is_weight:
            weight = fresh.model.get_submodule(site.name.rpartition(".")[0]).weight
            limit = stored.ranges.ranges[site.name]
            assert (weight.abs() <= limit).all()
            cut += int((weight.abs() == limit).sum())
    assert cut > 100  # no weight has the code -128, as no engine's should


def with_quantizers(architecture: str) -> Any:
    reader = make_reader(architecture)
    insert_quantizers(reader.model)
    return reader.model


def test_another_model(stored: Stored) -> None:
    """Names or shapes that are not there are refused before they do harm."""
    with pytest.raises(CheckpointError, match=r"of another model: there is no bert"):
        stored.ranges.apply(with_quantizers("distilbert"))
    name = next(iter(stored.ranges.scales))
    scales = {name: torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"\(7,\), expected \(32,\)"):
        dataclasses.replace(stored.ranges, scales=scales).apply(with_quantizers("bert"))
    weight = next(name for name in stored.ranges.ranges if "weight_q" in name)
    ranges = {weight: torch.ones(7, 1)}
    with pytest.raises(CheckpointError, match=r"\(7, 1\), expected \(32, 1\)"):
        dataclasses.replace(stored.ranges, ranges=ranges).apply(with_quantizers("bert"))


def change_file(path: Path, **about: Any) -> None:
    """Write the file again with other words about it."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        words = json.loads(file.metadata()["int8qa"])
    save_file(load_file(path), path, {"int8qa": json.dumps(words | about)})


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": 99}, "has the format 99; known is 1. Delete it"),
        ({"grids": {"nothing.input_quantizer": "INT8"}}, "damaged (KeyError)"),
        ({"grids": 7}, "damaged (AttributeError)"),
        ({"grids": None}, "damaged (AttributeError)"),
    ],
)
def test_words_that_do_not_fit(
    checkpoint: Path, about: dict[str, Any], message: str
) -> None:
    """What is not understood is not guessed at."""
    change_file(checkpoint / RANGES_FILENAME, **about)
    with pytest.raises(CheckpointError) as caught:
        read_ranges(checkpoint)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["amax/", "pre_quant_scale/"])
def test_numbers_that_are_no_ranges(checkpoint: Path, value: float, kind: str) -> None:
    """Zero, a negative number, NaN and infinity would build an engine of nonsense."""
    path = checkpoint / RANGES_FILENAME
    tensors = load_file(path)
    about = json.loads(_metadata(path))
    name = next(name for name in tensors if name.startswith(kind))
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, path, {"int8qa": json.dumps(about)})
    with pytest.raises(CheckpointError, match=r"damaged \(ValueError\); delete it"):
        read_ranges(checkpoint)


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["int8qa"])


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_damaged_file(checkpoint: Path, content: bytes) -> None:
    """One line that says what to do."""
    (checkpoint / RANGES_FILENAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_ranges(checkpoint)
    # Without metadata of ours it is someone else's file.
    save_file({"x": torch.ones(1)}, checkpoint / RANGES_FILENAME)
    with pytest.raises(CheckpointError, match=r"damaged \(KeyError\)"):
        read_ranges(checkpoint)


def test_differences(stored: Stored) -> None:
    """The same recipe needs no words; every other says what differs and what to do."""
    explain = stored.ranges.explain_difference
    assert explain(stored.plan) == ""
    linear = explain(choose_plan(name="linear"))
    assert "quantizes 0 more tensors, 12 fewer and 0 on another grid" in linear
    assert "build with --recipe full to keep them" in linear
    coarse = explain(choose_plan(per_channel=False))
    assert "0 fewer and 12 on another grid; train with the recipe" in coarse
    assert "a scale each" in explain(choose_plan(share_qkv=True))
    assert "leave --no-smooth out" in explain(stored.plan, smooth=False)
    signed = sign_softmax(FULL).choose(stored.plan.sites)
    assert "2 on another grid; train with the recipe and the --target" in explain(
        signed
    )
    leave_out = choose_unsmoothed(stored.plan.sites)
    assert leave_out
    assert "context was smoothed" in explain(stored.plan, leave_out=leave_out)
    plain = dataclasses.replace(stored.ranges, scales={})
    assert plain.explain_difference(stored.plan, smooth=False) == ""
    assert plain.explain_difference(stored.plan, leave_out=leave_out) == ""


def test_shared_scales(stored: Stored) -> None:
    """Ranges that are shared already, and read from a file, are those of the recipe."""
    plan = choose_plan(share_qkv=True)
    ranges = dict(stored.ranges.ranges)
    share_ranges(plan, ranges)
    copies = {n: a + 0.0 if isinstance(a, float) else a for n, a in ranges.items()}
    shared = dataclasses.replace(stored.ranges, ranges=copies)
    assert shared.explain_difference(plan) == ""


def test_choice(checkpoint: Path, stored: Stored, tmp_path: Path) -> None:
    """None without a file; none, and why, if they do not fit or are not wanted."""

    def choose(calibrator: str | None, **change: Any) -> tuple[Any, str]:
        options: dict[str, Any] = {"smooth": True, "calibrator": calibrator}
        return choose_stored(checkpoint, stored.plan, **(options | change))

    found, difference = choose(None)
    assert same(found, stored.ranges)
    assert difference == ""
    assert choose("max") == (None, "--calibrator max was asked for")
    found, difference = choose(None, smooth=False)
    assert found is None
    assert "--no-smooth" in difference
    (checkpoint / RANGES_FILENAME).write_bytes(b"")
    assert choose("max")[0] is None
    with pytest.raises(CheckpointError, match="damaged"):
        choose(None)
    empty = choose_stored(tmp_path / "x", stored.plan, calibrator=None, smooth=True)
    assert empty == (None, "")


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LATENCY_SHAPES", ((1, 32),))


def make_options(
    checkpoint: Path, question_files: tuple[Path, Path], target: Path, **change: Any
) -> BuildOptions:
    calibration, evaluation = question_files
    chosen: dict[str, Any] = {
        "recipe": FULL,
        "model_repository": target,
        "checkpoint": str(checkpoint),
        "sources": QuestionSources(calibration, evaluation),
        "gate": 0.0,
    }
    return BuildOptions(**(chosen | change))


def build(options: BuildOptions) -> tuple[Any, list[str]]:
    console = Console(file=io.StringIO(), width=300)
    progress = BuildProgress(count_stages(options), console=console)
    outcome = build_repository(options, progress)
    assert isinstance(console.file, io.StringIO)
    return outcome, console.file.getvalue().splitlines()


@pytest.mark.usefixtures("one_shape")
def test_build_keeps_them(
    checkpoint: Path,
    question_files: tuple[Path, Path],
    stored: Stored,
    tmp_path: Path,
) -> None:
    """Nothing is smoothed or calibrated; manifest and contract say so."""
    options = make_options(checkpoint, question_files, tmp_path / "models")
    outcome, lines = build(options)
    manifest = outcome.manifest
    assert manifest["calibrator"] == "trained"
    assert manifest["trained"] == {
        "recipe": "full",
        "calibrator": "percentile-97",
        "tensors": len(stored.ranges.ranges),
        "smoothed": len(stored.ranges.scales),
    }
    assert (manifest["calibration_windows"], manifest["smoothing_alpha"]) == (0, {})
    for name, amax in manifest["activation_amax"].items():
        assert amax == stored.ranges.ranges[name]
    assert "left aside" not in str(manifest["remarks"])
    contract = load_contract(tmp_path / "models")
    assert {name: m.calibrator for name, m in contract.models.items()} == {
        "int8": "trained",
        "fp16": "none",
        "fp32": "none",
    }
    stages = [line for line in lines if line.startswith("[")]
    assert any(
        "take the ranges it was trained with (full, percentile-97)" in s for s in stages
    )
    assert not any("smooth" in s or "calibrate" in s for s in stages)
    number, of = stages[-1].partition("]")[0].strip("[").split("/")
    assert number == of
    # The same again is current; with another file it is another build.
    assert build(options)[0].cached
    other = dataclasses.replace(stored.ranges, calibrator="max")
    before = manifest["build_id"]
    write_ranges(checkpoint, other)
    files = resolve_checkpoint(str(checkpoint))
    assert identify_build(options, files)[0] != before


@pytest.mark.slow
@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recipe": RECIPES["linear"]}, "build with --recipe full to keep them"),
        (
            {"calibrator": Calibrator("max"), "keep_trained": False, "smooth": False},
            "--calibrator max was asked for",
        ),
    ],
)
def test_build_that_disagrees(
    checkpoint: Path,
    question_files: tuple[Path, Path],
    tmp_path: Path,
    change: dict[str, Any],
    reason: str,
) -> None:
    """What was asked for is built, newly calibrated, and a line and a remark say so."""
    options = make_options(checkpoint, question_files, tmp_path / "models", **change)
    outcome, lines = build(options)
    manifest = outcome.manifest
    assert manifest["trained"] is None
    assert manifest["calibrator"] == options.calibrator.name
    assert manifest["calibration_windows"] == 3
    (remark,) = (text for text in manifest["remarks"] if "left aside" in text)
    assert remark.startswith("the ranges tiny-bert was trained with are left aside")
    assert reason in remark
    assert any(remark in line for line in lines)


def test_identity(
    checkpoint: Path, question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """To ask for a calibrator is another build only where there are ranges."""

    def identify(directory: Path, *, keep_trained: bool) -> str:
        options = make_options(
            directory, question_files, tmp_path, keep_trained=keep_trained
        )
        return identify_build(options, resolve_checkpoint(str(directory)))[0]

    kept, left = (identify(checkpoint, keep_trained=keep) for keep in (True, False))
    assert kept != left
    plain = Path(shutil.copytree(checkpoint, tmp_path / "plain"))
    (plain / RANGES_FILENAME).unlink()
    same_builds = {identify(plain, keep_trained=keep) for keep in (True, False)}
    assert len(same_builds) == 1
    assert not same_builds & {kept, left}
    assert pipeline.BuildOptions().keep_trained
