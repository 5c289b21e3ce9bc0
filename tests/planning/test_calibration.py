"""Overheads are found again in measurements that were made with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from int8qa.planning.calibration import ASSUMED, calibrate
from int8qa.planning.simulation import (
    Overheads,
    simulate_clients,
    simulate_poisson,
)
from int8qa.planning.traffic import Question
from tests.bench.conftest import make_run
from tests.planning.conftest import make_service

TRUE = Overheads(request_s=0.0016, call_s=0.0009, interference_s=0.0012, cold_s=0.004)
SPREAD = 0.3
CLIENTS = 16
LIGHT_QPS = 8.0


def measure(questions: tuple[Question, ...]) -> list[dict[str, Any]]:
    """What LoadGen would see of a service with these overheads."""
    service = replace(make_service(TRUE), spread=SPREAD)
    light = simulate_poisson(
        service, questions, LIGHT_QPS, count=4000, warm_up=100, seed=79
    )
    single = simulate_clients(service, questions, 1, count=4000, seed=77)
    offline = simulate_clients(service, questions, CLIENTS, count=4000, seed=78)
    return [
        make_run(
            "SingleStream",
            "int8",
            latency_ms={
                "mean": 1e3 * float(single.latency_s.mean()),
                "p99": 1e3 * float(np.percentile(single.latency_s, 99)),
            },
            time_ms={
                "inference": 5.0,
                "queue": 0.1,
                "edge": 1e3 * TRUE.request_s - 0.4,
                "tokenize": 0.4,
            },
        ),
        make_run("Offline", "int8", throughput_qps=offline.throughput_qps),
        make_run("Server", "int8", target_qps=40.0, latency_ms={"mean": 1e6}),
        make_run(
            "Server",
            "int8",
            target_qps=LIGHT_QPS,
            light=True,
            valid=False,
            latency_ms={"mean": 1e3 * float(light.latency_s.mean())},
        ),
    ]


def test_overheads_are_found_again(mixed: tuple[Question, ...]) -> None:
    """The stages tell request from call; Offline tells the interference.

    The tail of SingleStream tells the spread, and the light test what a pause costs.
    """
    service = make_service()
    found = calibrate(
        measure(mixed),
        "int8",
        service.policy,
        service.batch_s,
        mixed,
        clients=CLIENTS,
    )
    assert found.overheads.request_s == pytest.approx(TRUE.request_s)
    # What is left of means over thousands of questions drawn otherwise.
    assert found.overheads.call_s == pytest.approx(TRUE.call_s, abs=0.0006)
    assert found.overheads.interference_s == pytest.approx(
        TRUE.interference_s, abs=0.0006
    )
    assert found.overheads.cold_s == pytest.approx(TRUE.cold_s, abs=0.0012)
    assert found.spread == pytest.approx(SPREAD, abs=0.05)
    assert set(found.measured.values()) == {True}
    assert found.gateway_cpu_s == pytest.approx(0.0009)
    assert found.remarks == ()
    assert found.describe()["request_s"] == {"ms": 1.6, "source": "measured"}


def test_without_tests_all_is_assumed(mixed: tuple[Question, ...]) -> None:
    """Tests of another precision, and invalid ones, count for nothing."""
    service = make_service()
    for runs in (
        [],
        [make_run("SingleStream", "fp16"), make_run("Offline", "fp16")],
        [make_run("Offline", "int8", valid=False)],
    ):
        found = calibrate(runs, "int8", service.policy, service.batch_s, mixed)
        assert found.overheads == ASSUMED
        assert found.spread == 0
        assert set(found.measured.values()) == {False}
        assert found.gateway_cpu_s is None


def test_engines_elsewhere_lose_nothing(mixed: tuple[Question, ...]) -> None:
    """On a GPU neither interference nor an engine gone cold is assumed."""
    service = make_service()
    found = calibrate(
        [], "int8", service.policy, service.batch_s, mixed, shares_cores=False
    )
    assert found.overheads == replace(ASSUMED, interference_s=0.0, cold_s=0.0)


def test_impossible_measurements_are_remarked(mixed: tuple[Question, ...]) -> None:
    """A gateway faster than its engine gets no negative overheads."""
    service = make_service(speed=0.25)
    runs = measure(mixed)
    found = calibrate(
        runs, "int8", service.policy, service.batch_s, mixed, clients=CLIENTS
    )
    assert found.overheads == Overheads()
    single, offline = found.remarks
    assert "less than the engine alone" in single
    assert "too long for that run" in offline
