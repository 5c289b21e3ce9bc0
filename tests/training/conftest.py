"""Fixtures of training's tests: one tiny BERT, one tiny encoder, one file of questions."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.training import run
from tests.build.tiny import make_model
from tests.training.runs import write_articles


@pytest.fixture(scope="session", autouse=True)
def _import_modelopt() -> None:
    """Import ModelOpt once, and quietly: it warns of transformers' version."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization  # noqa: F401


@pytest.fixture(autouse=True)
def _ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's malloc as it is: other tests run in it."""
    monkeypatch.setattr(run, "keep_memory", lambda: None)


def save_checkpoint(model: Any, directory: Path) -> Path:
    """The model with the shipped tokenizer beside it."""
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint_directory() / file, directory / file)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head; its dropout is BERT's 0.1."""
    return save_checkpoint(
        make_model("bert"), tmp_path_factory.mktemp("start") / "tiny-bert"
    )


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a head, as encoders are published."""
    return save_checkpoint(
        make_model("bert").bert, tmp_path_factory.mktemp("start") / "tiny-encoder"
    )


@pytest.fixture(scope="session")
def tokenizer() -> ReaderTokenizer:
    """The shipped checkpoint's, which the tiny ones share."""
    return ReaderTokenizer.from_file(demo_checkpoint_directory() / "tokenizer.json")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions on four paragraphs of two articles."""
    return write_articles(tmp_path_factory.mktemp("questions") / "train.json")
