"""INT8's rounding in a reader under training, and the plain reader that comes out."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.build.export import wrap_model
from int8qa.build.plans import choose_unsmoothed
from int8qa.build.quantization import RECIPES, quantizers_by_name, quantizers_off
from int8qa.build.report import BuildProgress
from int8qa.build.sites import find_sites
from int8qa.build.subject import CALIBRATION_WINDOWS
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_windows
from int8qa.training.fake_quantization import (
    calibrate,
    choose_calibration,
    count_stages,
    plain_weights,
    restore,
)
from int8qa.training.options import FakeQuantization
from tests.build.tiny import make_reader, random_feed
from tests.training.runs import ARTICLES

INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)
FULL = RECIPES["full"]


@pytest.fixture(scope="module")
def windows(tokenizer: ReaderTokenizer) -> list[Window]:
    return [
        window
        for article in ARTICLES
        for context, pairs in article
        for question, _ in pairs
        for window in split_windows(tokenizer, question, context)
    ]


def load(checkpoint: Path) -> Any:
    return wrap_model(load_checkpoint(resolve_checkpoint(str(checkpoint))).model)


def run(reader: Any) -> torch.Tensor:
    feed = random_feed(make_reader("bert"), [20, 11], 24)
    with torch.no_grad():
        return torch.cat(reader(*(torch.from_numpy(feed[name]) for name in INPUTS)))


def calibrate_anew(checkpoint: Path, windows: list[Window], options: Any) -> Any:
    reader = load(checkpoint)
    console = Console(file=io.StringIO(), width=100)
    progress = BuildProgress(count_stages(options), console=console)
    stored = calibrate(reader, windows, INPUTS, options, progress)
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "[" in line]
    assert f"[{count_stages(options)}/{count_stages(options)}]" in lines[-1]
    return reader, stored


@pytest.mark.parametrize("method", ["max", "search"])
def test_restored_is_what_was_calibrated(
    checkpoint: Path, windows: list[Window], method: Any
) -> None:
    """A reader loaded anew, given the ranges, computes what the calibrated one does."""
    options = FakeQuantization(FULL, Calibrator(method))
    reader, stored = calibrate_anew(checkpoint, windows, options)
    assert stored.scales
    again = load(checkpoint)
    exact = run(again)
    restore(again, INPUTS, options.grids, stored)
    torch.testing.assert_close(run(again), run(reader), atol=0.1, rtol=0)
    assert not run(again).equal(exact)
    quantizers = quantizers_by_name(again.model)
    on = {name for name, quantizer in quantizers.items() if quantizer.is_enabled}
    assert on == set(stored.grids)


def test_plain_weights_are_the_same_function(
    checkpoint: Path, windows: list[Window]
) -> None:
    """Without the rounding, SmoothQuant's scales cancel, as if it had never been."""
    reader, _ = calibrate_anew(
        checkpoint, windows, FakeQuantization(FULL, Calibrator("max"))
    )
    weights = plain_weights(reader.model)
    fresh = load(checkpoint)
    assert weights.keys() == fresh.model.state_dict().keys()
    for name, tensor in fresh.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)
    fresh.model.load_state_dict(weights)
    with quantizers_off(reader.model):
        torch.testing.assert_close(run(fresh), run(reader), atol=1e-3, rtol=1e-4)


def test_gradients_pass_the_rounding(checkpoint: Path, windows: list[Window]) -> None:
    """Every weight learns, though rounding has no slope: straight through."""
    reader, _ = calibrate_anew(
        checkpoint, windows, FakeQuantization(FULL, Calibrator("max"))
    )
    feed = random_feed(make_reader("bert"), [20, 11], 24)
    start, end = reader(*(torch.from_numpy(feed[name]) for name in INPUTS))
    (start.square().sum() + end.square().sum()).backward()
    gemms = [m for m in reader.modules() if isinstance(m, torch.nn.Linear)]
    assert len(gemms) == 13
    for gemm in gemms:
        assert gemm.weight.grad is not None
        assert gemm.weight.grad.abs().max() > 0


def test_calibrating_a_copy(checkpoint: Path, windows: list[Window]) -> None:
    """What is calibrated may be a copy: the reader it came from stays in float."""
    reader = load(checkpoint)
    before = run(reader)
    console = Console(file=io.StringIO())
    options = FakeQuantization(FULL, Calibrator("max"))
    calibrate(
        copy.deepcopy(reader),
        windows,
        INPUTS,
        options,
        BuildProgress(2, console=console),
    )
    assert run(reader).equal(before)
    assert not quantizers_by_name(reader.model)


def test_tensorrt(checkpoint: Path, windows: list[Window]) -> None:
    """Softmax on the signed grid and the context unsmoothed, or it would not fuse."""
    smoothed = {}
    for tensorrt in (False, True):
        options = FakeQuantization(FULL, Calibrator("max"), tensorrt=tensorrt)
        reader, stored = calibrate_anew(checkpoint, windows, options)
        plan = options.grids.choose(find_sites(reader, INPUTS))
        leave_out = choose_unsmoothed(plan.sites)
        if tensorrt:
            assert stored.explain_difference(plan, leave_out=leave_out) == ""
        else:
            assert stored.explain_difference(plan) == ""
            assert "context" in stored.explain_difference(plan, leave_out=leave_out)
        assert ("UINT8" in stored.grids.values()) is not tensorrt
        smoothed[tensorrt] = set(stored.scales)
    contexts = {name for name in smoothed[False] if "attention.output.dense" in name}
    assert contexts
    assert smoothed[True] == smoothed[False] - contexts


def test_calibration_windows(windows: list[Window]) -> None:
    """All of few; of many as many as the build takes, evenly spaced."""
    assert choose_calibration(windows) == windows
    many = windows * 50
    chosen = choose_calibration(many)
    assert len(chosen) == 100
    assert len(chosen) <= CALIBRATION_WINDOWS
    assert chosen == many[::4]


def test_stages() -> None:
    """As many as calibrating shows."""
    assert count_stages(FakeQuantization(smooth=False)) == 1
    assert count_stages(FakeQuantization()) == 2
    assert count_stages(FakeQuantization(calibrator=Calibrator("search"))) == 3
