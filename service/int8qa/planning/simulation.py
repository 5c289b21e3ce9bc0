"""Questions through replicas of gateway, batcher and engine, as discrete events.

In: questions, a rate or a number of clients, a policy, costs. Out: latencies, and what
the engines did. SimPy keeps the clock; the gateway's own line decides what leaves, and
``engine.py`` who computes. Deterministic by its seed. Knows no precision and no bound.

A replica is one gateway process with one engine behind it. Poisson arrivals are split
between replicas at random, which leaves Poisson arrivals at each of them, independent
of the others. Source: Kingman, Poisson Processes (1993), 5.1, the colouring theorem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from int8qa.gateway.line import Batch, Policy, WaitingLine
from int8qa.planning.engine import SharedEngine
from int8qa.planning.traffic import Question

Shape = tuple[int, int]
"""Batch and padded length."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a question costs beside the engine's own time."""

    request_s: float = 0.0
    """Of each question, from the client and back: HTTP, tokenizing, decoding. It delays
    the question alone."""
    call_s: float = 0.0
    """Of each batch, on its way through Triton. It delays the batch and leaves the
    engine free."""
    interference_s: float = 0.0
    """Engine time lost to each question that arrives while the engine works: gateway
    and engine share cores."""
    cold_s: float = 0.0
    """Engine time that a batch takes more after a long pause; see ``SharedEngine``."""


@dataclass(frozen=True, slots=True)
class Service:
    """One replica."""

    policy: Policy
    batch_s: Mapping[Shape, float]
    """Seconds of an engine's time by shape."""
    overheads: Overheads = Overheads()
    instances: int = 1
    """Batches that the engine computes side by side."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a batch's time about that of its shape:
    what else the machine does. ``batch_s`` are its medians."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One simulation without its warm-up."""

    latency_s: NDArray[np.float64]
    """[N] of each question, from the client and back, by arrival."""
    throughput_qps: float
    utilisation: float
    """Share of time that engines worked, 0-1."""
    batch_windows: float
    """Mean number of windows in a batch."""
    overrun: float = 0.0
    """Share of time between the last arrival and the last answer, 0-1: next to nothing
    unless questions came faster than they were answered."""


@dataclass(eq=False, slots=True)
class Request:
    """A question on its way."""

    number: int
    """Its place among the arrivals."""
    question: Question
    arrival_s: float
    waiting: int
    """Windows without an answer."""


class _Replica:
    def __init__(
        self,
        env: simpy.Environment,
        service: Service,
        finish: Callable[[Request], None],
        warm_s: float,
        noise: np.random.Generator,
    ) -> None:
        self.engine = SharedEngine(
            env,
            service.instances,
            cold_s=service.overheads.cold_s,
            observed_from_s=warm_s,
        )
        self.batches = 0
        self.windows = 0
        self._env = env
        self._service = service
        self._finish = finish
        self._warm_s = warm_s
        self._noise = noise
        self._line: WaitingLine[Request] = WaitingLine(service.policy)
        self._in_flight = 0
        self._alarm_s = math.inf

    def submit(self, request: Request) -> None:
        if self.engine.working and self._service.overheads.interference_s:
            self.engine.lose(self._service.overheads.interference_s)
        self._line.join(request, request.question)
        self._dispatch(self._env.now)

    def _dispatch(self, now_s: float) -> None:
        while batch := self._line.take(now_s, self._in_flight):
            self._env.process(self._run(batch, alone=not self._in_flight))
            self._in_flight += 1
        alarm_s = self._line.next_alarm_s(self._in_flight)
        # One that rings for nothing is harmless, and SimPy's cannot be called off.
        if math.isfinite(alarm_s) and alarm_s != self._alarm_s:
            self._alarm_s = alarm_s
            alarm = self._env.timeout(max(0.0, alarm_s - self._env.now))
            # Rounding may let it ring before the clock shows its time.
            alarm.callbacks.append(
                lambda _: self._dispatch(max(alarm_s, self._env.now))
            )

    def _run(
        self, batch: Batch[Request], *, alone: bool
    ) -> Generator[simpy.Event, Any, None]:
        if self._service.overheads.call_s:
            yield self._env.timeout(self._service.overheads.call_s)
        work_s = self._service.batch_s[len(batch.rows), batch.length]
        if self._service.spread:
            work_s *= math.exp(self._service.spread * self._noise.standard_normal())
        yield self.engine.run(work_s, alone=alone)
        if self._env.now >= self._warm_s:
            self.batches += 1
            self.windows += len(batch.rows)
        self._in_flight -= 1
        for request, _ in batch.rows:
            request.waiting -= 1
            if not request.waiting:
                self._finish(request)
        self._dispatch(self._env.now)


