"""One request before one engine: its windows, and the answer that settles once.

In: results of windows in any order, or an error. Out: all results in the order of the
windows, or the first error. Knows no line, no batch and no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from int8qa.gateway.tracing import CallTrace
from int8qa.reader.windows import Window


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What became of one window; the arrays are views cut to its own length."""

    start: NDArray[np.float32]  # [S], S unpadded
    end: NDArray[np.float32]  # [S], S unpadded
    queue_s: float  # arrival to dispatch
    inference_s: float  # dispatch to logits


@dataclass(eq=False, slots=True)
class Submission:
    """One submit; ``answer`` settles once, with all results or the first error."""

    windows: Sequence[Window]
    arrival_s: float
    deadline_s: float
    """Infinite if there is none; on the batcher's clock, as the arrival."""
    answer: asyncio.Future[list[WindowResult]]
    trace: CallTrace
    results: dict[int, WindowResult] = field(default_factory=dict)
    """By index of the window."""

    def receive(self, index: int, result: WindowResult) -> None:
        """Take one window's result; the last one settles the answer."""
        self.results[index] = result
        if len(self.results) == len(self.windows) and not self.answer.done():
            self.answer.set_result([self.results[i] for i in range(len(self.windows))])

    def fail(self, error: BaseException) -> None:
        """Settle the answer with an error, unless it is settled."""
        if not self.answer.done():
            self.answer.set_exception(error)
