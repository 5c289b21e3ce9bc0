"""What the float parts of INT8 run in: the choice by hand, and a real compilation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from int8qa.build import float_parts
from int8qa.build.engines.openvino import (
    CPU_FILENAME,
    MODEL_FILENAME,
    OpenVinoEngine,
)
from int8qa.build.float_parts import Int8Compiler, choose_hint
from tests.build.tiny import Graphs

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.parametrize(
    ("bf16", "hint"),
    [
        ((10.0, 10.0), "f32"),
        ((5.0, 5.0), "bf16"),
        ((9.9, 9.9), "f32"),
        ((9.6, 9.6), "bf16"),
        ((5.0, 25.0), "f32"),
        ((8.0, 11.0), "bf16"),
    ],
)
def test_choice(bf16: tuple[float, float], hint: str) -> None:
    """The coarser type has to be 3 % faster, in the geometric mean over the shapes."""
    shapes = zip(("1x128", "8x128"), bf16, strict=True)
    assert choose_hint({name: {"f32": 10.0, "bf16": ms} for name, ms in shapes}) == hint


@pytest.mark.parametrize("winner", ["f32", "bf16"])
def test_chosen_once(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    """The first graph decides, what follows runs in the same type."""
    monkeypatch.setattr(float_parts, "choose_hint", lambda _: winner)
    graph = onnx.load_from_string(graphs.quantized_clean)
    compiler = Int8Compiler(INPUTS, 32)
    assert compiler.hint == "f32"
    engine, _ = compiler.compile(graph, tmp_path)
    assert compiler.parts is not None
    if "BF16" not in engine.execution.capabilities:
        assert compiler.parts.ms == {}
        winner = "f32"
    else:
        assert set(compiler.parts.ms["1x32"]) == {"f32", "bf16"}
    assert engine.hint == compiler.hint == winner
    # Whoever compiles it later, the server first of all, does so in the same type.
    assert OpenVinoEngine(tmp_path / MODEL_FILENAME).hint == winner
    monkeypatch.setattr(float_parts, "choose_hint", lambda _: pytest.fail("again"))
    second, _ = compiler.compile(graph, tmp_path)
    assert second.hint == winner


@pytest.mark.parametrize("unsigned", [False, True])
def test_unsigned_where_it_multiplies_so(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsigned: bool
) -> None:
    """Without VNNI unsigned inputs would overflow; with it the model says so."""
    monkeypatch.setattr(float_parts, "has_vnni", lambda: unsigned)
    monkeypatch.setattr(float_parts, "choose_hint", lambda _: "f32")
    graph = onnx.load_from_string(graphs.quantized_clean)
    engine, _ = Int8Compiler(INPUTS, 32).compile(graph, tmp_path)
    assert engine.execution.gemms.get("u8", 0) == (12 if unsigned else 0)
    assert (tmp_path / CPU_FILENAME).exists() == unsigned


def test_reference_kernels_are_not_timed(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type without fast kernels is left out before anything waits for it."""
    monkeypatch.setattr(float_parts, "list_int8_hints", lambda _: ("f32", "bf16"))
    monkeypatch.setattr(float_parts, "time_engines", lambda *_: pytest.fail("timed"))

    class Slow(OpenVinoEngine):
        """As if OpenVINO had nothing but its reference for float32."""

        def __init__(self, path: Path, *, hint: str | None = None) -> None:
            super().__init__(path, hint=hint)
            slow = int(self.hint == "f32")
            self.execution = replace(self.execution, reference_gemms=slow)

    monkeypatch.setattr(float_parts, "OpenVinoEngine", Slow)
    compiler = Int8Compiler(INPUTS, 32)
    graph = onnx.load_from_string(graphs.quantized_clean)
    engine, _ = compiler.compile(graph, tmp_path)
    assert engine.hint == compiler.hint == "bf16"
