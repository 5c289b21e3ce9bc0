"""Untrusted directories: refused in one line, or loaded in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from int8qa.build.attention import ATTENTION
from int8qa.build.checkpoint import (
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_BYTES,
    demo_checkpoint_directory,
    load_checkpoint,
    resolve_checkpoint,
)
from int8qa.errors import CheckpointError
from tests.build.tiny import ARCHITECTURES, POSITIONS


def refusal(source: str) -> str:
    """The message of the refusal to resolve or load ``source``: one line, no trace."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(resolve_checkpoint(source))
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 500
    return message


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_directory(source: str) -> None:
    """What looks like a path is not asked of the hub."""
    assert refusal(source) == f"no such checkpoint directory: {source}"


def test_file_instead_of_a_directory(copied_checkpoint: Path) -> None:
    """The weights' own path is a likely slip; the message names what is wanted."""
    message = refusal(str(copied_checkpoint / "model.safetensors"))
    assert "is a file; give the directory" in message


def test_no_config(copied_checkpoint: Path) -> None:
    """Weights without a config say nothing of their architecture."""
    (copied_checkpoint / "config.json").unlink()
    assert refusal(str(copied_checkpoint)).endswith("has no config.json")


def test_oversized_config(copied_checkpoint: Path) -> None:
    """Sizes are checked before anything is parsed."""
    path = copied_checkpoint / "config.json"
    path.write_bytes(path.read_bytes() + b" " * MAX_CONFIG_BYTES)
    assert f"allowed {MAX_CONFIG_BYTES}" in refusal(str(copied_checkpoint))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vocab_size", 10**9),
        ("hidden_size", 10**6),
        pytest.param("hidden_size", 10**400, id="hidden_size-huge"),
        ("hidden_size", 0),
        ("intermediate_size", 10**9),
        ("max_position_embeddings", -1),
        ("type_vocab_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
    ],
)
def test_claimed_sizes_are_held_to_the_weights(
    copied_checkpoint: Path, name: str, size: int
) -> None:
    """A config cannot make us allocate what its weights do not hold."""
    edit_config(copied_checkpoint, **{name: size})
    with pytest.raises(CheckpointError, match=f"claims {name}") as caught:
        resolve_checkpoint(str(copied_checkpoint))  # before anything is loaded
    assert len(str(caught.value)) < 500


def test_oversized_tokenizer(copied_checkpoint: Path) -> None:
    """A tokenizer file is not read before its size is known."""
    path = copied_checkpoint / "tokenizer.json"
    with path.open("r+b") as stream:
        stream.truncate(MAX_TOKENIZER_BYTES + 1)  # a hole: takes no room on the disk
    assert f"allowed {MAX_TOKENIZER_BYTES}" in refusal(str(copied_checkpoint))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_model"}', "\0"])
def test_broken_config(copied_checkpoint: Path, text: str) -> None:
    """A config transformers cannot read ends in its first line."""
    (copied_checkpoint / "config.json").write_text(text)
    refusal(str(copied_checkpoint))


def test_pickle_only(copied_checkpoint: Path) -> None:
    """Pickles are never opened; the message says what to do with them."""
    weights = copied_checkpoint / "model.safetensors"
    weights.rename(copied_checkpoint / "pytorch_model.bin")
    message = refusal(str(copied_checkpoint))
    assert "pytorch_model.bin, a pickle that can run code: convert it" in message


def test_no_weights(copied_checkpoint: Path) -> None:
    """A config and a tokenizer alone are no checkpoint."""
    (copied_checkpoint / "model.safetensors").unlink()
    assert refusal(str(copied_checkpoint)).endswith("has no *.safetensors weights")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_broken_weights(copied_checkpoint: Path, content: bytes) -> None:
    """A file that is no safetensors file is refused, whatever it claims to hold."""
    (copied_checkpoint / "model.safetensors").write_bytes(content)
    refusal(str(copied_checkpoint))


def test_weights_of_another_shape(copied_checkpoint: Path) -> None:
    """Config and weights have to fit."""
    edit_config(copied_checkpoint, hidden_size=64)
    refusal(str(copied_checkpoint))


def test_no_head(copied_checkpoint: Path) -> None:
    """A bare encoder would answer at random; the missing weights are named."""
    from safetensors.torch import load_file, save_file

    path = copied_checkpoint / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "qa_outputs" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(str(copied_checkpoint))
    assert "lacks the weights qa_outputs.bias, qa_outputs.weight" in message
    assert "not fine-tuned for extractive question answering" in message


