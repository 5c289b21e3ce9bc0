"""The simulation against queueing theory, and against itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from int8qa.gateway.line import Policy
from int8qa.planning.simulation import (
    Overheads,
    Service,
    simulate_clients,
    simulate_poisson,
)
from int8qa.planning.traffic import Question
from tests.planning.conftest import make_costs, make_service

MEAN_S = 0.01
QUANTILES = 40


def make_single_server(times_s: list[float]) -> tuple[Service, tuple[Question, ...]]:
    """One window at a time, first come first served: the textbook's M/G/1.

    A padded length for each time of service, all equally likely.
    """
    batch_s = {(1, length): time_s for length, time_s in enumerate(times_s, 1)}
    policy = Policy(make_costs(batch_s), max_wait_s=1.0, max_in_flight=1)
    return Service(policy, batch_s), tuple((length,) for _, length in batch_s)


def list_exponential() -> list[float]:
    """Quantiles of the exponential distribution, scaled to its mean."""
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    times = -np.log(1 - shares)
    return [float(t) for t in times * MEAN_S / times.mean()]


@pytest.mark.parametrize("load", [0.4, 0.8])
@pytest.mark.parametrize("times_s", [[MEAN_S], list_exponential()], ids=["MD1", "MM1"])
def test_waiting_times_are_pollaczek_and_khinchine_s(
    times_s: list[float], load: float
) -> None:
    """M/D/1 and M/M/1: the mean wait is λE[S²] / 2(1-ρ); engines work ρ of the time.

    Source: Kleinrock, Queueing Systems I (1975), 5.6.
    """
    service, questions = make_single_server(times_s)
    rate = load / MEAN_S
    seen = simulate_poisson(
        service, questions, rate, count=30_000, warm_up=2_000, seed=5
    )
    wait_s = rate * float(np.mean(np.square(times_s))) / (2 * (1 - load))
    # At ρ = 0.8 waits are correlated over hundreds of arrivals.
    assert seen.latency_s.mean() - MEAN_S == pytest.approx(wait_s, rel=0.1)
    assert seen.utilisation == pytest.approx(load, rel=0.02)
    assert seen.throughput_qps == pytest.approx(rate, rel=0.02)
    assert seen.batch_windows == 1


def test_percentiles_are_those_of_mm1() -> None:
    """The time in an M/M/1 queue is exponential, of rate μ-λ, at every percentile."""
    service, questions = make_single_server(list_exponential())
    rate = 0.5 / MEAN_S
    seen = simulate_poisson(
        service, questions, rate, count=30_000, warm_up=1_000, seed=6
    )
    expected = [-math.log(1 - q) / (1 / MEAN_S - rate) for q in (0.5, 0.95, 0.99)]
    found = np.percentile(seen.latency_s, (50, 95, 99))
    assert found == pytest.approx(expected, rel=0.08)


def test_equal_seeds_equal_runs(mixed: tuple[Question, ...]) -> None:
    """To the last bit; another seed draws otherwise."""
    runs = [
        simulate_poisson(make_service(), mixed, 60, count=400, warm_up=50, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(runs[0].latency_s, runs[1].latency_s)
    assert not np.array_equal(runs[0].latency_s, runs[2].latency_s)


def test_time_has_no_unit(mixed: tuple[Question, ...]) -> None:
    """Engines and arrivals ten times as fast: a tenth of each latency."""
    slow = make_service(max_wait_s=0.02)
    fast = make_service(max_wait_s=0.002, speed=10)
    first, second = (
        simulate_poisson(service, mixed, rate, count=2000, warm_up=10, seed=1)
        for service, rate in ((slow, 60), (fast, 600))
    )
    assert second.latency_s == pytest.approx(first.latency_s / 10, rel=1e-6)
    assert second.utilisation == pytest.approx(first.utilisation)


def test_spread_leaves_the_median(mixed: tuple[Question, ...]) -> None:
    """Of lone questions; the tail grows, and equal seeds still give equal latencies."""
    even, uneven, again = (
        simulate_clients(
            replace(make_service(), spread=spread), [(128,)], 1, count=4000, seed=2
        ).latency_s
        for spread in (0.0, 0.3, 0.3)
    )
    assert np.median(uneven) == pytest.approx(np.median(even), rel=0.02)
    factor = np.exp(0.3 * 2.326)  # the normal distribution's 0.99 quantile
    assert np.percentile(uneven, 99) == pytest.approx(factor * even[0], rel=0.05)
    assert (uneven == again).all()


def test_nothing_is_lost(mixed: tuple[Question, ...]) -> None:
    """Every question is answered, none sooner than its longest window alone."""
    service = make_service(Overheads(request_s=0.003, call_s=0.002))
    seen = simulate_poisson(service, mixed, 200, count=3000, warm_up=0, seed=4)
    assert len(seen.latency_s) == 3000
    assert seen.latency_s.min() >= service.batch_s[1, 32] + 0.005 - 1e-9
    assert 1 < seen.batch_windows <= 8
    assert 0 < seen.utilisation <= 1


def test_overrun_tells_a_queue_without_end(mixed: tuple[Question, ...]) -> None:
    """Twice as many as can be answered: half of the time there are no arrivals."""
    service = make_service()
    most = simulate_clients(service, mixed, 64, count=2000, seed=1).throughput_qps
    calm, flood = (
        simulate_poisson(service, mixed, rate, count=2000, warm_up=0, seed=1)
        for rate in (0.5 * most, 2 * most)
    )
    assert calm.overrun < 0.02
    assert flood.overrun == pytest.approx(0.5, abs=0.1)


def test_latency_grows_with_the_rate(mixed: tuple[Question, ...]) -> None:
    """On the same draws; and replicas at the same total make it shrink."""
    service = make_service()
    by_rate = [
        np.percentile(
            simulate_poisson(
                service, mixed, rate, count=4000, warm_up=400, seed=1
            ).latency_s,
            99,
        )
        for rate in (20, 40, 60, 80)
    ]
    assert by_rate == sorted(by_rate)
    by_replicas = [
        np.percentile(
            simulate_poisson(
                service, mixed, 80, count=4000, warm_up=400, seed=1, replicas=replicas
            ).latency_s,
            99,
        )
        for replicas in (1, 2, 4, 8)
    ]
    assert by_replicas == sorted(by_replicas, reverse=True)


def test_one_replica_stands_for_all(mixed: tuple[Question, ...]) -> None:
    """Six at six times the rate, split at random, answer as one at that rate does."""
    service = make_service()
    one, six = (
        np.array(
            [
                np.percentile(
                    simulate_poisson(
                        service,
                        mixed,
                        50 * replicas,
                        count=3000,
                        warm_up=300 * replicas,
                        seed=(replicas, seed),
                        replicas=replicas,
                    ).latency_s,
                    (50, 95, 99),
                )
                for seed in range(8)
            ]
        )
        for replicas in (1, 6)
    )
    error = np.sqrt((one.var(axis=0, ddof=1) + six.var(axis=0, ddof=1)) / 8)
    assert (np.abs(one.mean(axis=0) - six.mean(axis=0)) < 3 * error).all()


def test_one_client_meets_nobody() -> None:
    """Its latency is the sum of the parts, and it asks again after just that."""
    service = make_service(Overheads(0.003, 0.002, interference_s=0.5))
    seen = simulate_clients(service, [(128,)], 1, count=50, seed=0)
    alone_s = service.batch_s[1, 128] + 0.005
    assert seen.latency_s == pytest.approx([alone_s] * 50)
    assert seen.throughput_qps == pytest.approx(1 / alone_s)


def test_many_clients_fill_the_engine() -> None:
    """Full batches, one behind the other, and what each question takes from them."""
    lost_s = 0.0007
    service = make_service(Overheads(0.001, 0.0005, interference_s=lost_s))
    seen = simulate_clients(service, [(32,)], 48, count=8000, seed=0)
    assert seen.batch_windows == pytest.approx(8, rel=0.02)
    assert seen.utilisation == pytest.approx(1, rel=0.02)
    assert 1 / seen.throughput_qps == pytest.approx(
        service.batch_s[8, 32] / 8 + lost_s, rel=0.02
    )
