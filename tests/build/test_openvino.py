"""What runs is held to what was asked for: rulings by hand, and real compilations."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from int8qa.build.engines import openvino
from int8qa.build.engines.openvino import (
    MODEL_FILENAME,
    Execution,
    OpenVinoEngine,
    check_execution,
    compile_graph,
    list_int8_hints,
    save_ir,
    write_cpu,
)
from int8qa.build.engines.signal_stack import read_signal_stack
from int8qa.contract import ATTENTION_MASK, Precision
from int8qa.errors import EnginePrecisionError, ExportError
from tests.build.tiny import Graphs, make_reader, random_feed, run_onnx

OLD_CPU = ("FP32", "INT8", "BIN")
NEW_CPU = ("FP32", "FP16", "INT8", "BIN")


def execution(gemms: dict[str, int], capabilities: tuple[str, ...]) -> Execution:
    return Execution(
        gemms=gemms, attentions={}, device="Test CPU", capabilities=capabilities
    )


def test_int8_that_runs_in_float() -> None:
    """One quantized GEMM in float is one too many; the message counts both."""
    found = execution({"i8": 35, "f32": 2}, NEW_CPU)
    with pytest.raises(EnginePrecisionError, match="runs 35 of 36 quantized GEMMs"):
        check_execution(found, Precision.INT8, quantized_gemms=36)


@pytest.mark.parametrize("gemms", [{"i8": 36, "f16": 1}, {"u8": 30, "i8": 6}])
def test_int8_that_runs(gemms: dict[str, int]) -> None:
    """Signed or unsigned, it is INT8; the float head does not matter."""
    found = execution(gemms, OLD_CPU)
    assert check_execution(found, Precision.INT8, quantized_gemms=36) == []


@pytest.mark.parametrize(
    ("attentions", "ran"),
    [({"f32": 6}, 0), ({"i8": 4, "f32": 2}, 4), ({"i8": 6}, 6), ({}, 0), ({}, 6)],
)
def test_attention_that_runs_in_float(attentions: dict[str, int], ran: int) -> None:
    """Not an error, but said, with what would do as well; fused or not."""
    gemms = {"u8": 36} if attentions else {"u8": 36, "i8": 2 * ran, "f32": 12 - 2 * ran}
    found = replace(execution(gemms, OLD_CPU), attentions=attentions)
    remarks = check_execution(
        found, Precision.INT8, quantized_gemms=36, quantized_attentions=6
    )
    assert [r.partition(" in INT8")[0] for r in remarks] == [
        f"OpenVINO runs {ran} of 6 quantized attentions"
    ] * (ran < 6)
    assert check_execution(found, Precision.INT8, quantized_gemms=36) == []


@pytest.mark.parametrize("gemms", [{"f32": 37}, {"f16": 36, "f32": 1}, {"bf16": 37}])
def test_unused_half_kernels(gemms: dict[str, int]) -> None:
    """A CPU with float16 kernels has to use them for all GEMMs."""
    with pytest.raises(EnginePrecisionError, match="of 37 GEMMs in f16"):
        check_execution(execution(gemms, NEW_CPU), Precision.FP16, quantized_gemms=0)


def test_used_half_kernels() -> None:
    """All GEMMs in float16: nothing to remark."""
    found = execution({"f16": 37}, NEW_CPU)
    assert check_execution(found, Precision.FP16, quantized_gemms=0) == []


def test_cpu_without_half_kernels() -> None:
    """Not an error, but said: the FP16 row of the table is then something else."""
    found = execution({"f32": 30, "bf16": 7}, OLD_CPU)
    remarks = check_execution(found, Precision.FP16, quantized_gemms=0)
    assert remarks == [
        "Test CPU has no f16 kernels; OpenVINO runs the FP16 model in f32+bf16"
    ]


def test_fp32_has_no_ruling() -> None:
    """The reference runs in whatever float32 is."""
    found = execution({"f32": 37}, NEW_CPU)
    assert check_execution(found, Precision.FP32, quantized_gemms=36) == []


@pytest.mark.parametrize("precision", Precision)
def test_reference_kernels(precision: Precision) -> None:
    """One GEMM in a reference kernel is refused before it is waited for."""
    found = replace(execution({"i8": 36, "f16": 1}, OLD_CPU), reference_gemms=30)
    with pytest.raises(EnginePrecisionError, match="no fast kernel on Test CPU for 30"):
        check_execution(found, precision, quantized_gemms=36)


def test_cpu_without_what_a_model_needs(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before it gives wrong answers; with one of several sets it runs."""
    model = onnx.load_from_string(graphs.quantized_clean)
    path, _ = save_ir(model, tmp_path, Precision.INT8)
    write_cpu(tmp_path, {"avx_vnni", "avx512_vnni"})
    monkeypatch.setattr(openvino, "cpu_features", lambda: ["avx2", "avx_vnni"])
    OpenVinoEngine(path)
    monkeypatch.setattr(openvino, "cpu_features", lambda: ["avx2"])
    with pytest.raises(
        EnginePrecisionError, match="built for CPUs with avx512_vnni or"
    ):
        OpenVinoEngine(path)


