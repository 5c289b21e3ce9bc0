"""The batches inside one precision's engine, from assembling to each window's logits.

In: batches of the line. Out: results and errors to the submissions whose windows they
hold; how long the engine is occupied. Decides nothing about what leaves or when.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from int8qa.contract import Precision
from int8qa.errors import EngineOutputError, EngineUnavailableError, Int8qaError
from int8qa.gateway.line import Batch
from int8qa.gateway.pace import DrainRate
from int8qa.gateway.submission import Submission, WindowResult
from int8qa.gateway.tensors import (
    BatchLogits,
    PaddedBatch,
    assemble_batch,
    check_shapes,
    cut_logits,
)
from int8qa.gateway.tracing import Tracing

MAX_HOLD_S = 1.0
"""Longest time an abandoned batch counts as in flight: what Triton began, it ends."""

Infer = Callable[[Precision, PaddedBatch, float | None], Awaitable[BatchLogits]]
"""The engine. Last comes an absolute deadline on the batcher's clock, the latest among
the batch's callers, None if one of them has none. The engine must return or raise by
then: a call that never ends keeps its place among ``max_in_flight``."""


class BatchObserver(Protocol):
    """Telemetry's view of a batcher; every call is cheap and never raises."""

    def on_queue(self, precision: Precision, windows: int) -> None:
        """So many windows are queued now."""

    def on_batch(
        self, precision: Precision, windows: int, tokens: int, padding_tokens: int
    ) -> None:
        """A batch of B x S ``tokens`` goes out, so many of them padding."""


@dataclass(eq=False, slots=True)
class _Flight:
    """A batch inside the engine, and whose windows it holds."""

    requests: list[Submission]
    work: float
    dispatched_s: float
    beside: int
    """Others in the engine when it left."""
    orphaned: bool = False


class Flights:
    """One task for each batch in flight.

    Args:
        precision: of the engine.
        infer: the engine.
        pad_token_id: behind each window.
        pace: told of each answered batch.
        fail: ends requests with an error.
        on_end: called when a place is free.
        observer: told of each batch.
        tracing: likewise.
        clock: seconds, as of the requests' deadlines.
    """

    def __init__(
        self,
        precision: Precision,
        infer: Infer,
        pad_token_id: int,
        pace: DrainRate,
        *,
        fail: Callable[[Iterable[Submission], BaseException], None],
        on_end: Callable[[], None],
        observer: BatchObserver | None,
        tracing: Tracing,
        clock: Callable[[], float],
    ) -> None:
        self._precision = precision
        self._infer = infer
        self._pad_token_id = pad_token_id
        self._pace = pace
        self._fail = fail
        self._on_end = on_end
        self._observer = observer
        self._tracing = tracing
        self._clock = clock
        self._flights: dict[asyncio.Task[None], _Flight] = {}  # by dispatch

    def __len__(self) -> int:
        """Batches in the engine, those that nobody waits for any more among them."""
        return sum(not task.done() for task in self._flights)

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """One for each batch in the engine."""
        return tuple(self._flights)

    @property
    def occupied(self) -> int:
        """Batches in flight that somebody waits for."""
        # Whoever got an answer may run, and ask again, before its batch has landed.
        return sum(
            not (flight.orphaned or task.done())
            for task, flight in self._flights.items()
        )

    def measure_delay_s(self) -> float:
        """How much longer than usual the oldest batch has taken so far."""
        for flight in self._flights.values():
            if not flight.orphaned:
                return self._pace.measure_delay_s(
                    self._clock(), flight.dispatched_s, flight.work
                )
        return 0.0

    def send(self, batch: Batch[Submission]) -> None:
        """Start a batch on its way; whatever becomes of it, its requests hear of it."""
        requests = [request for request, _ in batch.rows]
        flight = _Flight(requests, batch.work, self._clock(), self.occupied)
        task = asyncio.create_task(self._run(batch, flight))
        self._flights[task] = flight
        task.add_done_callback(self._land)

    def cancel_orphans(self, left: Submission) -> None:
        """Cancel the batches of a request that left, if nobody else is in them."""
        for task, flight in self._flights.items():
            if (
                left in flight.requests
                and not flight.orphaned
                and all(request.answer.done() for request in flight.requests)
            ):
                flight.orphaned = True
                task.cancel()
                self._on_end()

    def cancel(self) -> None:
        """Cancel all."""
        for task in self._flights:
            task.cancel()

    async def _run(self, batch: Batch[Submission], flight: _Flight) -> None:
        """Assemble, infer, fan out; whatever fails here fails these rows alone."""
        failure: type[Int8qaError] = EngineUnavailableError
        rows = batch.rows
        try:
            padded = self._assemble(batch, flight.beside)
            deadline_s = max(request.deadline_s for request, _ in rows)
            dispatched_s = self._clock()
            with self._tracing.trace_batch(
                [request.trace for request, _ in rows],
                self._precision,
                padded.input_ids.shape,
            ):
                logits = await self._infer(
                    self._precision,
                    padded,
                    None if math.isinf(deadline_s) else deadline_s,
                )
            answered_s = self._clock()
            failure = EngineOutputError
            check_shapes(logits, padded.input_ids.shape)
            self._pace.record(flight.work, dispatched_s, answered_s)
            for row, (request, index) in enumerate(rows):
                own = len(request.windows[index])
                cut = cut_logits(logits, row, own)
                if cut is None:
                    # Its neighbours' logits are sound.
                    self._fail([request], _not_finite_error(self._precision, own))
                    continue
                queue_s = dispatched_s - request.arrival_s
                inference_s = answered_s - dispatched_s
                request.receive(index, WindowResult(*cut, queue_s, inference_s))
        except (Exception, asyncio.CancelledError) as cause:  # noqa: BLE001
            # gRPC answers a closed channel with CancelledError; it strands nobody here.
            error = cause
            if not isinstance(cause, Int8qaError):
                error = failure(
                    f"a batch of {len(rows)} windows x {batch.length} tokens failed in "
                    f"{self._precision} with {type(cause).__name__}; ask again"
                )
                error.__cause__ = cause
            self._fail(flight.requests, error)
        if flight.orphaned:
            # Triton drops a batch that waits there; one it has begun it ends, and
            # tells nobody. It keeps no place, but ``len`` counts it until then.
            spent_s = self._clock() - flight.dispatched_s
            rest_s = self._pace.estimate_s(flight.work) - spent_s
            await asyncio.sleep(min(max(rest_s, 0.0), MAX_HOLD_S))

    def _assemble(self, batch: Batch[Submission], beside: int) -> PaddedBatch:
        windows = [request.windows[index] for request, index in batch.rows]
        padded = assemble_batch(
            windows, batch.length, self._pad_token_id, beside=beside
        )
        if self._observer is not None:
            tokens = padded.input_ids.size
            padding_tokens = tokens - sum(map(len, windows))
            self._observer.on_batch(
                self._precision, len(windows), tokens, padding_tokens
            )
        return padded

    def _land(self, task: asyncio.Task[None]) -> None:
        del self._flights[task]
        self._on_end()


def _not_finite_error(precision: Precision, tokens: int) -> EngineOutputError:
    return EngineOutputError(
        f"{precision} returned NaN or infinite logits for a window of {tokens} tokens, "
        f"finite ones are expected; ask another precision"
    )
