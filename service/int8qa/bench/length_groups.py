"""Latencies among requests of like length.

In: length and latency of each request. Out: groups of as many requests each, with
median and tail. Knows no load generator and no gateway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH_GROUPS = 10
MIN_GROUP = 50
"""Of fewer answers a 99th percentile is all but the slowest of them."""


def group_by_length(
    timings: Sequence[tuple[int, float]], groups: int = LENGTH_GROUPS
) -> list[dict[str, float]]:
    """Latencies of requests of like length, the shortest first.

    A p99 over all lengths says most of all how unequal the questions are; within a
    group it is the service's own tail.

    Args:
        timings: bytes of a request, and seconds until its answer.
        groups: of as many requests each, give or take one; fewer where a group would
            have less than ``MIN_GROUP``.
    """
    groups = min(groups, len(timings) // MIN_GROUP)
    if not groups:
        return []
    described = []
    for part in np.array_split(np.array(sorted(timings), np.float64), groups):
        p50, p99 = 1e3 * np.percentile(part[:, 1], (50, 99))
        described.append(
            {
                "bytes_from": int(part[0, 0]),
                "bytes_to": int(part[-1, 0]),
                "queries": len(part),
                "p50_ms": round(float(p50), 3),
                "p99_ms": round(float(p99), 3),
                "ratio": round(float(p99 / p50), 3),
            }
        )
    return described
