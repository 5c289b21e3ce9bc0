"""A checkpoint, from the Hugging Face hub or a directory, as a float32 reader.

In: a hub id or a directory. Out: a torch model in float32 whose attention quantizers
can reach, its tokenizer as one ``tokenizer.json``, and the hash of every file.
Checkpoints are untrusted: safetensors only, no remote code, sizes checked first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa.build.attention import register_attention
from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20
"""Of one tokenizer file; the largest vocabularies in use have a tenth."""
MAX_LAYERS = 1024
_HUB_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_TOKENIZER_PATTERNS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
]
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where a checkpoint lies on disk and what identifies it."""

    name: str
    """Hub id, or the directory's name."""
    directory: Path
    sha256: str
    """Over the names and bytes of config, weights and tokenizer files."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded reader: the torch model in float32 and its tokenizer."""

    files: CheckpointFiles
    model: torch.nn.Module
    tokenizer_json: bytes
    pad_token_id: int
    max_positions: int
    """Longest input the position embeddings allow, in tokens."""
    takes_token_types: bool
    """False for models without segment embeddings (DistilBERT, RoBERTa)."""


def demo_checkpoint_directory() -> Path:
    """The checkpoint that ships with int8qa."""
    return Path(str(resources.files("int8qa"))) / "data" / "checkpoint"


def resolve_checkpoint(source: str, *, revision: str | None = None) -> CheckpointFiles:
    """Find ``source`` on disk, or fetch it from the hub, and hash it.

    Args:
        source: a directory, or a hub id such as ``deepset/bert-base-cased-squad2``.
        revision: branch, tag or commit; only for hub ids.

    Raises:
        CheckpointError: neither a directory nor a reachable hub id, or without
            config, safetensors weights or tokenizer.
    """
    path = Path(source)
    if path.is_dir():
        directory, name = path, path.resolve().name
        if path.resolve() == demo_checkpoint_directory().resolve():
            name = _demo_name(directory)
    elif path.exists():
        raise CheckpointError(
            f"{source} is a file; give the directory that holds config.json and "
            f"model.safetensors, or a hub id"
        )
    else:
        directory, name = _download(source, revision), source
    _check_files(directory)
    return CheckpointFiles(
        name=name, directory=directory, sha256=_hash_files(directory)
    )


def _demo_name(directory: Path) -> str:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return "int8qa-demo"
    return str(config.get("int8qa_name", "int8qa-demo-minilm-l6"))


def _download(source: str, revision: str | None) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(f"no such checkpoint directory: {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=_HUB_PATTERNS + _TOKENIZER_PATTERNS,
            )
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{source} is neither a directory nor a valid hub id"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise CheckpointError(
            f"the hub refused {source} (HTTP {status}): check the id, the revision "
            f"and, for private models, the HF_TOKEN variable"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no directory here, and the hub could not be reached or "
            f"has no copy in the local cache ({type(error).__name__}). Download it "
            f"elsewhere and pass its directory"
        ) from error


def _check_files(directory: Path) -> None:
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{directory} has no config.json")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{config} has {config.stat().st_size} bytes; allowed {MAX_CONFIG_BYTES}"
        )
    if not any(directory.glob("*.safetensors")):
        found = sorted(p.name for p in directory.glob("*.bin"))
        hint = (
            f"; it has {', '.join(found)}, a pickle that can run code: convert it to "
            f"safetensors first"
            if found
            else ""
        )
        raise CheckpointError(f"{directory} has no *.safetensors weights{hint}")
    # Without these transformers makes up a tokenizer of five special tokens.
    if not any((directory / name).is_file() for name in _VOCABULARY_FILES):
        raise CheckpointError(
            f"{directory} has no tokenizer: one of {', '.join(_VOCABULARY_FILES)} is "
            f"needed"
        )
    for name in _TOKENIZER_PATTERNS:
        path = directory / name
        if path.is_file() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; allowed {MAX_TOKENIZER_BYTES}"
            )
    _check_sizes(directory)


