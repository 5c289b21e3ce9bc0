"""Engine times for every shape: measured where there is a measurement, else fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from int8qa.contract import Precision
from int8qa.errors import DataFileError
from int8qa.planning.cost_model import (
    fit_terms,
    read_build_times,
    read_engine_times,
    read_result,
    tabulate_costs,
)
from int8qa.planning.simulation import Shape
from tests.planning.conftest import CONTRACT

TERMS = (2.0, 0.03, 6e-5)
SHAPES = [(1, 128), (1, 384), (8, 128), (4, 64), (2, 32)]


def formula_ms(shape: Shape) -> float:
    batch, length = shape
    return TERMS[0] + TERMS[1] * batch * length + TERMS[2] * batch * length**2


def test_fit_finds_the_terms() -> None:
    """Of times that follow the formula."""
    assert fit_terms({s: formula_ms(s) for s in SHAPES}) == pytest.approx(TERMS)


def test_no_term_is_negative() -> None:
    """Times that grow more slowly than by tokens still give times above 0."""
    terms = fit_terms({(1, 32): 5.0, (1, 128): 5.5, (1, 384): 5.2, (8, 128): 9.0})
    assert min(terms) >= 0
    assert max(terms) > 0


def test_measurements_stand() -> None:
    """Each measured shape keeps its time, whatever the fit says of it."""
    measured = {s: formula_ms(s) for s in SHAPES} | {(1, 32): 30.0}
    costs = tabulate_costs(measured, CONTRACT)
    assert costs.batch_s[1, 32] == 0.03
    assert costs.batch_s[2, 32] == pytest.approx(formula_ms((2, 32)) / 1e3)
    assert set(costs.batch_s) == {
        *((b, 32) for b in (1, 2, 4, 8)),
        *((b, 64) for b in (1, 2, 4)),
        *((b, 128) for b in (1, 2)),
        (1, 384),
    }
    assert costs.measured == 5  # 8×128 is more than is served, and served the fit
    assert costs.fit_error is not None
    assert costs.fit_error > 0.5


def test_as_many_shapes_as_terms_tell_no_error() -> None:
    """A fit that must meet every point says nothing of its error."""
    costs = tabulate_costs({s: formula_ms(s) for s in SHAPES[:3]}, CONTRACT)
    assert costs.fit_error is None
    assert costs.batch_s[4, 64] == pytest.approx(formula_ms((4, 64)) / 1e3)


def test_a_full_grid_needs_no_fit() -> None:
    """Every legal shape measured: the table is the measurement."""
    legal = tabulate_costs({s: formula_ms(s) for s in SHAPES}, CONTRACT).batch_s
    costs = tabulate_costs(dict.fromkeys(legal, 7.0), CONTRACT)
    assert set(costs.batch_s.values()) == {0.007}
    assert (costs.measured, costs.fit_error) == (len(legal), None)


def test_too_few_shapes() -> None:
    """Refused with what to do."""
    with pytest.raises(DataFileError, match=r"2 shapes.*10 are served.*bench engine"):
        tabulate_costs({(1, 32): 1.0, (1, 64): 2.0}, CONTRACT)


def test_ceiling_is_the_best_batch_of_each_length() -> None:
    """No order of arrivals gives an engine less to do."""
    legal = tabulate_costs({s: formula_ms(s) for s in SHAPES}, CONTRACT).batch_s
    costs = tabulate_costs(dict.fromkeys(legal, 8.0), CONTRACT)
    assert costs.ceiling_qps([(32,)]) == pytest.approx(1000)
    assert costs.ceiling_qps([(32,), (384, 64)]) == pytest.approx(2 / 0.011)


def test_engine_result_is_read(tmp_path: Path) -> None:
    """By precision and shape, at the median; from the file that the bench writes."""
    path = tmp_path / "engine.json"
    row = {"p50_ms": 2.5, "p99_ms": 9.0, "runs": 7}
    path.write_text(
        json.dumps(
            {
                "format_version": 1,
                "kind": "engine",
                "build_id": "b1",
                "provenance": {"machine": {"processor": "Abacus 9000", "cores": 2}},
                "latency": {"4x64": {"int8": row, "fp16": row | {"p50_ms": 5}}},
            }
        )
    )
    times = read_engine_times(read_result(path))
    assert times.build_id == "b1"
    assert times.machine == "Abacus 9000, 2 cores"
    assert times.latency_ms == {
        Precision.INT8: {(4, 64): 2.5},
        Precision.FP16: {(4, 64): 5.0},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "its kind is None"),
        ('{"kind": "soak", "format_version": 1}', "its kind is 'soak'"),
        ('{"kind": "engine", "format_version": 9}', "of format_version 1"),
    ],
)
def test_other_files_are_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    """With what they are and what is allowed."""
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataFileError, match=message):
        read_result(path)


def test_build_times(tmp_path: Path) -> None:
    """From the manifest; variants that are not served are passed over."""
    latency: dict[str, Any] = {
        "1x128": {"int8": {"p50_ms": 7.0}, "pure int8": {"p50_ms": 6.0}}
    }
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        json.dumps({"build_id": "b2", "device": "Abacus", "latency": latency})
    )
    times = read_build_times(tmp_path)
    assert (times.source, times.machine) == ("the build", "Abacus")
    assert times.build_id == "b2"
    assert times.latency_ms == {Precision.INT8: {(1, 128): 7.0}}
    manifest.write_text(json.dumps({"build_id": "b2", "latency": {}}))
    with pytest.raises(DataFileError, match="bench engine"):
        read_build_times(tmp_path)
