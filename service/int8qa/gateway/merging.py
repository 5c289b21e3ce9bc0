"""The metrics of several gateway processes as those of one.

In: what each process's registry collects. Out: one list of the same families: counters
and histograms summed, processes that are gone included; gauges by the rule of each.
Knows neither processes nor the metrics' meaning, but for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from prometheus_client import Metric
from prometheus_client.samples import Exemplar, Sample

from int8qa.gateway.comparison import ShadowReport

GAUGE_RULES: dict[str, Callable[[float, float], float]] = {
    "int8qa_queue_windows": float.__add__,
    "int8qa_inflight_requests": float.__add__,
    "int8qa_workers": float.__add__,
    "process_virtual_memory_bytes": float.__add__,
    "process_resident_memory_bytes": float.__add__,
    "process_open_fds": float.__add__,
    "process_max_fds": float.__add__,
    # The gateway started when its first process did.
    "process_start_time_seconds": min,
    # What one of them lacks, a share of the requests lacks.
    "int8qa_model_ready": min,
    "int8qa_key_file_sound": min,
    # The same in all of them, but for moments.
    "int8qa_comparison_speedup_ratio": max,
    "int8qa_comparison_agreement_ratio": max,
    "int8qa_guard_tripped": max,
    "int8qa_guard_agreement_threshold": max,
    "int8qa_serving_precision": max,
    "int8qa_model_info": max,
    "int8qa_model_f1": max,
    "int8qa_tritons": max,
    "python_info": max,
}
"""How two processes' values of a gauge become one; a gauge must be in it."""

_SUMMED = frozenset({"counter", "histogram"})

_Key = tuple[str, tuple[tuple[str, str], ...]]


def merge_metrics(
    states: Iterable[Iterable[Metric]], *, gone: bool = False
) -> list[Metric]:
    """Merge what several registries collected; the order is that of the first.

    Args:
        states: one per process.
        gone: of processes that are: their gauges say nothing any more.
    """
    families: dict[str, Metric] = {}
    samples: dict[str, dict[_Key, Sample]] = {}
    for state in states:
        for family in state:
            if gone and family.type not in _SUMMED:
                continue
            if family.name not in families:
                families[family.name] = family
                samples[family.name] = {}
            merged = samples[family.name]
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                before = merged.get(key)
                merged[key] = (
                    sample if before is None else _join(family, before, sample)
                )
    merged_families = []
    for name, family in families.items():
        # A new one: the samples of the first registry stay as they are.
        result = Metric(name, family.documentation, family.type, family.unit)
        result.samples = list(samples[name].values())
        merged_families.append(result)
    return merged_families


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What one process, or several, can say of themselves."""

    build_id: str
    metrics: list[Metric]
    shadow: ShadowReport


def merge_states(states: Sequence[ProcessState], *, gone: bool = False) -> ProcessState:
    """All as one, of the first one's build; ``gone``: of processes that are."""
    build_id = states[0].build_id
    shadow = reduce(
        ShadowReport.add,
        (state.shadow for state in states if state.build_id == build_id),
    )
    if gone:
        shadow = replace(shadow, waiting=0, spent_share=0.0)
    metrics = merge_metrics((state.metrics for state in states), gone=gone)
    return ProcessState(build_id, metrics, shadow)


class MergedRegistry:
    """A registry as an encoder sees it."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Families in order."""
        return self._families


def _join(family: Metric, one: Sample, other: Sample) -> Sample:
    if one.name.endswith("_created"):
        value = min(one.value, other.value)
    elif family.type in _SUMMED:
        value = one.value + other.value
    else:
        value = _join_gauges(GAUGE_RULES[family.name], one.value, other.value)
    return one._replace(
        value=value, exemplar=_pick_exemplar(one.exemplar, other.exemplar)
    )


def _join_gauges(
    rule: Callable[[float, float], float], one: float, other: float
) -> float:
    # NaN is "nothing known": whoever knows something has the word.
    if one != one:  # noqa: PLR0124 - true of NaN alone
        return other
    if other != other:  # noqa: PLR0124 - likewise
        return one
    return float(rule(float(one), float(other)))


def _pick_exemplar(one: Exemplar | None, other: Exemplar | None) -> Exemplar | None:
    """The later one."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda exemplar: exemplar.timestamp or 0.0)
