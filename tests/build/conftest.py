"""Fixtures of the build stage's tests; each model is made and exported once."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.build.export import export_onnx
from int8qa.build.graph import clean_graph
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_windows
from tests.build.tiny import (
    ARCHITECTURES,
    CALIBRATION,
    EVALUATION,
    CalibratedReader,
    Graphs,
    TinyReader,
    calibrate_reader,
    make_reader,
    write_squad,
)


@pytest.fixture(scope="session", autouse=True)
def _import_modelopt() -> None:
    """Import ModelOpt once, and quietly: it warns of transformers' version."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization  # noqa: F401


@pytest.fixture(scope="session")
def readers() -> dict[str, TinyReader]:
    """All architectures, for reading only."""
    return {name: make_reader(name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tokenizer() -> ReaderTokenizer:
    """The shipped checkpoint's tokenizer, which the tiny checkpoints share."""
    return ReaderTokenizer.from_file(demo_checkpoint_directory() / "tokenizer.json")


@pytest.fixture(scope="session")
def windows(tokenizer: ReaderTokenizer) -> list[Window]:
    """The windows of the calibration questions."""
    return [
        window
        for context, pairs in CALIBRATION
        for question, _ in pairs
        for window in split_windows(tokenizer, question, context)
    ]


@pytest.fixture(scope="session")
def graphs(windows: list[Window]) -> Graphs:
    """Exported once for all tests; parse the bytes before changing anything."""
    import onnx

    reader = make_reader("bert")
    float_raw = export_onnx(reader.wrapped, reader.inputs).SerializeToString()
    quantized_raw = calibrate_reader("bert", windows, "linear").exported
    return Graphs(
        reader.inputs,
        float_raw,
        clean_graph(onnx.load_from_string(float_raw)).SerializeToString(),
        quantized_raw,
        clean_graph(onnx.load_from_string(quantized_raw)).SerializeToString(),
    )


@pytest.fixture(scope="session")
def calibrated(windows: list[Window]) -> Callable[[str], CalibratedReader]:
    """An architecture, calibrated and exported as ``full``; made once, on demand."""
    return functools.cache(lambda name: calibrate_reader(name, windows, "full"))


@pytest.fixture(scope="session")
def tiny_checkpoints(
    readers: dict[str, TinyReader], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A directory per architecture: config, safetensors, tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    directories = {}
    for name, reader in readers.items():
        directory = root / f"tiny-{name}"
        reader.model.save_pretrained(directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_checkpoint_directory() / file, directory / file)
        directories[name] = directory
    return directories


@pytest.fixture
def copied_checkpoint(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny BERT's directory, to be changed at will."""
    return Path(shutil.copytree(tiny_checkpoints["bert"], tmp_path / "tiny-bert"))


@pytest.fixture(scope="session")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibration and evaluation questions that share nothing."""
    root = tmp_path_factory.mktemp("questions")
    return (
        write_squad(root / "calibration.json", CALIBRATION),
        write_squad(root / "evaluation.json", EVALUATION),
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No hub, and an empty cache of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return
