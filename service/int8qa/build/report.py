"""What a build shows and remembers: progress on the terminal, the closing table.

In: the stages of a build and its manifest. Out: lines on standard error, so that
``--json`` has standard output to itself. Decides nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from int8qa.build.accuracy import describe_share
from int8qa.build.comparison.pareto import mean_speed

Tick = Callable[[], None]


class BuildProgress:
    """One line per stage, with a bar on a terminal and a line at each fifth without."""

    def __init__(self, stages: int, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._stages = stages
        self._stage = 0

    def skip(self, stages: int) -> None:
        """So many of the stages will not come."""
        self._stages -= stages

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
        title=escape(f"{manifest['checkpoint']['name']} on {manifest['device']}"),
        title_justify="left",
    )
    accuracies.add_column("precision")
    for heading in ("F1", "EM", "of FP32's F1", "same", "max |Δ|"):
        accuracies.add_column(heading, justify="right")
    shapes = list(manifest["latency_ms"])
    engines = Table(
        title="milliseconds by batch × tokens" if shapes else "engines, not run here",
        title_justify="left",
    )
    engines.add_column("precision")
    engines.add_column("runs in")
    engines.add_column("MB", justify="right")
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
    console.print(f"Verdict: {manifest['verdict']}", markup=False, soft_wrap=True)


def show_comparison(
    result: Mapping[str, Any], *, console: Console | None = None
) -> None:
    """Every variant of a comparison, floats first, in one table."""
    console = console or _wide_console()
    provenance = result["provenance"]
    table = Table(
        title=escape(
            f"{provenance['checkpoint']} on {provenance['device']}: "
            f"{provenance['questions']} questions of {provenance['data']}"
        ),
        title_justify="left",
    )
    table.add_column("recipe")
    table.add_column("calibrator")
    for heading in ("F1", "EM", "of FP32's F1", "same as FP16", "RMS |Δ|"):
        table.add_column(heading, justify="right")
    shapes = list(next(iter(result["floats"].values()))["latency_ms"])
    for shape in shapes:
        table.add_column(f"{shape} ms", justify="right")
    table.add_column("× FP16", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("gate")
    fp16 = result["floats"]["fp16"]["latency_ms"]
    for name, entry in result["floats"].items():
        table.add_row(
            name,
            f"({entry['execution']})",
            f"{entry['f1']:.2f}",
            f"{entry['exact_match']:.2f}",
            f"{100 * entry['f1_ratio']:.2f} %",
            "",
            f"{entry['rms_logit_error']:.3f}",
            *(f"{entry['latency_ms'][shape]['p50']:.1f}" for shape in shapes),
            _show_speed(entry, fp16),
            f"{entry['size_bytes'] / 1e6:.0f}",
            "",
        )
    best = result["best"]
    for entry in result["variants"]:
        chosen = all(entry[key] == value for key, value in best.items())
        table.add_row(
            escape(entry["recipe"]),
            ("→ " if chosen else "") + entry["label"],
            f"{entry['f1']:.2f}",
            f"{entry['exact_match']:.2f}",
            describe_share(entry["f1_ratio"], entry["f1_ratio_margin"]),
            f"{100 * entry['agreement_fp16']:.1f} %",
            f"{entry['rms_logit_error']:.3f}",
            *(f"{entry['latency_ms'][shape]['p50']:.1f}" for shape in shapes),
            _show_speed(entry, fp16),
            f"{entry['size_bytes'] / 1e6:.0f}",
            "passes" if entry["passes_gate"] else "FAILS",
        )
    console.print(table)
    if result["sensitivity"]:
        show_sensitivity(result["sensitivity"], limit=10, console=console)
    console.print(f"Verdict: {result['verdict']}", markup=False, soft_wrap=True)
    console.print(f"{provenance['seconds']:.0f} s", markup=False)


def show_sensitivity(
    result: Mapping[str, Any],
    *,
    limit: int | None = None,
    console: Console | None = None,
) -> None:
    """Units by what they cost alone, the worst first."""
    console = console or _wide_console()
    units = result["units"]
    shown = units[:limit]
    of = "" if len(shown) == len(units) else f", the first {len(shown)} of {len(units)}"
    table = Table(
        title=escape(
            f"sensitivity of {result['recipe']} ({result['calibrator']}), "
            f"{result['questions']} questions{of}"
        ),
        title_justify="left",
    )
    table.add_column("unit")
    for group in ("only", "all but"):
        for heading in ("RMS |Δ|", "of FP32's F1", "same"):
            table.add_column(f"{group}: {heading}", justify="right")
    for unit in shown:
        cells = []
        for key in ("only", "all_but"):
            finding = unit[key]
            cells += [
                f"{finding['rms_logit_error']:.3f}",
                f"{100 * finding['f1_ratio']:.2f} %",
                f"{100 * finding['agreement_fp32']:.1f} %",
            ]
        table.add_row(unit["name"], *cells)
    console.print(table)


def show_sites(
    rows: Sequence[Mapping[str, Any]], *, title: str, console: Console | None = None
) -> None:
    """Every quantizable tensor and its grid."""
    console = console or _wide_console()
    table = Table(title=escape(title), title_justify="left")
    for heading in ("layer", "class", "quantizer", "grid"):
        table.add_column(heading)
    for row in rows:
        layer = "" if row["layer"] is None else str(row["layer"])
        table.add_row(layer, row["class"], row["quantizer"], row["grid"])
    console.print(table)


def show_findings(findings: Sequence[str], *, console: Console | None = None) -> None:
    """What keeps TensorRT from fusing, a line each, or that nothing is known to."""
    console = console or _wide_console()
    if findings:
        title = f"{len(findings)} places may keep TensorRT from fusing:"
    else:
        title = "Nothing in the graph is known to keep TensorRT from fusing."
    console.print(title, markup=False)
    for finding in findings:
        console.print(finding, markup=False, soft_wrap=True)


def _show_speed(entry: Mapping[str, Any], fp16: Mapping[str, Any]) -> str:
    speed = mean_speed(entry["latency_ms"], fp16)
    return "" if speed is None else f"{speed:.2f}"


def _wide_console() -> Console:
    """Standard output; wide where nobody looks at its width."""
    return Console(width=None if sys.stdout.isatty() else 170, highlight=False)
