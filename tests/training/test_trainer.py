"""Batches, learning rates by layer, and folders of checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from int8qa.build.export import wrap_model
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import split_windows
from int8qa.training.examples import TrainingWindow
from int8qa.training.trainer import (
    ALLOWED,
    FIRST,
    LAST,
    CheckpointClock,
    collate,
    group_parameters,
    list_checkpoints,
    set_dropout,
)
from tests.build.tiny import ARCHITECTURES, make_model

INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)
VOTES = ((3, 4), (4, 4), (3, 4), (0, 0))


@pytest.fixture
def windows(tokenizer: ReaderTokenizer) -> list[TrainingWindow]:
    """Two, of different lengths."""
    texts = ("The mill burned in 1931.", "Oil.")
    return [
        TrainingWindow(split_windows(tokenizer, "When?", text)[0], places, 0)
        for text, places in zip(texts, (((0, 0),), VOTES), strict=True)
    ]


def test_batch(windows: list[TrainingWindow]) -> None:
    """Padded on the right to a multiple of eight; only context and null may answer."""
    batch = collate(windows, INPUTS, pad_token_id=9)
    lengths = [len(item.window) for item in windows]
    assert batch[INPUT_IDS].shape == (2, -(-max(lengths) // 8) * 8)
    for row, item in enumerate(windows):
        window, size = item.window, len(item.window)
        np.testing.assert_array_equal(batch[INPUT_IDS][row, :size], window.input_ids)
        assert (batch[INPUT_IDS][row, size:] == 9).all()
        assert batch[ATTENTION_MASK][row].tolist() == [1] * size + [0] * (
            batch[ATTENTION_MASK].shape[1] - size
        )
        np.testing.assert_array_equal(
            batch[TOKEN_TYPE_IDS][row, :size], window.token_type_ids
        )
        allowed = np.flatnonzero(batch[ALLOWED][row]).tolist()
        assert allowed == [0, *range(window.context_start, window.context_end)]
    assert batch[FIRST].sum(1).tolist() == batch[LAST].sum(1).tolist() == [1, 1]
    assert batch[FIRST][:, [0, 3, 4]].tolist() == [[1, 0, 0], [0.25, 0.5, 0.25]]
    assert batch[LAST][:, [0, 3, 4]].tolist() == [[1, 0, 0], [0.25, 0, 0.75]]
    assert TOKEN_TYPE_IDS not in collate(windows, INPUTS[:2], 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rates_by_layer(architecture: str) -> None:
    """The head learns fastest, embeddings slowest; each parameter is in one group."""
    model = wrap_model(make_model(architecture))
    groups = group_parameters(model, learning_rate=1.0, decay=0.5, weight_decay=0.1)
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert rates.keys() == {id(parameter) for parameter in named.values()}
    assert sum(len(group["params"]) for group in groups) == len(named)
    for name, parameter in named.items():
        rate, decay = rates[id(parameter)]
        assert decay == (0.1 if parameter.ndim > 1 else 0.0), name
        if ".layer.1." in name:
            assert rate == 0.5, name
        elif ".layer.0." in name:
            assert rate == 0.25, name
        elif "embeddings" in name and "project" not in name:
            assert rate == 0.125, name
        elif "qa_outputs" in name:
            assert rate == 1.0, name


def test_frozen_parameters_are_not_trained() -> None:
    """They are in no group."""
    model = wrap_model(make_model("bert"))
    model.model.bert.embeddings.requires_grad_(requires_grad=False)
    groups = group_parameters(model, learning_rate=1.0, decay=0.5, weight_decay=0.1)
    assert min(group["lr"] for group in groups) == 0.25


def test_checkpoints_in_order(tmp_path: Path) -> None:
    """By number; what is called otherwise is none."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "partial", "aside"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]
    assert list_checkpoints(tmp_path / "absent") == []


def test_checkpoint_when_due() -> None:
    """After the time, at the end and when asked to stop; not before."""
    seen: list[int] = []
    patient, eager = CheckpointClock(1e6, seen.append), CheckpointClock(0.0)

    def ask(clock: CheckpointClock, step: int) -> tuple[bool, bool]:
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        clock.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
        return control.should_save, control.should_training_stop

    assert ask(eager, 1) == (True, False)
    assert ask(patient, 1) == (False, False)
    assert ask(patient, 9) == (True, False)
    patient.ask_to_stop()
    assert ask(patient, 2) == (True, True)
    assert seen == [1, 9, 2]


def test_dropout() -> None:
    """Everywhere, attention's too; None leaves the checkpoint's."""
    model = make_model("bert")
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.3

    def found() -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    set_dropout(model, None)
    assert found() == {0.1, 0.3}
    set_dropout(model, 0.0)
    assert found() == {0.0}