def _check_sizes(directory: Path) -> None:
    """Hold the sizes that a config claims to the weights that are there.

    Nothing is allocated yet: no tensor can have more elements than its file has bytes,
    and a config that claims one would only exhaust the memory.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return  # transformers says it better
    if not isinstance(config, dict):
        return
    weight_bytes = sum(p.stat().st_size for p in directory.glob("*.safetensors"))

    def find(*names: str) -> tuple[str, int]:
        """The first of these names that the config has, and its size; else 1."""
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return name, value
        return names[0], 1

    width_name, width = find("hidden_size", "dim", "d_model")
    layers_name, layers = find("num_hidden_layers", "n_layers", "num_layers")
    if not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(
            f"{directory}/config.json claims {layers_name} = {str(layers)[:20]}; "
            f"allowed are 1 to {MAX_LAYERS}"
        )
    embedding = find("embedding_size")[1] if "embedding_size" in config else width
    for (name, size), other in (
        ((width_name, width), width),
        (find("intermediate_size", "hidden_dim", "d_ff"), width),
        (find("vocab_size"), embedding),
        (find("max_position_embeddings"), embedding),
        (find("type_vocab_size") if config.get("type_vocab_size") else ("", 1), width),
    ):
        if size < 1 or other < 1 or size * other > weight_bytes:
            raise CheckpointError(
                f"{directory}/config.json claims {name} = {str(size)[:20]}, which its "
                f"weights of {weight_bytes} bytes cannot hold"
            )


def _hash_files(directory: Path) -> str:
    digest = hashlib.sha256()
    patterns = [*_HUB_PATTERNS, *_TOKENIZER_PATTERNS]
    files = sorted({p for pattern in patterns for p in directory.glob(pattern)})
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def load_checkpoint(files: CheckpointFiles) -> Checkpoint:
    """Load the model in float32 with our attention, and its fast tokenizer.

    Raises:
        CheckpointError: the weights do not form a question answering model.
    """
    checkpoint, missing = load_incomplete(files)
    if missing:
        raise CheckpointError(
            f"{files.name} lacks the weights {', '.join(missing[:4])}: it is not "
            f"fine-tuned for extractive question answering, its answers would be "
            f"random. Fine-tune it first"
        )
    return checkpoint


def load_incomplete(files: CheckpointFiles) -> tuple[Checkpoint, list[str]]:
    """Load likewise, and name the weights that were drawn, as the files lack them.

    Raises:
        CheckpointError: transformers finds no question answering architecture, or no
            fast tokenizer.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForQuestionAnswering
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
        model, info = AutoModelForQuestionAnswering.from_pretrained(
            files.directory,
            config=config,
            dtype=torch.float32,
            attn_implementation=register_attention(),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"{files.name} is not a checkpoint transformers can load for question "
            f"answering: {first_line}"
        ) from error
    model.eval()
    tokenizer_json, pad_token_id = _load_tokenizer(files)
    checkpoint = Checkpoint(
        files=files,
        model=model,
        tokenizer_json=tokenizer_json,
        pad_token_id=pad_token_id,
        max_positions=_max_positions(config),
        takes_token_types=_takes_token_types(model),
    )
    return checkpoint, sorted(info["missing_keys"])


def _max_positions(config: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", 512))
    # RoBERTa's positions start at padding_idx + 1, so two rows are never used.
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        positions -= int(getattr(config, "pad_token_id", 1)) + 1
    return positions


def _takes_token_types(model: torch.nn.Module) -> bool:
    import inspect

    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return False
    return int(getattr(model.config, "type_vocab_size", 0)) > 1


def _load_tokenizer(files: CheckpointFiles) -> tuple[bytes, int]:
    """The tokenizer as ``tokenizer.json`` bytes, and its padding id.

    The file itself is taken where there is one, so that its hash stays the
    checkpoint's; older checkpoints (vocab.txt) are converted.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            files.directory, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{files.name} has no usable tokenizer") from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{files.name} has only a slow tokenizer; int8qa needs character offsets, "
            f"which fast tokenizers give"
        )
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    own = files.directory / TOKENIZER_FILENAME
    if own.is_file():
        return own.read_bytes(), pad
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return (Path(scratch) / TOKENIZER_FILENAME).read_bytes(), pad
