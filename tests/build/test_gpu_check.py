"""The GPU check, rehearsed: TensorRT and Triton are stood in for by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from int8qa import gpu_check
from int8qa.bench.scenarios import Rules
from int8qa.build.engines.tensorrt_options import PlanOptions
from int8qa.build.options import BuildOptions
from int8qa.build.quantization import RECIPES
from int8qa.build.subject import QuestionSources
from int8qa.contract import load_contract
from int8qa.errors import (
    AccuracyGateError,
    EmbeddedTritonError,
    GatewayRequestError,
    MissingDependencyError,
    ParityError,
)
from int8qa.gpu_check import GpuCheck, check_gpu, find_server
from tests.build.half import install_builder
from tests.build.tiny import POSITIONS

pytestmark = pytest.mark.slow

STUB = Path(__file__).parent.parent / "stub_tritonserver.py"


def write_server(path: Path, command: str) -> Path:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def check(
    tiny_checkpoints: dict[str, Path],
    question_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> GpuCheck:
    """Of the tiny BERT, in full INT8, once at each shape, under any load."""
    pytest.importorskip(
        "mlperf_loadgen", reason="needs MLPerf LoadGen: pip install -e '.[bench]'"
    )
    install_builder(monkeypatch)
    monkeypatch.setattr(gpu_check, "GRID_BATCHES", (1, 2, 5))
    return GpuCheck(
        options=BuildOptions(
            model_repository=tmp_path / "models",
            checkpoint=str(tiny_checkpoints["bert"]),
            recipe=RECIPES["full"],
            sources=QuestionSources(*question_files),
            gate=0.0,
            plans=PlanOptions(),
        ),
        server=write_server(
            tmp_path / "tritonserver", f'exec "{sys.executable}" "{STUB}" "$@"'
        ),
        report=tmp_path / "report.json",
        repeats=1,
        ready_timeout_s=60.0,
        rules=Rules(min_seconds=0.3, min_queries=80, bound_ms=5000.0, percentile=0.5),
    )


def read_report(check: GpuCheck) -> dict[str, object]:
    found = json.loads(check.report.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_rehearsal(check: GpuCheck, question_files: tuple[Path, Path]) -> None:
    """From checkpoint to report: plans built, served, held to PyTorch, timed."""
    said: list[str] = []
    report = check_gpu(check, said.append)
    assert read_report(check) == json.loads(json.dumps(report))
    assert (report["passed"], report["step"], report["error"]) == (True, "done", None)
    assert said[:5] == [
        "start Triton",
        "hold answers to float32",
        "time the engines",
        "time the batches",
        "load a gateway",
    ]
    contract = load_contract(check.options.model_repository)
    assert set(contract.batch_ms) == {"int8", "fp16"}
    assert all(row.keys() == {"int8", "fp16"} for row in report["cost_ms"].values())
    assert report["tensorrt"]["lock"]["version"] == "10.13.3.9"
    fp16 = report["accuracy"]["fp16"]
    assert fp16["questions"] == 2
    # Float16 by another program than the one it is held to: near, and not the same.
    assert (
        0
        < fp16["max_logit_deviation"]
        < report["accuracy"]["int8"]["max_logit_deviation"]
    )
    # Batches the contract has, lengths as far as the model reads.
    assert list(report["latency"]) == [
        f"{batch}x{tokens}" for tokens in (64, 128, POSITIONS) for batch in (1, 2)
    ]
    for row in report["latency"].values():
        assert row["int8_over_fp16"] == pytest.approx(
            row["fp16"]["p50_ms"] / row["int8"]["p50_ms"], rel=0.01
        )
    load = report["load"]
    assert [row["precision"] for row in load["headline"]] == ["int8", "fp16"]
    for run in load["runs"]:
        assert run["failures"] == {}
        assert run["gateway"]["stages_ms"]["inference"] > 0
        assert run["gateway"]["requests"] == run["queries"]
        assert run["time_ms"].keys() >= {"queue", "inference", "edge", "wire"}
        files = check.report.with_suffix("") / run["files"]
        assert (files / "mlperf_log_summary.txt").is_file()
    assert {run["scenario"] for run in load["runs"]} == {
        "SingleStream",
        "Offline",
        "Server",
    }
    assert load["gateway"]["build_id"]
    assert len(report["triton"]) == 2
    assert "successfully loaded 'qa_fp16'" in report["triton"][0]
    # Nobody's text leaves the machine.
    document = json.loads(question_files[1].read_text())
    text = check.report.read_text()
    for paragraph in document["data"][0]["paragraphs"]:
        assert paragraph["context"] not in text
        for entry in paragraph["qas"]:
            assert entry["question"] not in text


def test_without_loadgen(check: GpuCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is built."""
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingDependencyError, match="MLPerf LoadGen"):
        check_gpu(check)
    assert not check.options.model_repository.exists()
    assert not check.report.exists()


