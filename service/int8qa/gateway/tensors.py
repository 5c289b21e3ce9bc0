"""Windows as an engine's tensors, and its logits as the windows' own.

In: windows of one batch. Out: one padded batch; of its logits, a view for each window.
Knows no requests, no time and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from int8qa.errors import EngineOutputError
from int8qa.reader.windows import Window


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B windows padded to S tokens, every row a real window."""

    input_ids: NDArray[np.int32]  # [B, S], ``pad_token_id`` behind each window
    attention_mask: NDArray[np.int32]  # [B, S], 1 on a window's own tokens
    token_type_ids: NDArray[np.int32]  # [B, S]
    beside: int = 0
    """Batches of this gateway that were in the engine when this one left."""


@dataclass(frozen=True, slots=True)
class BatchLogits:
    """The engine's answer to a batch."""

    start: NDArray[np.float32]  # [B, S]
    end: NDArray[np.float32]  # [B, S]


def assemble_batch(
    windows: Sequence[Window], length: int, pad_token_id: int, *, beside: int = 0
) -> PaddedBatch:
    """Pad ``windows``, none of them longer, to ``length`` tokens."""
    shape = (len(windows), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int32)
    attention_mask = np.zeros(shape, dtype=np.int32)
    token_type_ids = np.zeros(shape, dtype=np.int32)
    for row, window in enumerate(windows):
        own = len(window)
        input_ids[row, :own] = window.input_ids
        attention_mask[row, :own] = 1
        token_type_ids[row, :own] = window.token_type_ids
    return PaddedBatch(input_ids, attention_mask, token_type_ids, beside)


def check_shapes(logits: BatchLogits, expected: tuple[int, ...]) -> None:
    """Hold logits to the batch that they answer.

    Raises:
        EngineOutputError: they are of another shape.
    """
    if not logits.start.shape == logits.end.shape == expected:
        raise EngineOutputError(
            f"logits of shapes {logits.start.shape} and {logits.end.shape} answer a "
            f"batch of {expected}; rebuild with `int8qa build` and restart Triton"
        )


def cut_logits(
    logits: BatchLogits, row: int, tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """A window's own logits, start and end [S] unpadded; None if any is not finite."""
    start, end = logits.start[row, :tokens], logits.end[row, :tokens]
    if np.isfinite(start).all() and np.isfinite(end).all():
        return start, end
    return None
