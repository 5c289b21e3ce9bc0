"""What the gateway's own metrics say of one test: before it, after it, between.

In: the texts of ``GET /metrics`` before and after. Out: where the time of a request
went, how full the batches were, what padding cost, what the gateway's process used.
Counts everything that the gateway did meanwhile, and says if that was more than ours.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

STAGES = ("tokenize", "queue", "inference", "decode")
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class GatewayUse:
    """Of one precision, over one test. Times are means per answer."""

    requests: int
    """Answered by the gateway in this precision, ours and others'."""
    request_ms: float
    """From a request's head to the end of its response."""
    stages_ms: dict[str, float]
    batches: int
    batch_windows: float
    """Mean number of windows in a batch."""
    fill: dict[str, int] = field(default_factory=dict)
    """Batches by the upper bound of their windows, as the histogram has them."""
    padding_share: float = 0.0
    """Of the tokens computed, 0-1."""
    cpu_ms: float | None = None
    """Of the gateway's process per answer, all precisions; None if it does not say."""
    replays: int = 0
    """Questions asked again for the live comparison meanwhile."""

    @property
    def edge_ms(self) -> float:
        """In the gateway, and in none of the stages."""
        return max(0.0, self.request_ms - sum(self.stages_ms.values()))


class CounterChange:
    """Differences of counters between two texts of metrics."""

    def __init__(self, before: str, after: str) -> None:
        earlier, later = _read(before), _read(after)
        self._samples = {
            name: {
                labels: value - earlier[name].get(labels, 0.0)
                for labels, value in samples.items()
            }
            for name, samples in later.items()
        }

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples that have these labels."""
        return sum(self.list(name, **labels))

    def list(self, name: str, **labels: str) -> list[float]:
        """Each of these samples; with an empty text before, its value."""
        wanted = set(labels.items())
        return [
            value
            for found, value in self._samples.get(name, {}).items()
            if wanted <= found
        ]

    def has(self, name: str) -> bool:
        return name in self._samples

    def buckets(self, name: str, **labels: str) -> dict[str, int]:
        """A histogram's observations by upper bound, each counted once."""
        wanted = set(labels.items())
        cumulative = sorted(
            (float(dict(found)["le"]), value)
            for found, value in self._samples.get(f"{name}_bucket", {}).items()
            if wanted <= found
        )
        counts: dict[str, int] = {}
        below = 0.0
        for bound, value in cumulative:
            if value > below:
                counts[f"{bound:g}"] = round(value - below)
            below = value
        return counts


def measure_use(
    before: str | None, after: str | None, precision: str
) -> GatewayUse | None:
    """What happened between two readings; None if there is nothing to read."""
    if before is None or after is None:
        return None
    change = CounterChange(before, after)
    requests = change.sum("int8qa_request_seconds_count", precision=precision)
    seconds = change.sum("int8qa_request_seconds_sum", precision=precision)
    batches = change.sum("int8qa_batch_windows_count", precision=precision)
    if not requests or not batches:
        return None
    tokens = change.sum("int8qa_batch_tokens_total", precision=precision)
    padding = change.sum("int8qa_batch_padding_tokens_total", precision=precision)
    cpu = change.sum("process_cpu_seconds_total")
    stages = {}
    for stage in STAGES:
        labels = {"stage": stage, "precision": precision}
        count = change.sum("int8qa_stage_seconds_count", **labels)
        total = change.sum("int8qa_stage_seconds_sum", **labels)
        stages[stage] = round(1e3 * total / count, 4) if count else 0.0
    return GatewayUse(
        requests=round(requests),
        request_ms=round(1e3 * seconds / requests, 4),
        stages_ms=stages,
        batches=round(batches),
        batch_windows=round(
            change.sum("int8qa_batch_windows_sum", precision=precision) / batches, 3
        ),
        fill=change.buckets("int8qa_batch_windows", precision=precision),
        padding_share=round(padding / tokens, 4) if tokens else 0.0,
        cpu_ms=round(1e3 * cpu / requests, 4)
        if change.has("process_cpu_seconds_total")
        else None,
        replays=round(change.sum("int8qa_comparisons_total")),
    )


def _read(text: str) -> dict[str, dict[Labels, float]]:
    found: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name][frozenset(sample.labels.items())] = sample.value
    return found
