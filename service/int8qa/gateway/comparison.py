"""INT8 against FP16 over the most recent questions.

In: latencies in seconds, and pairs of answers to one question. Out: percentiles,
distributions, the paired speed-up, the share of equal answers, and where they differed
most. Knows no HTTP, no clock and no texts: of a question it keeps ids and sizes.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from int8qa.contract import Precision

if TYPE_CHECKING:
    from int8qa.gateway.query import Run

HISTOGRAM_BINS = 48
HISTOGRAM_EDGES_S = tuple(
    5e-4 * 10 ** (4 * index / HISTOGRAM_BINS) for index in range(HISTOGRAM_BINS + 1)
)
"""0.5 ms to 5 s in equal ratios of 1.21, so that a GPU's and a document's latencies
both show a shape. What lies outside is counted in the first or last bin."""

MAX_DISAGREEMENTS = 10


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Latencies of one precision in seconds; None where nothing was seen."""

    count: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class PairedAnswer:
    """Where one precision saw the best answer: code points and score, no text."""

    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One question answered by both precisions, one after the other."""

    int8_s: float
    fp16_s: float
    agreed: bool
    undisturbed: bool = True
    """Whether each ran alone on an idle engine: else the times say nothing."""
    int8: PairedAnswer | None = None
    """None where the null answer won."""
    fp16: PairedAnswer | None = None
    request_id: str = ""
    windows: int = 1
    question_chars: int = 0
    context_chars: int = 0
    seen_s: float = 0.0
    """On the caller's clock."""

    @property
    def score_deviation(self) -> float:
        """Difference of the two best answers' scores; a null answer has 0.

        Mostly below 1: only scores of a span that several windows see add up.
        """
        return abs(_score(self.int8) - _score(self.fp16))

    @property
    def conviction(self) -> float:
        """Score of the less sure side: a dispute is the worse, the surer both are."""
        return min(_score(self.int8), _score(self.fp16))


def _score(answer: PairedAnswer | None) -> float:
    return 0.0 if answer is None else answer.score


@dataclass(frozen=True, slots=True)
class Single:
    """The inference time of one answered question, in one precision."""

    precision: Precision
    seconds: float


@dataclass(frozen=True, slots=True)
class FailedPair:
    """A pair in which a precision failed."""


@dataclass(frozen=True, slots=True)
class Nonsense:
    """An INT8 answer that made no sense: it agrees with nothing."""


Observation = Single | Pair | FailedPair | Nonsense
"""All that the comparison and its guard are made of."""


def judge(seen: Observation) -> bool | None:
    """Whether INT8 agreed with FP16; None where that was not asked."""
    if isinstance(seen, Nonsense):
        return False
    return seen.agreed if isinstance(seen, Pair) else None