def test_architecture_without_question_answering(copied_checkpoint: Path) -> None:
    """An image model has no reader."""
    edit_config(copied_checkpoint, model_type="vit", architectures=["ViTModel"])
    assert "question answering" in refusal(str(copied_checkpoint))


def test_remote_code_is_not_run(copied_checkpoint: Path, tmp_path: Path) -> None:
    """A config that points at code of its own is loaded without it, or refused."""
    (copied_checkpoint / "evil.py").write_text(
        f"open({str(tmp_path / 'owned')!r}, 'w')\n"
    )
    edit_config(
        copied_checkpoint,
        model_type="evil",
        auto_map={
            "AutoConfig": "evil.Config",
            "AutoModelForQuestionAnswering": "evil.Model",
        },
    )
    refusal(str(copied_checkpoint))
    assert not (tmp_path / "owned").exists()


def test_no_tokenizer(copied_checkpoint: Path) -> None:
    """A reader without its tokenizer cannot read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied_checkpoint / name).unlink()
    assert "tokenizer" in refusal(str(copied_checkpoint))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["no spaces allowed", "a/b/c", "--", "x" * 200])
def test_no_hub_id(source: str) -> None:
    """What is neither a path nor a hub id is said to be neither."""
    message = refusal(source)
    assert source in message
    assert "hub id" in message or "no such checkpoint directory" in message


@pytest.mark.usefixtures("offline")
def test_unreachable_hub() -> None:
    """Without the hub the message says so, and what to do instead."""
    message = refusal("acme/reader")
    assert message.startswith("acme/reader is no directory here, and the hub could not")
    assert message.endswith("Download it elsewhere and pass its directory")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_checkpoints_load(tiny_checkpoints: dict[str, Path], name: str) -> None:
    """Each architecture loads in float32, with our attention and its own limits."""
    import torch

    directory = tiny_checkpoints[name]
    checkpoint = load_checkpoint(resolve_checkpoint(str(directory)))
    assert checkpoint.files.name == f"tiny-{name}"
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    assert not checkpoint.model.training
    assert checkpoint.model.config._attn_implementation == ATTENTION
    assert checkpoint.max_positions == POSITIONS
    assert checkpoint.takes_token_types == (name in {"bert", "electra"})
    assert checkpoint.pad_token_id == 0
    own = (directory / "tokenizer.json").read_bytes()
    assert checkpoint.tokenizer_json == own


def test_demo_loads() -> None:
    """The shipped checkpoint, stored in half precision, loads in float32."""
    import torch

    files = resolve_checkpoint(str(demo_checkpoint_directory()))
    assert files.name == "int8qa-demo-minilm-l6"
    checkpoint = load_checkpoint(files)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
    assert checkpoint.max_positions == 512
    assert checkpoint.takes_token_types


def test_hash_covers_every_file(copied_checkpoint: Path) -> None:
    """Config, weights and tokenizer each change the identity; other files do not."""
    source = str(copied_checkpoint)
    hashes = {resolve_checkpoint(source).sha256}
    (copied_checkpoint / "README.md").write_text("about")
    assert resolve_checkpoint(source).sha256 in hashes
    for count, name in enumerate(
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ):
        path = copied_checkpoint / name
        path.write_bytes(path.read_bytes() + b" ")
        hashes.add(resolve_checkpoint(source).sha256)
        assert len(hashes) == count + 2


def test_copy_has_the_same_hash(copied_checkpoint: Path, tmp_path: Path) -> None:
    """The identity is the content, not the place."""
    other = shutil.copytree(copied_checkpoint, tmp_path / "elsewhere")
    left = resolve_checkpoint(str(copied_checkpoint))
    right = resolve_checkpoint(str(other))
    assert left.sha256 == right.sha256
    assert (left.name, right.name) == ("tiny-bert", "elsewhere")


def test_vocabulary_file_is_converted(copied_checkpoint: Path, tmp_path: Path) -> None:
    """Older checkpoints carry vocab.txt; the tokenizer made of it reads the same."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(copied_checkpoint / "tokenizer.json"))
    words = sorted(own.get_vocab().items(), key=lambda item: item[1])
    (copied_checkpoint / "vocab.txt").write_text(
        "".join(f"{word}\n" for word, _ in words), encoding="utf-8"
    )
    (copied_checkpoint / "tokenizer.json").unlink()
    checkpoint = load_checkpoint(resolve_checkpoint(str(copied_checkpoint)))
    converted = Tokenizer.from_str(checkpoint.tokenizer_json.decode())
    text = "Who built Torvik's mill in 1902?"
    assert converted.encode(text).ids == own.encode(text).ids
