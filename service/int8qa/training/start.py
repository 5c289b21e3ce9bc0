"""What a run starts from, and whom it learns from.

In: the files of a checkpoint, fine-tuned or a bare encoder. Out: the build's own
``Checkpoint``, with a fresh head where there was none. Unsafe files are refused by
build/checkpoint.py, as everywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from int8qa.build.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    load_checkpoint,
    load_incomplete,
)
from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    TOKENIZER_FILENAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
PROBE_TEXTS = 200
"""Texts on which a teacher's tokenizer is compared with the student's."""


def load_start(files: CheckpointFiles, *, seed: int) -> tuple[Checkpoint, bool]:
    """Load a checkpoint to train, and whether its head is new.

    Args:
        files: see build.checkpoint.resolve_checkpoint.
        seed: of a new head's weights.

    Raises:
        CheckpointError: no transformers encoder, or it lacks more than the head.
    """
    import torch

    torch.manual_seed(seed)
    checkpoint, missing = load_incomplete(files)
    encoder = f"{checkpoint.model.base_model_prefix}."
    lost = [name for name in missing if name.startswith(encoder)]
    if lost:
        raise CheckpointError(
            f"{files.name} lacks {len(lost)} weights of its encoder ({lost[0]}): the "
            f"file is incomplete, or of another architecture than its config.json says"
        )
    return checkpoint, bool(missing)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what of a tokenizer is in ``source``."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def load_teacher(
    files: CheckpointFiles,
    student: Checkpoint,
    texts: Sequence[str],
    *,
    max_window_tokens: int,
) -> torch.nn.Module:
    """Load the checkpoint whose logits are learned, frozen.

    Args:
        files: the teacher's.
        student: whose tokens the teacher is to read.
        texts: of the training set, to compare tokenizers on.
        max_window_tokens: longest window it will be given.

    Raises:
        CheckpointError: it splits text into other tokens, or reads fewer of them.
    """
    from tokenizers import Tokenizer

    teacher = load_checkpoint(files)
    ours = Tokenizer.from_str(student.tokenizer_json.decode())
    theirs = Tokenizer.from_str(teacher.tokenizer_json.decode())
    for tokenizer in (ours, theirs):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    sample = list(texts[:PROBE_TEXTS])
    differs = any(
        mine.ids != yours.ids
        for mine, yours in zip(
            ours.encode_batch(sample), theirs.encode_batch(sample), strict=True
        )
    )
    if differs:
        raise CheckpointError(
            f"{files.name} cannot teach {student.files.name}: it splits the training "
            f"texts into other tokens, so their logits speak of different places. "
            f"Choose a teacher with the same tokenizer"
        )
    if teacher.max_positions < max_window_tokens:
        raise CheckpointError(
            f"{files.name} reads {teacher.max_positions} tokens, and the windows have "
            f"up to {max_window_tokens}; lower --max-window-tokens or choose another "
            f"teacher"
        )
    teacher.model.requires_grad_(requires_grad=False)
    return teacher.model.eval()