@dataclass(frozen=True, slots=True)
class PairedReport:
    """Questions answered by both precisions, one after the other."""

    count: int
    int8: Percentiles
    """Latencies are of undisturbed pairs alone, here and in ``fp16``."""
    fp16: Percentiles
    speedup: float | None
    """Median over the undisturbed pairs of FP16 time / INT8 time; above 1, INT8 is
    faster."""
    agreement: float | None
    """Share of pairs with the same answer, 0 to 1."""
    mean_deviation: float | None
    p95_deviation: float | None
    errors: int
    """Pairs in which a precision failed, since start; they count nowhere else."""


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What was asked again since start."""

    replayed: int
    waiting: int
    skipped: dict[str, int]
    """By reason."""
    disturbed: int
    spent_share: float
    """Share of the wall time since start that went into it, 0 to 1."""

    def add(self, other: ShadowReport) -> ShadowReport:
        """Of two processes together, whose shares add up to the engine's."""
        return ShadowReport(
            self.replayed + other.replayed,
            self.waiting + other.waiting,
            {
                reason: count + other.skipped.get(reason, 0)
                for reason, count in self.skipped.items()
            },
            self.disturbed + other.disturbed,
            self.spent_share + other.spent_share,
        )


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
        self._pairs: deque[Pair] = deque(maxlen=size)
        self._errors = 0

    def add(self, seen: Observation) -> None:
        """Add what was seen of one question."""
        if isinstance(seen, Single):
            self._singles[seen.precision].append(seen.seconds)
        elif isinstance(seen, Pair):
            self._pairs.append(seen)
        elif isinstance(seen, FailedPair):
            self._errors += 1

    def speedup(self) -> float | None:
        """Median of FP16 time / INT8 time over the undisturbed pairs, None without any.

        A median of ratios, not a ratio of means: one long document weighs as much
        as one short question.
        """
        ratios = [p.fp16_s / p.int8_s for p in self._fair_pairs() if p.int8_s > 0]
        return statistics.median(ratios) if ratios else None

    def agreement(self) -> float | None:
        """Share of pairs with the same answer, None without any."""
        if not self._pairs:
            return None
        return sum(pair.agreed for pair in self._pairs) / len(self._pairs)

    def report_pairs(self) -> PairedReport:
        """Summarize the pairs."""
        fair = self._fair_pairs()
        deviations = sorted(pair.score_deviation for pair in self._pairs)
        return PairedReport(
            count=len(self._pairs),
            int8=summarize([pair.int8_s for pair in fair]),
            fp16=summarize([pair.fp16_s for pair in fair]),
            speedup=self.speedup(),
            agreement=self.agreement(),
            mean_deviation=statistics.fmean(deviations) if deviations else None,
            p95_deviation=_rank(deviations, 95) if deviations else None,
            errors=self._errors,
        )

    def report_singles(self) -> dict[Precision, Percentiles]:
        """Summarize each precision's own latencies."""
        return {
            precision: summarize(seconds)
            for precision, seconds in self._singles.items()
        }

    def count_latencies(self) -> dict[Precision, list[int]]:
        """Undisturbed pairs per bin of ``HISTOGRAM_EDGES_S``, by precision."""
        fair = self._fair_pairs()
        return {
            Precision.INT8: _count_bins(pair.int8_s for pair in fair),
            Precision.FP16: _count_bins(pair.fp16_s for pair in fair),
        }

    def list_disagreements(self) -> list[Pair]:
        """The recent pairs that differed, most convinced first, at most ten."""
        different = (pair for pair in self._pairs if not pair.agreed)
        ordered = sorted(different, key=lambda pair: -pair.conviction)
        return ordered[:MAX_DISAGREEMENTS]

    def _fair_pairs(self) -> list[Pair]:
        return [pair for pair in self._pairs if pair.undisturbed]


def build_pair(
    runs: dict[Precision, Run],
    *,
    undisturbed: bool,
    request_id: str,
    windows: int,
    question_chars: int,
    context_chars: int,
    seen_s: float,
) -> Pair:
    """Compare two runs over the same windows; answers agree if their texts do."""
    int8, fp16 = runs[Precision.INT8], runs[Precision.FP16]
    texts = [run.best.text if run.best else None for run in (int8, fp16)]
    return Pair(
        int8_s=int8.stages.inference,
        fp16_s=fp16.stages.inference,
        agreed=texts[0] == texts[1],
        undisturbed=undisturbed,
        int8=_place(int8),
        fp16=_place(fp16),
        request_id=request_id,
        windows=windows,
        question_chars=question_chars,
        context_chars=context_chars,
        seen_s=seen_s,
    )


def _place(run: Run) -> PairedAnswer | None:
    best = run.best
    return None if best is None else PairedAnswer(best.start, best.end, best.score)


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


def _count_bins(seconds: Iterable[float]) -> list[int]:
    counts = [0] * HISTOGRAM_BINS
    for value in seconds:
        index = bisect.bisect_right(HISTOGRAM_EDGES_S, value) - 1
        counts[min(max(index, 0), HISTOGRAM_BINS - 1)] += 1
    return counts
