"""One window as a model's input.

In: a window. Out: an int32 batch of one per input name, padded as the gateway pads,
and a torch reader run on it. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.reader.windows import Window

if TYPE_CHECKING:
    import torch


def window_feed(
    window: Window,
    inputs: Sequence[str],
    *,
    length: int | None = None,
    pad_token_id: int = 0,
) -> dict[str, npt.NDArray[np.int32]]:
    """One window as int32 [1, S] per input name, fresh and writable.

    Args:
        window: S tokens or fewer.
        inputs: names of the model's inputs.
        length: S, padding included; by default the window's own length.
        pad_token_id: stands in ``input_ids`` where the window ends.
    """
    size = len(window)
    arrays = {name: np.zeros((1, length or size), np.int32) for name in inputs}
    arrays[INPUT_IDS][:] = pad_token_id
    arrays[INPUT_IDS][0, :size] = window.input_ids
    arrays[ATTENTION_MASK][0, :size] = 1
    if TOKEN_TYPE_IDS in arrays:
        arrays[TOKEN_TYPE_IDS][0, :size] = window.token_type_ids
    return arrays


def run_reader(reader: torch.nn.Module, window: Window, inputs: Sequence[str]) -> None:
    """Run one unpadded window, for what hooks and quantizers see of it."""
    import torch

    feed = window_feed(window, inputs)
    reader(*(torch.from_numpy(feed[name]) for name in inputs))
