"""LoadGen's logs, as it writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8qa.bench.loadgen_logs import DETAIL_FILENAME, TRACE_FILENAME, read_logs

DETAIL = """\
:::MLLOG {"key": "loadgen_version", "value": "6.0.17 @ d6147c7eb7", "time_ms": 0.1}
:::MLLOG {"key": "result_validity", "value": "INVALID", "time_ms": 39.1}
:::MLLOG {"key": "result_perf_constraints_met", "value": false, "time_ms": 39.1}
:::MLLOG {"key": "result_min_duration_met", "value": true, "time_ms": 39.1}
:::MLLOG {"key": "early_stopping_met", "value": false, "time_ms": 39.1}
:::MLLOG {"key": "result_99.00_percentile_latency_ns", "value": 26722426, "time_ms": 3}
:::MLLOG {"key": "cut off whe"""
TRACE = """\
{"traceEvents":[
{"name":"LogDetail","ph":"X","pid":1,"tid":2,"args":{"key":""loadgen_version""}},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":0,"ts":7.9,"args":{"sample_seq":0,"query_seq":0,"sample_idx":68,"issue_start_ns":230,"complete_ns":7485038}},
{"name":"Sample","cat":"default","ph":"e", "pid":1,"id":0,"ts":15427.048},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":1,"ts":7.9,"args":{"sample_seq":1,"query_seq":1,"sample_idx":6,"issue_start_ns":1500000,"complete_ns":9000000}},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":2,"ts":7.9,"args":{"sample_se"""


def test_verdict_figures_and_latencies(tmp_path: Path) -> None:
    """Conditions that were not met are the reasons; entries cut off are left out."""
    (tmp_path / DETAIL_FILENAME).write_text(DETAIL)
    (tmp_path / TRACE_FILENAME).write_text(TRACE)
    log = read_logs(tmp_path)
    assert log.version == "6.0.17"
    assert not log.valid
    assert log.reasons == (
        "over the bound on latency",
        "too few queries to be sure of the percentile",
    )
    assert log.values["result_99.00_percentile_latency_ns"] == 26722426
    assert log.latency_ms.tolist() == pytest.approx([7.485038, 9.0])
    assert log.lag_ms.tolist() == pytest.approx([0.00023, 1.5])


def test_nothing_was_written(tmp_path: Path) -> None:
    """A test that ended at once is invalid, and has no figures."""
    log = read_logs(tmp_path)
    assert not log.valid
    assert log.values == {}
    assert log.latency_ms.size == log.lag_ms.size == 0
