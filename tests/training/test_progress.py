"""How far a run is: a line a minute, or a bar on a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from int8qa.training import progress as module
from int8qa.training.progress import TrainingProgress


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def at(step: int) -> tuple[Any, Any, Any]:
    return None, SimpleNamespace(global_step=step), None


def test_a_line_a_minute(clock: Clock) -> None:
    """Steps, loss, windows a second, and the time that the rest will take."""
    console = Console(file=io.StringIO(), width=100)
    shown = TrainingProgress([30] * 100, console)
    shown.on_train_begin(*at(0))
    for step in range(1, 11):
        clock.now += 10.0
        if step == 5:
            shown.on_log(*at(step), logs={"loss": 1.23456})
            shown.on_log(*at(step), logs={"learning_rate": 1.0})
        shown.on_step_end(*at(step))
    shown.on_train_end(*at(10))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "      6/100 steps, loss 1.235, 3.0 windows/s, 16 min left"
    ]


def test_a_resumed_run_speaks_for_itself(clock: Clock) -> None:
    """Its speed is of the steps it made, not of those before the break."""
    console = Console(file=io.StringIO(), width=100)
    shown = TrainingProgress([30] * 90 + [60] * 10, console)
    shown.on_train_begin(*at(80))
    clock.now += 60.0
    shown.on_step_end(*at(81))
    assert isinstance(console.file, io.StringIO)
    # 270 + 600 windows at half a window a second.
    assert console.file.getvalue().strip() == (
        "81/100 steps, 0.5 windows/s, 29 min left"
    )


def test_bar(clock: Clock) -> None:
    """On a terminal; taken down at the end, and any number of times."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    shown = TrainingProgress([30] * 4, console)
    shown.on_train_begin(*at(1))
    clock.now += 100.0
    shown.on_step_end(*at(2))
    shown.close()
    shown.close()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "0.3 windows/s" in text
    assert "2/4" in text
    assert "min left" not in text


def test_before_the_first_step(clock: Clock) -> None:
    """A run that fails at once has done nothing, and says nothing."""
    shown = TrainingProgress([30], Console(file=io.StringIO()))
    assert shown.windows_per_s == 0.0
    shown.close()
