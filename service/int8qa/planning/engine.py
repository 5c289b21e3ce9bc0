"""An engine's time, shared by the batches inside it, as SimPy's clock goes.

In: batches with the seconds that each takes of the whole engine. Out: an event when
each is done; how much of the engine was used. Knows neither questions nor shapes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import simpy

COOLING_S = 0.025
"""Time constant with which an idle engine loses caches and clocks. Source: lone
questions after pauses of 5 to 300 ms on two cores of an AMD EPYC, docs/planning.md."""
_NOTHING_S = 1e-9
"""Less than any work, and more than rounding leaves of a finished batch after weeks of
simulated time; what is less than the clock's own step would never be done."""


@dataclass(eq=False, slots=True)
class _Job:
    left_s: float
    share: float
    done: simpy.Event


class SharedEngine:
    """Instances that compute side by side on the same cores.

    A batch that left alone may use all of them, any other the share of one instance:
    ``build/engines/triton_openvino_model.py``. Where more is asked for than there is,
    each gets less in proportion. Batches that find no instance free wait in order. With
    one instance this is a single server.

    A batch that finds the engine idle for t seconds takes cold_s · (1 - e^(-t/COOLING))
    more: memory, cores and threads have gone to others or to sleep.
    """

    def __init__(
        self,
        env: simpy.Environment,
        instances: int,
        *,
        cold_s: float = 0.0,
        observed_from_s: float = 0.0,
    ) -> None:
        self.busy_s = 0.0
        """Seconds of the whole engine that were used since ``observed_from_s``."""
        self._env = env
        self._instances = instances
        self._cold_s = cold_s
        self._idle_from_s = env.now
        self._observed_from_s = observed_from_s
        self._running: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._seen_s = env.now
        self._plan_number = 0

    @property
    def working(self) -> bool:
        """Whether a batch is inside."""
        return bool(self._running)

    def run(self, work_s: float, *, alone: bool) -> simpy.Event:
        """Take a batch of so many seconds; the event is its end."""
        share = 1.0 if alone else 1.0 / self._instances
        self._advance()
        if not self._running:
            idle_s = self._env.now - self._idle_from_s
            work_s += self._cold_s * -math.expm1(-idle_s / COOLING_S)
        job = _Job(work_s, share, self._env.event())
        self._waiting.append(job)
        self._go_on()
        return job.done

    def lose(self, seconds: float) -> None:
        """Let whatever is inside take so much longer."""
        self._advance()
        for job in self._running:
            job.left_s += seconds / len(self._running)
        self._go_on()

    def _measure_speed(self) -> float:
        """By how much each gets less than its share, 0-1."""
        return min(1.0, 1.0 / sum(job.share for job in self._running))

    def _advance(self) -> None:
        now_s = self._env.now
        if self._running:
            speed = self._measure_speed()
            for job in self._running:
                job.left_s -= (now_s - self._seen_s) * job.share * speed
            used = speed * sum(job.share for job in self._running)
            since_s = max(self._seen_s, self._observed_from_s)
            self.busy_s += used * max(0.0, now_s - since_s)
        self._seen_s = now_s

    def _go_on(self) -> None:
        for job in self._running:
            if job.left_s <= _NOTHING_S:
                job.done.succeed()
        self._running = [job for job in self._running if job.left_s > _NOTHING_S]
        while self._waiting and len(self._running) < self._instances:
            self._running.append(self._waiting.popleft())
        self._plan_number += 1
        if not self._running:
            self._idle_from_s = self._env.now
        else:
            speed = self._measure_speed()
            next_s = min(job.left_s / (job.share * speed) for job in self._running)
            number = self._plan_number
            alarm = self._env.timeout(max(0.0, next_s))
            alarm.callbacks.append(lambda _: self._on_alarm(number))

    def _on_alarm(self, number: int) -> None:
        # Who came meanwhile planned anew.
        if number == self._plan_number:
            self._advance()
            self._go_on()