def test_int8_hints() -> None:
    """The finest first, float16 never, bfloat16 where the CPU has it."""
    assert list_int8_hints(OLD_CPU) == ("f32",)
    assert list_int8_hints(NEW_CPU) == ("f32",)
    assert list_int8_hints(("BF16", *NEW_CPU)) == ("f32", "bf16")


@pytest.fixture(scope="module")
def engines(
    graphs: Graphs, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, tuple[OpenVinoEngine, Path, int]]:
    """The tiny BERT, compiled as the build does it: engine, IR and its bytes."""
    compiled = {}
    for precision in Precision:
        int8 = precision is Precision.INT8
        graph = graphs.quantized_clean if int8 else graphs.float_clean
        directory = tmp_path_factory.mktemp(str(precision))
        model = onnx.load_from_string(graph)
        engine, size = compile_graph(model, directory, precision)
        compiled[precision] = (engine, directory / MODEL_FILENAME, size)
    return compiled


@pytest.mark.parametrize("precision", Precision)
def test_compiled_precision(engines: Any, precision: Precision) -> None:
    """This machine runs what was asked for, or says what it runs instead."""
    found = engines[precision][0].execution
    remarks = check_execution(found, precision, quantized_gemms=12)
    # 12 GEMMs of the encoder, the scores and the context of attention, the head; some
    # versions fuse attention into one operator.
    assert 13 <= sum(found.gemms.values()) <= 17
    assert found.device
    assert found.reference_gemms == 0
    wants_half = precision is Precision.FP16 and "FP16" not in found.capabilities
    assert len(remarks) == wants_half


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(Precision.FP32, 1e-4), (Precision.FP16, 0.5), (Precision.INT8, 1.0)],
)
def test_compiled_logits(
    engines: Any, graphs: Graphs, precision: Precision, tolerance: float
) -> None:
    """OpenVINO's logits are ONNX Runtime's, within the precision's rounding."""
    feed = random_feed(make_reader("bert"), [21, 32], 32)
    int8 = precision is Precision.INT8
    graph = graphs.quantized_clean if int8 else graphs.float_clean
    expected = run_onnx(onnx.load_from_string(graph), feed)
    found = engines[precision][0].infer(feed)
    real = feed[ATTENTION_MASK] == 1
    for left, right in zip(expected, found, strict=True):
        assert right.dtype == np.float32
        np.testing.assert_allclose(right[real], left[real], atol=tolerance, rtol=0)


