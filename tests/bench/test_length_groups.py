"""Latencies among requests of like length, by hand."""

from __future__ import annotations

import pytest

from int8qa.bench.length_groups import MIN_GROUP, group_by_length


def test_groups_of_like_length() -> None:
    """Slow for being long is no tail; slow among its like is one."""
    short = [(100 + i % 7, 0.010) for i in range(198)] + [(103, 0.030)] * 2
    long = [(5_000 + i % 7, 0.100) for i in range(200)]
    first, second = group_by_length(long + short, groups=2)
    assert (first["queries"], second["queries"]) == (200, 200)
    assert (first["bytes_from"], first["bytes_to"]) == (100, 106)
    assert first["p50_ms"] == 10.0
    assert 1.0 < first["ratio"] <= 3.0
    assert (second["p50_ms"], second["p99_ms"], second["ratio"]) == (100.0, 100.0, 1.0)


@pytest.mark.parametrize(
    ("count", "groups"), [(0, 0), (MIN_GROUP - 1, 0), (MIN_GROUP, 1), (10**4, 10)]
)
def test_no_group_is_too_small(count: int, groups: int) -> None:
    """Few answers make fewer groups, very few none."""
    found = group_by_length([(i, 0.001 * (i + 1)) for i in range(count)])
    assert len(found) == groups
    assert sum(group["queries"] for group in found) == (count if groups else 0)
