"""The engines' grid: what is timed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from int8qa.bench import engine_grid
from int8qa.bench.engine_grid import bench_engines
from int8qa.bench.report import tabulate_times, write_report
from int8qa.contract import (
    CONTRACT_FILENAME,
    INPUT_IDS,
    Contract,
    Precision,
)
from int8qa.errors import ContractError, MissingDependencyError
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import TOKENIZER_JSON, build_contract


@pytest.fixture
def contract() -> Contract:
    built = build_contract(ReaderTokenizer.from_file(TOKENIZER_JSON))
    return built.model_copy(
        update={
            "batch_sizes": (1, 4),
            "max_batch_tokens": 512,
            "models": {
                name: model.model_copy(update={"engine": "openvino"})
                for name, model in built.models.items()
            },
        }
    )


@pytest.fixture
def repository(contract: Contract, tmp_path: Path) -> Path:
    (tmp_path / CONTRACT_FILENAME).write_text(contract.model_dump_json())
    return tmp_path


def test_grid(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches and lengths the contract serves, each engine in turn; JSON and page."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def load(_: Path, __: Contract, precisions: Any) -> Any:
        def make(name: str) -> Any:
            def infer(feed: Any) -> Any:
                seen.append((name, feed[INPUT_IDS].shape))
                return np.zeros(1), np.zeros(1)

            return infer

        infers = {str(p): make(str(p)) for p in precisions}
        return infers, dict.fromkeys(infers, "i8")

    monkeypatch.setattr(engine_grid, "load_engines", load)
    told: list[tuple[str, int]] = []
    result = bench_engines(
        repository,
        precisions=(Precision.INT8, Precision.FP16),
        lengths=(100, 128, 9999),
        repeats=3,
        on_shape=lambda *shape: told.append(shape),
    )
    # 4 x 384 is more than is served at once.
    assert told == [("1x128", 3), ("4x128", 3), ("1x384", 3)]
    assert list(result["latency"]) == ["1x128", "4x128", "1x384"]
    assert {shape for _, shape in seen} == {(1, 128), (4, 128), (1, 384)}
    assert {name for name, _ in seen} == {"int8", "fp16"}
    assert result["latency"]["1x128"]["fp16"]["runs"] == 3
    assert result["grid"]["ms"]["int8"][1][1] is None
    assert result["int8_gain"].keys() == {"fp16"}
    data, page = write_report(result, tmp_path)
    assert json.loads(data.read_text()) == result
    assert "INT8 against FP16" in page.read_text()
    table = tabulate_times(result)
    assert len(table["head"]) == len(table["rows"][0]) == 5


def test_models_beside_older_ones(
    repository: Path,
    contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build beside a running one has names of its own; those engines are timed."""
    later = contract.model_copy(update={"generation": 2})
    (repository / CONTRACT_FILENAME).write_text(later.model_dump_json())
    opened: list[Path] = []

    def refuse(path: Path, **_: object) -> None:
        opened.append(path)
        raise ContractError(str(path))

    monkeypatch.setattr("int8qa.build.engines.openvino.OpenVinoEngine", refuse)
    with pytest.raises(ContractError):
        bench_engines(repository, precisions=(Precision.INT8,))
    (path,) = opened
    assert path.relative_to(repository).parts[0] == later.triton_name(Precision.INT8)
    assert later.triton_name(Precision.INT8) != contract.triton_name(Precision.INT8)


def test_precision_that_was_not_built(repository: Path, contract: Contract) -> None:
    """Refused, with what there is."""
    models = {Precision.INT8: contract.models[Precision.INT8]}
    some = contract.model_copy(update={"models": models})
    (repository / CONTRACT_FILENAME).write_text(some.model_dump_json())
    with pytest.raises(ContractError, match="has no fp16: it was built with int8"):
        bench_engines(repository, precisions=(Precision.FP16,))


def test_engines_of_triton_only(repository: Path, contract: Contract) -> None:
    """TensorRT's plans are not run here; the message says what runs them."""
    models = {
        name: model.model_copy(update={"engine": "tensorrt"})
        for name, model in contract.models.items()
    }
    plans = contract.model_copy(update={"models": models})
    (repository / CONTRACT_FILENAME).write_text(plans.model_dump_json())
    with pytest.raises(MissingDependencyError, match="gpu-check"):
        bench_engines(repository)


def test_no_repository(tmp_path: Path) -> None:
    """Nothing to time."""
    with pytest.raises(ContractError):
        bench_engines(tmp_path / "none")
