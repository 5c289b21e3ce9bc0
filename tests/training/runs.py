"""Small questions, tiny checkpoints and short runs, made up for tests of training."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from int8qa.training.options import TrainingOptions
from int8qa.training.run import TrainingOutcome, train_reader

ARTICLES = (
    (
        (
            "The mill at Torvik was built by Anna Lund in 1902 and burned in 1931.",
            (("Who built the mill?", "Anna Lund"), ("When did it burn?", "1931")),
        ),
        (
            "A bridge at Torvik has carried the road since Karl Berg drew it in 1954.",
            (("Who drew the bridge?", "Karl Berg"), ("When was that?", "1954")),
        ),
    ),
    (
        (
            "The pump needs 40 litres of oil; change it every 200 hours of work.",
            (("How much oil?", "40 litres"), ("How often?", "every 200 hours")),
        ),
        (
            "The motor needs 3 litres of water. Its fuse is behind the left door.",
            (("How much water?", "3 litres"), ("Where?", "behind the left door")),
        ),
    ),
)
"""(context, ((question, answer), ...)) by article; no answer stands in two contexts."""
HELD_OUT = (
    (
        (
            "The ferry leaves Skagen at 7:15 and arrives in Vik two hours later.",
            (("When does the ferry leave?", "7:15"), ("Where does it land?", "Vik")),
        ),
    ),
)


def write_articles(path: Path, articles: Any = ARTICLES) -> Path:
    """Write them as SQuAD; an answer of "" makes a question without one (v2.0)."""
    data = []
    for i, paragraphs in enumerate(articles):
        entries: list[dict[str, Any]] = []
        for j, (context, pairs) in enumerate(paragraphs):
            asked = []
            for k, (question, answer) in enumerate(pairs):
                place = {"text": answer, "answer_start": context.index(answer)}
                entry: dict[str, Any] = {
                    "id": f"{path.stem}-{i}-{j}-{k}",
                    "question": question,
                    "answers": [place] if answer else [],
                }
                if not answer:
                    entry["is_impossible"] = True
                asked.append(entry)
            entries.append({"context": context, "qas": asked})
        data.append({"title": str(i), "paragraphs": entries})
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def make_options(
    checkpoint: Path, data: Path, output: Path, **change: Any
) -> TrainingOptions:
    """Eight windows in batches of four: two steps an epoch, in float32."""
    chosen: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "batch": 4,
        "epochs": 3.0,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "dtype": "fp32",
        "save_minutes": 0.0,
    }
    return TrainingOptions(data=(data,), output=output, **(chosen | change))


def train(
    options: TrainingOptions,
    on_step: Callable[[int], None] = lambda _step: None,
    console: Console | None = None,
) -> TrainingOutcome:
    """Run, without lines on standard error."""
    console = console or Console(file=io.StringIO(), width=200)
    return train_reader(options, console=console, on_step=on_step)


def deliver(number: signal.Signals) -> None:
    """Call the handler of a signal.

    Not sent: once OpenVINO has run in a process with pytest's faulthandler, the frame of
    a real signal no longer fits the alternate stack, and the process ends (SIGSEGV).
    """
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


class KilledError(Exception):
    """Stands for the end of a machine: nothing of ours catches it."""


def kill_at(step: int) -> Callable[[int], None]:
    """An ``on_step`` that ends the run before the checkpoint of ``step``."""

    def on_step(done: int) -> None:
        if done == step:
            raise KilledError

    return on_step
