"""What a build shows and remembers: progress on the terminal, the closing table.

In: the stages of a build and its manifest. Out: lines on standard error, so that
``--json`` has standard output to itself. Decides nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from int8qa.build.accuracy import describe_share

Tick = Callable[[], None]


class BuildProgress:
    """One line per stage, with a bar on a terminal and a line at each fifth without."""

    def __init__(self, stages: int, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._stages = stages
        self._stage = 0

    def say(self, text: str) -> None:
        """A remark between stages."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str, *, steps: int | None = None) -> Iterator[Tick]:
        """Show one stage; call what is yielded once per step."""
        self._stage += 1
        label = f"[{self._stage}/{self._stages}] {title}"
        begin = time.monotonic()
        if self._console.is_terminal:
            with Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            ) as bars:
                task = bars.add_task(label, total=steps)
                yield lambda: bars.advance(task)
        else:
            self._console.print(label, markup=False, soft_wrap=True)
            yield self._fifths(steps)
        took = time.monotonic() - begin
        if self._console.is_terminal or took >= 1:
            self._console.print(f"{label}: {took:.1f} s", markup=False, soft_wrap=True)

    def _fifths(self, steps: int | None) -> Tick:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if steps and steps >= 10 and done % max(steps // 5, 1) == 0:
                self._console.print(f"      {done}/{steps}", markup=False)

        return tick


def show_manifest(manifest: dict[str, Any], *, console: Console | None = None) -> None:
    """The closing tables of a build, from its manifest."""
    console = console or Console(stderr=True, highlight=False)
    accuracies = Table(
        title=f"{manifest['checkpoint']['name']} on {manifest['device']}",
        title_justify="left",
    )
    accuracies.add_column("precision")
    for heading in ("F1", "EM", "of FP32's F1", "same", "max |Δ|"):
        accuracies.add_column(heading, justify="right")
    engines = Table(title="milliseconds by batch × tokens", title_justify="left")
    engines.add_column("precision")
    engines.add_column("runs in")
    engines.add_column("MB", justify="right")
    shapes = list(manifest["latency_ms"])
    for shape in shapes:
        engines.add_column(shape, justify="right")
    for precision, model in manifest["models"].items():
        accuracy = model["accuracy"]
        accuracies.add_row(
            precision,
            f"{accuracy['f1']:.2f}",
            f"{accuracy['exact_match']:.2f}",
            describe_share(accuracy["f1_ratio"], accuracy["f1_ratio_margin"]),
            f"{100 * accuracy['agreement']:.1f} %",
            f"{accuracy['max_logit_deviation']:.3g}",
        )
        engines.add_row(
            precision,
            model["execution"],
            f"{model['size_bytes'] / 1e6:.0f}",
            *(f"{manifest['latency_ms'][shape][precision]:.1f}" for shape in shapes),
        )
    console.print(accuracies, engines)
    for remark in manifest["remarks"]:
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
    console.print(manifest["verdict"], markup=False, soft_wrap=True)


def write_verdict(
    latency_ms: dict[str, dict[str, float]], int8_ratio: float, margin: float
) -> tuple[str, str]:
    """One sentence: is INT8 worth it here?

    Args:
        latency_ms: median milliseconds by shape and precision.
        int8_ratio: share of float32's F1 that INT8 keeps, 0-1.
        margin: what chance may add to or take from it.

    Returns:
        The recommended precision and the sentence. INT8 is held against the best
        float: a CPU may run FP16 slower than FP32.
    """
    parts = []
    gains = []
    for shape, by_precision in latency_ms.items():
        floats = {k: v for k, v in by_precision.items() if k != "int8"}
        best = min(floats, key=lambda name: floats[name])
        gain = floats[best] / by_precision["int8"]
        against_fp16 = by_precision["fp16"] / by_precision["int8"]
        gains.append(gain)
        rival = "" if best == "fp16" else f", {gain:.2f} × {best.upper()}"
        parts.append(f"{shape} {against_fp16:.2f} × FP16{rival}")
    worth = min(gains) > 1.0
    recommended = "int8" if worth else _best_float(latency_ms)
    opening = (
        "INT8 is faster than every float here"
        if worth
        else "INT8 does not pay at every shape here"
    )
    sentence = (
        f"Verdict: {opening} (speed of INT8: {'; '.join(parts)}) and keeps "
        f"{describe_share(int8_ratio, margin)} of FP32's F1; recommended: "
        f"{recommended}."
    )
    return recommended, sentence


def _best_float(latency_ms: dict[str, dict[str, float]]) -> str:
    totals: dict[str, float] = {}
    for by_precision in latency_ms.values():
        for name, value in by_precision.items():
            if name != "int8":
                totals[name] = totals.get(name, 0.0) + value
    return min(totals, key=lambda name: totals[name])
