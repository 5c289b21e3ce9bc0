"""How far a run is, and how long it will take.

In: the trainer's events. Out: a bar with the time left on a terminal, a line a minute
elsewhere, on standard error. Times are of this run alone, so that a resumed one does
not promise the speed of the machine before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

LINE_PERIOD_S = 60.0


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss, speed and time left."""

    def __init__(self, windows_by_step: Sequence[int], console: Console) -> None:
        self._windows = windows_by_step
        self._console = console
        self._bars: Progress | None = None
        self._task: Any = None
        self._first = self._step = self._done = 0
        self._began = time.monotonic()
        self._said = self._began
        self._loss: float | None = None

    @property
    def windows_per_s(self) -> float:
        """Of this run so far."""
        return self._done / max(time.monotonic() - self._began, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self._first = self._step = state.global_step
        self._done = 0
        self._began = self._said = time.monotonic()
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
            self._task = self._bars.add_task(
                "train", total=len(self._windows), completed=self._first
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        del args, state, control
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self._step = state.global_step
        self._done += self._windows[self._step - 1]
        if self._bars is not None:
            self._bars.update(
                self._task, completed=self._step, description=self._describe()
            )
        elif time.monotonic() - self._said >= LINE_PERIOD_S:
            self._said = time.monotonic()
            left = sum(self._windows[self._step :]) / self.windows_per_s
            self._console.print(
                f"      {self._step}/{len(self._windows)} steps, {self._describe()}, "
                f"{left / 60:.0f} min left",
                markup=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self.close()

    def close(self) -> None:
        """Take the bar down; any number of times."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _describe(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:.3f}, "
        return f"{loss}{self.windows_per_s:.1f} windows/s"