def test_gateway_that_cannot_start(
    check: GpuCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the step and the gateway's last words."""
    monkeypatch.setenv("INT8QA_NO_SUCH_SETTING", "1")
    with pytest.raises(GatewayRequestError, match=r"ended with status 78: .*NO_SUCH"):
        check_gpu(check)
    report = read_report(check)
    assert (report["passed"], report["step"]) == (False, "load a gateway")
    assert report["latency"]


def test_triton_that_cannot_load_a_plan(
    check: GpuCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the step, the error and Triton's own words."""
    make_plans = gpu_check._serve

    def damage(check: GpuCheck, contract: object, report: object) -> object:
        (check.options.model_repository / "qa_int8/1/model.plan").write_bytes(b"x")
        return make_plans(check, contract, report)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_check, "_serve", damage)
    with pytest.raises(EmbeddedTritonError, match="ended with status 1"):
        check_gpu(check)
    report = read_report(check)
    assert (report["passed"], report["step"]) == (False, "start Triton")
    assert str(report["error"]).startswith("EmbeddedTritonError: Triton ended")
    assert report["triton"] == [
        "E0101 00:00:00.0 1 stub.py:1] failed to load 'qa_int8'"
    ]
    assert report["tensorrt"]


def test_triton_that_is_never_ready(check: GpuCheck, tmp_path: Path) -> None:
    """It is stopped, and the report says for how long it was waited for."""
    server = write_server(tmp_path / "idle", "echo waiting; exec sleep 60")
    slow = dataclasses.replace(check, server=server, ready_timeout_s=0.5)
    with pytest.raises(EmbeddedTritonError, match="not loaded int8, fp16 after 0 s"):
        check_gpu(slow)
    assert read_report(check)["triton"] == ["waiting"]


def test_wrong_answers(check: GpuCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP16 that is another model, or INT8 under the gate: measured, and not passed."""
    whole = gpu_check._compare

    def spoil(name: str, **changes: float) -> None:
        def compare(options: object, infers: object) -> object:
            found = whole(options, infers)  # type: ignore[arg-type]
            return {**found, name: dataclasses.replace(found[name], **changes)}

        monkeypatch.setattr(gpu_check, "_compare", compare)

    spoil("fp16", agreement=0.89)
    with pytest.raises(ParityError, match=r"FP16 gives 89\.0 %"):
        check_gpu(check)
    assert read_report(check)["step"] == "hold answers to float32"
    monkeypatch.setattr(gpu_check, "_load_gateway", lambda *_: {"problems": ["few"]})
    spoil("int8", f1=1.0, f1_ratio=0.5, f1_ratio_margin=0.0)
    gated = dataclasses.replace(check.options, gate=0.9)
    monkeypatch.setattr("int8qa.build.pipeline.check_gate", lambda *_, **__: [])
    with pytest.raises(AccuracyGateError, match=r"INT8 keeps 50\.00"):
        check_gpu(dataclasses.replace(check, options=gated))
    report = read_report(check)
    assert report["step"] == "gate"
    assert report["latency"]
    assert "few" in report["remarks"]


def test_server_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On PATH, then where NVIDIA's images have it; else one line on where to run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_IMAGE_SERVER", tmp_path / "opt-tritonserver")
    with pytest.raises(MissingDependencyError, match="profile gpu") as caught:
        find_server()
    assert "\n" not in str(caught.value)
    image = write_server(tmp_path / "opt-tritonserver", "exit 0")
    assert find_server() == image
    found = write_server(tmp_path / "tritonserver", "exit 0")
    assert find_server() == found
