"""Seconds of an engine's time for every shape that the batcher may send it.

In: the result of ``int8qa bench engine``, or the manifest of a build. Out: a table by
precision and shape, and which entries were measured. Shapes without a measurement come
from a fit of three terms to those with one. Knows nothing of traffic or queues.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from int8qa.build.repository import read_manifest
from int8qa.contract import Contract, Precision
from int8qa.errors import DataFileError
from int8qa.planning.simulation import Shape

Json = Mapping[str, Any]

TERMS = 3
"""Of the fit, and so the fewest shapes it takes."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Of one precision."""

    batch_s: dict[Shape, float]
    """For every legal shape."""
    measured: int
    """Entries that were measured; the rest are fitted."""
    fit_error: float | None
    """Largest relative error of the fit at a measured shape; None if there is no fit,
    or as few shapes as terms, which any fit meets."""

    def ceiling_qps(self, questions: Sequence[Sequence[int]]) -> float:
        """Questions per second of an engine that only ever sees its best batches."""
        window_s: dict[int, float] = {}
        for (batch, length), seconds in self.batch_s.items():
            each_s = seconds / batch
            window_s[length] = min(each_s, window_s.get(length, each_s))
        total_s = sum(window_s[length] for question in questions for length in question)
        return len(questions) / total_s


@dataclass(frozen=True, slots=True)
class Measured:
    """Median milliseconds by precision and shape, and where they come from."""

    source: str
    machine: str
    """Where that was."""
    build_id: str
    latency_ms: dict[Precision, dict[Shape, float]]


def read_result(path: Path, kinds: Sequence[str] = ("engine", "gateway")) -> Json:
    """A JSON file that ``int8qa bench`` wrote.

    Raises:
        DataFileError: it cannot be read, or is none of these kinds.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        raise DataFileError(
            f"{path} is not JSON; give the file that `int8qa bench` wrote"
        ) from None
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in kinds or result.get("format_version") != 1:
        raise DataFileError(
            f"{path} is no result that this version reads: its kind is {kind!r}, "
            f"allowed: {', '.join(kinds)}, of format_version 1. Write it anew with "
            f"`int8qa bench {kinds[-1]}`"
        )
    return dict(result)


def read_engine_times(result: Json) -> Measured:
    """What ``int8qa bench engine`` measured."""
    return _collect(
        "int8qa bench engine",
        describe_machine(result),
        str(result["build_id"]),
        result["latency"],
    )


def describe_machine(result: Json) -> str:
    """Where a benchmark ran."""
    machine = result["provenance"]["machine"]
    return f"{machine['processor']}, {machine['cores']} cores"


def read_build_times(repository: Path) -> Measured:
    """What the build of a repository measured: few shapes.

    Raises:
        RepositoryError: it has no manifest.
        DataFileError: the manifest holds no latencies.
    """
    manifest = read_manifest(repository)
    latency = manifest.get("latency")
    if not latency:
        raise DataFileError(
            f"the build of {repository} measured no latencies; measure them with "
            f"`int8qa bench engine` and give its engine.json with --bench"
        )
    return _collect(
        "the build",
        str(manifest.get("device")),
        str(manifest.get("build_id")),
        latency,
    )


def _collect(source: str, machine: str, build_id: str, latency: Json) -> Measured:
    known = {str(precision) for precision in Precision}
    by_precision: dict[Precision, dict[Shape, float]] = {}
    for name, row in latency.items():
        batch, _, length = name.partition("x")
        for precision, times in row.items():
            if precision in known:  # the build times variants as well
                shapes = by_precision.setdefault(Precision(precision), {})
                shapes[int(batch), int(length)] = float(times["p50_ms"])
    return Measured(source, machine, build_id, by_precision)


def tabulate_costs(measured: Mapping[Shape, float], contract: Contract) -> CostTable:
    """Complete one precision's table.

    Args:
        measured: median milliseconds by shape.
        contract: what shapes are legal.

    Raises:
        DataFileError: shapes are missing, and too few were measured to fit them.
    """
    legal = [
        (batch, length)
        for length in contract.sequence_buckets
        for batch in contract.list_batch_sizes(length)
    ]
    missing = [shape for shape in legal if shape not in measured]
    if not missing:
        return CostTable({s: measured[s] / 1e3 for s in legal}, len(legal), None)
    if len(measured) < TERMS:
        raise DataFileError(
            f"{len(measured)} shapes were measured, and {len(legal)} are served; the "
            f"rest can be fitted to {TERMS} or more. Run `int8qa bench engine`"
        )
    terms = fit_terms(measured)
    errors = [abs(_evaluate(terms, s) / ms - 1) for s, ms in measured.items()]
    return CostTable(
        {s: measured.get(s, _evaluate(terms, s)) / 1e3 for s in legal},
        len(legal) - len(missing),
        max(errors) if len(errors) > TERMS else None,
    )


def fit_terms(measured: Mapping[Shape, float]) -> tuple[float, float, float]:
    """Milliseconds of each call, of each token, of each pair of a row's tokens.

    What a transformer does for a batch of B rows of S tokens: something once, GEMMs
    over B·S tokens, attention over B·S² pairs. No term is negative: the best of all
    fits by least relative squares that leave out terms until none is.

    Returns:
        The terms a, b, c of a + b·B·S + c·B·S².
    """
    shapes = list(measured)
    target = np.array([measured[shape] for shape in shapes])
    table = np.array([_list_terms(shape) for shape in shapes]) / target[:, None]
    best: tuple[float, list[float]] = (math.inf, [0.0] * TERMS)
    for count in range(1, TERMS + 1):
        for chosen in itertools.combinations(range(TERMS), count):
            part, *_ = np.linalg.lstsq(
                table[:, chosen], np.ones(len(shapes)), rcond=None
            )
            if (part < 0).any():
                continue
            loss = float(((table[:, chosen] @ part - 1) ** 2).sum())
            if loss < best[0]:
                terms = [0.0] * TERMS
                for index, value in zip(chosen, part, strict=True):
                    terms[index] = float(value)
                best = loss, terms
    a, b, c = best[1]
    return a, b, c


def _list_terms(shape: Shape) -> tuple[float, float, float]:
    batch, length = shape
    return 1.0, float(batch * length), float(batch * length**2)


def _evaluate(terms: Sequence[float], shape: Shape) -> float:
    return math.fsum(a * b for a, b in zip(terms, _list_terms(shape), strict=True))