def simulate_poisson(
    service: Service,
    questions: Sequence[Question],
    rate_qps: float,
    *,
    count: int,
    warm_up: int,
    seed: int | Sequence[int],
    replicas: int = 1,
) -> Observation:
    """Questions that come by chance, whether or not those before were answered.

    Equal seeds give equal questions, and arrivals and replicas that differ by scale
    alone: common random numbers, so that two services differ by what they are.

    Args:
        service: each replica.
        questions: drawn from with equal chances.
        rate_qps: of all arrivals together.
        count: questions observed.
        warm_up: questions before these, not observed.
        seed: of all that is drawn.
        replicas: that share the arrivals.
    """
    total = warm_up + count
    gaps, picks, places, noise = (
        np.random.default_rng((*_flatten(seed), i)) for i in (0, 1, 2, 3)
    )
    arrivals = np.cumsum(gaps.exponential(size=total)) / rate_qps
    drawn = picks.integers(len(questions), size=total)
    target = (places.random(total) * replicas).astype(int)
    warm_s = float(arrivals[warm_up])
    env = simpy.Environment()
    latency = np.zeros(total)

    def finish(request: Request) -> None:
        latency[request.number] = env.now - request.arrival_s

    shared = [_Replica(env, service, finish, warm_s, noise) for _ in range(replicas)]

    def arrive() -> Generator[simpy.Event, Any, None]:
        # Python's own numbers: NumPy's are slow one by one.
        plan = zip(arrivals.tolist(), drawn.tolist(), target.tolist(), strict=True)
        for number, (time_s, drawn_question, place) in enumerate(plan):
            yield env.timeout(max(0.0, time_s - env.now))
            question = questions[drawn_question]
            request = Request(number, question, env.now, len(question))
            shared[place].submit(request)

    env.process(arrive())
    env.run()
    end_s = float((arrivals + latency).max())
    seen = _observe(
        service, latency[warm_up:], shared, count=count, span_s=end_s - warm_s
    )
    overrun = (end_s - float(arrivals[-1])) / (end_s - warm_s)
    return replace(seen, overrun=overrun)


def simulate_clients(
    service: Service,
    questions: Sequence[Question],
    clients: int,
    *,
    count: int,
    seed: int | Sequence[int],
) -> Observation:
    """Clients before one replica, each asking anew once it was answered.

    One client is LoadGen's SingleStream; many are its Offline.
    """
    picks, noise = (np.random.default_rng((*_flatten(seed), i)) for i in (1, 3))
    drawn = picks.integers(len(questions), size=count).tolist()
    env = simpy.Environment()
    latency = np.zeros(count)
    answered: dict[int, simpy.Event] = {}
    request_s = service.overheads.request_s

    def finish(request: Request) -> None:
        latency[request.number] = env.now - request.arrival_s
        answered.pop(request.number).succeed()

    replica = _Replica(env, service, finish, 0.0, noise)
    numbers = iter(range(count))

    def ask() -> Generator[simpy.Event, Any, None]:
        for number in numbers:
            done = answered[number] = env.event()
            question = questions[drawn[number]]
            replica.submit(Request(number, question, env.now, len(question)))
            yield done
            yield env.timeout(request_s)

    for _ in range(clients):
        env.process(ask())
    env.run()
    return _observe(service, latency, [replica], count=count, span_s=env.now)


def _observe(
    service: Service,
    latency_s: NDArray[np.float64],
    replicas: Sequence[_Replica],
    *,
    count: int,
    span_s: float,
) -> Observation:
    batches = sum(replica.batches for replica in replicas)
    return Observation(
        latency_s=latency_s + service.overheads.request_s,
        throughput_qps=count / span_s,
        utilisation=sum(r.engine.busy_s for r in replicas) / (span_s * len(replicas)),
        batch_windows=sum(r.windows for r in replicas) / batches if batches else 0.0,
    )


def _flatten(seed: int | Sequence[int]) -> tuple[int, ...]:
    return (seed,) if isinstance(seed, int) else tuple(seed)
