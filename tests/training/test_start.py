"""What a run starts from, and whom it learns from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
from int8qa.errors import CheckpointError
from int8qa.training.start import load_start, load_teacher
from tests.build.tiny import make_model
from tests.training.conftest import save_checkpoint

TEXTS = ["Who built the mill?", "The pump needs 40 litres of oil."]


def weights_of(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


def test_fine_tuned_checkpoint(checkpoint: Path) -> None:
    """Loaded as the build loads it."""
    files = resolve_checkpoint(str(checkpoint))
    loaded, fresh = load_start(files, seed=0)
    assert not fresh
    expected = weights_of(load_checkpoint(files).model)
    found = weights_of(loaded.model)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_bare_encoder(encoder: Path) -> None:
    """It gets a head that the seed decides; its own weights stay."""
    files = resolve_checkpoint(str(encoder))
    models = []
    for seed in (0, 0, 1):
        loaded, fresh = load_start(files, seed=seed)
        assert fresh
        assert loaded.files is files
        assert not loaded.model.training
        models.append(weights_of(loaded.model))
    heads = [weights["qa_outputs.weight"] for weights in models]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])
    stored = load_file(encoder / "model.safetensors")
    for name, tensor in stored.items():
        if not name.startswith("pooler"):
            assert models[2][f"bert.{name}"].equal(tensor)


def test_incomplete_encoder(encoder: Path, tmp_path: Path) -> None:
    """More than the head is missing: random layers are not trained."""
    directory = Path(shutil.copytree(encoder, tmp_path / "broken"))
    weights = load_file(directory / "model.safetensors")
    kept = {name: t for name, t in weights.items() if "layer.1." not in name}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 16 weights of its encoder \(bert"
    ):
        load_start(resolve_checkpoint(str(directory)), seed=0)


def test_no_encoder(encoder: Path, tmp_path: Path) -> None:
    """Transformers' reason is passed on, in one line."""
    directory = Path(shutil.copytree(encoder, tmp_path / "strange"))
    (directory / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(CheckpointError) as caught:
        load_start(resolve_checkpoint(str(directory)), seed=0)
    assert "not a checkpoint transformers can load" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def teach(checkpoint: Path, teacher: Path, longest: int = 128) -> Any:
    student = load_checkpoint(resolve_checkpoint(str(checkpoint)))
    files = resolve_checkpoint(str(teacher))
    return load_teacher(files, student, TEXTS, max_window_tokens=longest)


def test_teacher(checkpoint: Path, tmp_path: Path) -> None:
    """Any architecture with the same tokens; frozen, and without dropout."""
    other = save_checkpoint(make_model("distilbert"), tmp_path / "teacher")
    for directory in (checkpoint, other):
        model = teach(checkpoint, directory)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_teacher_of_other_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Found on the texts to be learned from, whatever the files are called."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "teacher"))
    described = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["mill"], vocabulary["pump"] = vocabulary["pump"], vocabulary["mill"]
    (directory / "tokenizer.json").write_text(json.dumps(described))
    assert Tokenizer.from_file(str(directory / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="cannot teach tiny-bert: it splits"):
        teach(checkpoint, directory)


def test_teacher_of_short_texts(checkpoint: Path) -> None:
    """It must read the windows of its student."""
    with pytest.raises(CheckpointError, match=r"reads 256 tokens, .* up to 384"):
        teach(checkpoint, checkpoint, 384)
