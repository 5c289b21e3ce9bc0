"""The modelled policy makes the batches that the gateway's own batcher makes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from int8qa.contract import Contract, Precision
from int8qa.gateway.batcher import Batcher, BatchLogits, PaddedBatch
from int8qa.planning import simulation
from int8qa.planning.batching import Batch, BatchQueue, Request, derive_policy
from int8qa.planning.simulation import Overheads, Service, simulate_poisson
from int8qa.planning.traffic import Question
from int8qa.settings import BatcherSettings
from tests.gateway.test_batcher import in_virtual_time, make_window

CONTRACT = Contract(
    build_id="test",
    checkpoint="test",
    tokenizer_sha256="0" * 64,
    pad_token_id=0,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_window_tokens=384,
    sequence_buckets=(32, 64, 128, 384),
    batch_sizes=(1, 2, 4, 8),
    max_batch_tokens=256,
    models={},
)
CALL_S = 0.0011
MIX: tuple[Question, ...] = (
    *[(32,)] * 5,
    *[(64,)] * 3,
    (128,),
    (32, 64),
    (384, 384, 128),
    (64,) * 11,
)


def cost_s(size: int, length: int) -> float:
    return 0.00093 + 31e-6 * size * length


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("load", [0.3, 0.8, 1.5])
def test_batches_are_those_of_the_gateway(
    max_in_flight: int, load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same arrivals leave at the same times, in the same batches, row by row."""
    settings = BatcherSettings(max_in_flight=max_in_flight, max_queue_tokens=2**31)
    policy = derive_policy(CONTRACT, settings)
    service = Service(
        policy,
        {
            (b, s): cost_s(b, s)
            for s, sizes in policy.batch_sizes.items()
            for b in sizes
        },
        Overheads(call_s=CALL_S),
    )
    taken: list[tuple[float, Batch]] = []
    requests: list[Request] = []

    class Recorder(BatchQueue):
        def join(self, request: Request) -> None:
            requests.append(request)
            super().join(request)

        def take(self, now_s: float, in_flight: int) -> Batch | None:
            batch = super().take(now_s, in_flight)
            if batch is not None:
                taken.append((now_s, batch))
            return batch

    monkeypatch.setattr(simulation, "BatchQueue", Recorder)
    alone = sum(cost_s(1, s) for question in MIX for s in question) / len(MIX)
    simulate_poisson(service, MIX, load / alone, count=600, warm_up=0, seed=3)
    modelled = [(b.length, tuple(r.number for r in b.requests)) for _, b in taken]
    real = drive_gateway(settings, requests)
    assert [rows for _, rows in real] == modelled
    assert [time_s for time_s, _ in real] == pytest.approx([t for t, _ in taken])
    assert max(len(numbers) for _, numbers in modelled) >= 4


def drive_gateway(
    settings: BatcherSettings, requests: list[Request]
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
                await asyncio.sleep(cost_s(size, length))
            logits = np.zeros((size, length), dtype=np.float32)
            return BatchLogits(start=logits, end=logits)

        batcher = Batcher(Precision.INT8, CONTRACT, settings, infer, clock=loop.time)
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


def test_policy_is_the_contracts() -> None:
    """Sizes within the budget of tokens; one window is always legal."""
    policy = derive_policy(CONTRACT, BatcherSettings(max_wait_s=0.01, max_in_flight=5))
    assert policy.batch_sizes == {
        32: (1, 2, 4, 8),
        64: (1, 2, 4),
        128: (1, 2),
        384: (1,),
    }
    assert (policy.max_wait_s, policy.max_in_flight) == (0.01, 5)
