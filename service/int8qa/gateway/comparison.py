"""INT8 against FP16 over the most recent requests.

In: latencies and agreements, in seconds, as requests end. Out: percentiles, the
paired speed-up and the share of equal answers. Knows no HTTP, no clock and no
texts.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from int8qa.contract import Precision


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies of one precision in seconds; None where nothing was seen."""

    count: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class PairedReport:
    """Questions answered by both precisions, one after the other."""

    count: int
    int8: Percentiles
    fp16: Percentiles
    speedup: float | None
    """Median over the pairs of FP16 time / INT8 time; above 1, INT8 is faster."""
    agreement: float | None
    """Share of pairs with the same answer, 0 to 1."""
    errors: int
    """Pairs in which a precision failed, since start; they count nowhere else."""


@dataclass(frozen=True, slots=True)
class _Pair:
    int8_s: float
    fp16_s: float
    agreed: bool


class ComparisonWindow:
    """The last ``size`` observations per precision, and the last ``size`` pairs.

    Pairs hold the question constant, so their ratio is a fair speed-up. Single
    observations come from whatever each precision happened to be asked: they show
    each one's own latency, and their ratio says little.
    """

    def __init__(self, size: int, precisions: Iterable[Precision]) -> None:
        self.size = size
        self._singles: dict[Precision, deque[float]] = {
            precision: deque(maxlen=size) for precision in precisions
        }
        self._pairs: deque[_Pair] = deque(maxlen=size)
        self._errors = 0

    def add_single(self, precision: Precision, seconds: float) -> None:
        """Add the inference time of one answered question."""
        self._singles[precision].append(seconds)

    def add_pair(self, *, int8_s: float, fp16_s: float, agreed: bool) -> None:
        """Add one question answered by both precisions."""
        self._pairs.append(_Pair(int8_s, fp16_s, agreed))

    def add_error(self) -> None:
        """Count a pair in which a precision failed."""
        self._errors += 1

    def speedup(self) -> float | None:
        """Median of FP16 time / INT8 time over the pairs, None without any.

        A median of ratios, not a ratio of means: one long document weighs as much
        as one short question.
        """
        ratios = [pair.fp16_s / pair.int8_s for pair in self._pairs if pair.int8_s > 0]
        return statistics.median(ratios) if ratios else None

    def report_pairs(self) -> PairedReport:
        """Summarize the pairs."""
        count = len(self._pairs)
        return PairedReport(
            count=count,
            int8=summarize([pair.int8_s for pair in self._pairs]),
            fp16=summarize([pair.fp16_s for pair in self._pairs]),
            speedup=self.speedup(),
            agreement=sum(p.agreed for p in self._pairs) / count if count else None,
            errors=self._errors,
        )

    def report_singles(self) -> dict[Precision, Percentiles]:
        """Summarize each precision's own latencies."""
        return {
            precision: summarize(seconds)
            for precision, seconds in self._singles.items()
        }


def summarize(seconds: Iterable[float]) -> Percentiles:
    """The 50th, 95th and 99th percentile by nearest rank: values really seen."""
    ordered = sorted(seconds)
    if not ordered:
        return Percentiles(0, None, None, None)
    return Percentiles(
        len(ordered), _rank(ordered, 50), _rank(ordered, 95), _rank(ordered, 99)
    )


def _rank(ordered: Sequence[float], percent: int) -> float:
    # Nearest rank: the smallest value with at least `percent` of all at or below it.
    return ordered[-(-percent * len(ordered) // 100) - 1]
