"""The simulation makes the batches that the gateway's own batcher makes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from int8qa.contract import Contract, Precision
from int8qa.gateway.batcher import Batcher
from int8qa.gateway.line import Batch, WaitingLine, derive_policy
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.planning import simulation
from int8qa.planning.simulation import (
    Overheads,
    Request,
    Service,
    Shape,
    simulate_poisson,
)
from int8qa.planning.traffic import Question
from int8qa.settings import BatcherSettings
from tests.gateway.test_batcher import in_virtual_time, make_window
from tests.planning.conftest import CONTRACT, MODEL

CALL_S = 0.0011
MIX: tuple[Question, ...] = (
    *[(32,)] * 5,
    *[(64,)] * 3,
    (128,),
    (32, 64),
    (384, 384, 128),
    (64,) * 11,
)


@pytest.mark.parametrize("call_s", [0.00093, 0.0093], ids=["tokens", "calls"])
@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("load", [0.3, 0.8, 1.5])
def test_batches_are_those_of_the_gateway(
    max_in_flight: int, load: float, call_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same arrivals leave at the same times, in the same batches, row by row.

    Before engines that take their time for tokens and for calls.
    """
    settings = BatcherSettings(max_in_flight=max_in_flight, max_queue_tokens=2**31)
    costs_s = {
        (size, length): call_s + 31e-6 * size * length
        for length in CONTRACT.sequence_buckets
        for size in CONTRACT.list_batch_sizes(length)
    }
    contract = CONTRACT.model_copy(
        update={
            "models": {Precision.INT8: MODEL},
            "batch_ms": {
                Precision.INT8: {
                    length: tuple(
                        1e3 * costs_s[size, length]
                        for size in CONTRACT.list_batch_sizes(length)
                    )
                    for length in CONTRACT.sequence_buckets
                }
            },
        }
    )
    policy = derive_policy(contract, Precision.INT8, settings)
    service = Service(policy, costs_s, Overheads(call_s=CALL_S))
    taken: list[tuple[float, Batch[Request]]] = []
    requests: list[Request] = []

    class Recorder(WaitingLine[Request]):
        def join(self, request: Request, lengths: Iterable[int]) -> None:
            requests.append(request)
            super().join(request, lengths)

        def take(
            self, now_s: float, in_flight: int, *, closing: bool = False
        ) -> Batch[Request] | None:
            batch = super().take(now_s, in_flight, closing=closing)
            if batch is not None:
                taken.append((now_s, batch))
            return batch

    monkeypatch.setattr(simulation, "WaitingLine", Recorder)
    alone = sum(costs_s[1, s] for question in MIX for s in question) / len(MIX)
    simulate_poisson(service, MIX, load / alone, count=600, warm_up=0, seed=3)
    modelled = [(b.length, tuple(r.number for r, _ in b.rows)) for _, b in taken]
    real = drive_gateway(contract, settings, requests, costs_s)
    assert [rows for _, rows in real] == modelled
    assert [time_s for time_s, _ in real] == pytest.approx([t for t, _ in taken])
    assert max(len(numbers) for _, numbers in modelled) >= 4


def drive_gateway(
    contract: Contract,
    settings: BatcherSettings,
    requests: list[Request],
    costs_s: Mapping[Shape, float],
) -> list[tuple[float, tuple[int, tuple[int, ...]]]]:
    """The gateway's batcher before an engine that takes as long, in virtual time."""
    batches: list[tuple[float, tuple[int, tuple[int, ...]]]] = []

    @in_virtual_time
    async def drive() -> None:
        loop = asyncio.get_running_loop()
        engine = asyncio.Lock()

        async def infer(
            precision: Precision, batch: PaddedBatch, deadline: float | None
        ) -> BatchLogits:
            size, length = batch.input_ids.shape
            numbers = tuple(int(row[0]) // 512 for row in batch.input_ids)
            batches.append((loop.time(), (length, numbers)))
            await asyncio.sleep(CALL_S)
            async with engine:
                await asyncio.sleep(costs_s[size, length])
            logits = np.zeros((size, length), dtype=np.float32)
            return BatchLogits(start=logits, end=logits)

        batcher = Batcher(Precision.INT8, contract, settings, infer, clock=loop.time)
        await batcher.start()
        answers: list[asyncio.Task[Any]] = []
        for request in requests:
            await asyncio.sleep(request.arrival_s - loop.time())
            windows = [make_window(request.number, s) for s in request.question]
            answers.append(asyncio.create_task(batcher.submit(windows)))
        await asyncio.gather(*answers)
        await batcher.close(1.0)

    drive()
    return batches