def test_logits_are_copies(engines: Any) -> None:
    """A second question does not overwrite the logits of the first."""
    engine = engines[Precision.FP32][0]
    reader = make_reader("bert")
    first, _ = engine.infer(random_feed(reader, [16], 16, seed=1))
    kept = first.copy()
    engine.infer(random_feed(reader, [16], 16, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_files(engines: Any) -> None:
    """The model's two files and its properties; smaller types make smaller files."""
    sizes = {}
    for precision, (_, path, size) in engines.items():
        files = sorted(file.name for file in path.parent.iterdir())
        assert files == ["model.bin", "model.xml", "properties.json"]
        model = (path, path.with_suffix(".bin"))
        assert size == sum(file.stat().st_size for file in model)
        sizes[precision] = path.with_suffix(".bin").stat().st_size
    assert sizes[Precision.FP16] < 0.55 * sizes[Precision.FP32]
    assert sizes[Precision.INT8] < sizes[Precision.FP32]


def test_graph_openvino_does_not_know(tmp_path: Path) -> None:
    """An unknown operator is an ExportError of one line, and leaves no file."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Unheard", ["x"], ["y"], domain="of.it")
    graph = helper.make_graph([node], "g", [value], [result])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("of.it", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    with pytest.raises(ExportError, match="OpenVINO cannot convert") as caught:
        save_ir(model, tmp_path, Precision.INT8)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_hint(graphs: Graphs, tmp_path: Path) -> None:
    """Another hint moves the float parts of an INT8 graph, and leaves its GEMMs INT8."""
    graph = onnx.load_from_string(graphs.quantized_clean)
    path, _ = save_ir(graph, tmp_path, Precision.INT8)
    feed = random_feed(make_reader("bert"), [21, 32], 32)
    fine = OpenVinoEngine(path)
    assert fine.hint == "f32"
    assert fine.execution.gemms.keys() <= {"i8", "u8", "f32"}
    coarse = OpenVinoEngine(path, hint="bf16")
    for engine in (fine, coarse):
        gemms = engine.execution.gemms
        assert gemms.get("i8", 0) + gemms.get("u8", 0) == 12
    expected = run_onnx(graph, feed)
    real = feed[ATTENTION_MASK] == 1
    errors = [
        float(np.abs(engine.infer(feed)[0] - expected[0])[real].max())
        for engine in (fine, coarse)
    ]
    assert errors[0] <= 1.0
    assert (errors[0] != errors[1]) == ("BF16" in fine.execution.capabilities)


def test_int8_in_float16_has_no_kernel(graphs: Graphs, tmp_path: Path) -> None:
    """Why INT8 is never hinted float16. If this fails, ``list_int8_hints`` may have it.

    OpenVINO 2026.4 either mixes types that one product cannot take, or runs the GEMMs
    that write float16 in its reference.
    """
    graph = onnx.load_from_string(graphs.quantized_clean)
    path, _ = save_ir(graph, tmp_path, Precision.INT8)
    fine = OpenVinoEngine(path)
    if "FP16" not in fine.execution.capabilities:
        pytest.skip("this CPU has no float16 kernels; the hint falls back")
    try:
        reference_gemms = OpenVinoEngine(path, hint="f16").execution.reference_gemms
    except RuntimeError:  # "Arguments do not have the same element type"
        return
    assert reference_gemms > 0


def test_stack_for_signals_stays_ours(graphs: Graphs, tmp_path: Path) -> None:
    """An engine leaves no stack behind that is freed with it, maybe elsewhere."""
    graph = onnx.load_from_string(graphs.float_clean)
    path, _ = save_ir(graph, tmp_path, Precision.FP32)
    before = read_signal_stack()
    engine = OpenVinoEngine(path)
    after = read_signal_stack()
    assert before is not None
    assert after is not None
    assert (after.address, after.flags) == (before.address, before.flags)
    thread = threading.Thread(target=lambda engines: engines.clear(), args=[[engine]])
    del engine
    thread.start()
    thread.join()
    caught = []
    usual = signal.signal(signal.SIGUSR2, lambda number, _: caught.append(number))
    try:
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, usual)
    assert caught == [signal.SIGUSR2]
