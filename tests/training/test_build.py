"""What QAT leaves behind goes through the build, and its ranges with it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from int8qa.build import latency
from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.build.options import BuildOptions
from int8qa.build.pipeline import build_repository, count_stages
from int8qa.build.quantization import RECIPES
from int8qa.build.report import BuildProgress
from int8qa.build.stored_ranges import read_ranges
from int8qa.build.subject import QuestionSources
from int8qa.training.options import FakeQuantization
from tests.training.runs import HELD_OUT, make_options, train, write_articles


def test_build_of_a_qat_result(
    checkpoint: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine has the ranges trained with, though weights have grown beyond them."""
    monkeypatch.setattr(latency, "LATENCY_SHAPES", ((1, 32),))
    output = tmp_path / "out"
    train(
        make_options(
            checkpoint,
            questions,
            output,
            epochs=1.0,
            learning_rate=0.05,
            quantization=FakeQuantization(RECIPES["full"], Calibrator("max")),
        )
    )
    stored = read_ranges(output)
    assert stored is not None
    weights = load_checkpoint(resolve_checkpoint(str(output))).model.state_dict()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    scale = stored.scales.get(name.replace("weight", "input_quantizer"))
    weight = weights[name] if scale is None else weights[name] / scale
    assert (weight.abs() > 1.01 * stored.ranges[f"{name}_quantizer"]).any()
    held_out = write_articles(tmp_path / "held-out.json", HELD_OUT)
    options = BuildOptions(
        model_repository=tmp_path / "models",
        checkpoint=str(output),
        recipe=RECIPES["full"],
        sources=QuestionSources(questions, held_out),
        gate=0.0,
    )
    progress = BuildProgress(
        count_stages(options), console=Console(file=io.StringIO(), width=200)
    )
    manifest = build_repository(options, progress).manifest
    assert manifest["calibrator"] == "trained"
    assert manifest["trained"]["tensors"] == len(stored.grids)
    assert manifest["census"]["quantized_matmuls"] == 16
    for site, amax in manifest["activation_amax"].items():
        assert amax == stored.ranges[site]
