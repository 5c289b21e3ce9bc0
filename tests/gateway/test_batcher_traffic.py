"""The batcher under traffic, before engines that take their time, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from int8qa.contract import Contract, Precision
from int8qa.gateway.batcher import Batcher
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.settings import BatcherSettings
from tests.gateway.test_batcher import in_virtual_time, let_run, make_window
from tests.records import make_model_record

PERCENTILES = (44, 111, 128, 138, 149, 163, 179, 197, 222, 265, 384)
"""Tokens of SQuAD v1.1's development questions with their paragraphs, in one window
each, from the shortest to the longest by tens; measured with BERT's uncased tokenizer."""
LENGTHS = tuple(
    round(float(n)) for n in np.interp(np.linspace(0, 10, 97), range(11), PERCENTILES)
)
WIRE_S = 0.0007
"""From the gateway to the engine, and back again."""

Cost = Callable[[int, int], float]


def cost_of_tokens(size: int, length: int) -> float:
    """A CPU's cores are full at one window: half a millisecond, 50 µs for a token."""
    return 0.0005 + 50e-6 * size * length


def cost_of_calls(size: int, length: int) -> float:
    """A GPU is not: 0.8 ms for launching, a quarter of a microsecond for a token."""
    return 0.0008 + 0.25e-6 * size * length


CPU = {"batch_sizes": (1, 2, 4, 8), "max_batch_tokens": 1024}
GPU = {"batch_sizes": (1, 2, 4, 8, 16, 32), "max_batch_tokens": 32 * 384}


def make_contract(shapes: dict[str, object], cost: Cost | None = None) -> Contract:
    """With the costs of its engine, or without."""
    contract = Contract(
        build_id="test",
        checkpoint="test",
        tokenizer_sha256="0" * 64,
        pad_token_id=0,
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        max_window_tokens=384,
        sequence_buckets=tuple(range(32, 385, 32)),
        models={Precision.INT8: make_model_record()},
        **shapes,
    )
    if cost is None:
        return contract
    table = {
        length: tuple(1e3 * cost(b, length) for b in contract.list_batch_sizes(length))
        for length in contract.sequence_buckets
    }
    return contract.model_copy(update={"batch_ms": {Precision.INT8: table}})


@dataclass
class Machine:
    """An engine that works on one batch after another, and a batcher before it."""

    contract: Contract
    cost: Cost
    max_in_flight: int = 2
    started_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    """Numbers of the windows, by batch."""
    computed_tokens: int = 0
    padding_tokens: int = 0

    def __post_init__(self) -> None:
        self.numbers = itertools.count(1)
        self.turn = asyncio.Lock()
        self.batcher = Batcher(
            Precision.INT8,
            self.contract,
            BatcherSettings(max_in_flight=self.max_in_flight, max_queue_tokens=2**31),
            self.infer,
            clock=asyncio.get_running_loop().time,
        )

    async def infer(
        self, precision: Precision, batch: PaddedBatch, deadline: float | None
    ) -> BatchLogits:
        loop = asyncio.get_running_loop()
        size, length = batch.input_ids.shape
        assert size in self.contract.list_batch_sizes(length)
        self.rows.append([int(row[1]) // 512 for row in batch.input_ids])
        self.computed_tokens += batch.attention_mask.size
        self.padding_tokens += int((batch.attention_mask == 0).sum())
        await asyncio.sleep(WIRE_S)
        async with self.turn:
            self.started_s.append(loop.time())
            await asyncio.sleep(self.cost(size, length))
            self.ended_s.append(loop.time())
        await asyncio.sleep(WIRE_S)
        logits = batch.input_ids.astype(np.float32)
        return BatchLogits(start=logits, end=logits)

    async def ask(self, *lengths: int) -> int:
        """Submit windows of so many tokens; the first one's number."""
        windows = [make_window(next(self.numbers), length) for length in lengths]
        results = await self.batcher.submit(windows)
        for window, result in zip(windows, results, strict=True):
            assert np.array_equal(result.start, window.input_ids)
        return int(windows[0].input_ids[1]) // 512

    async def answer(self, clients: int, questions: int) -> float:
        """Clients that ask anew once they were answered; questions per second."""
        await self.batcher.start()
        draw = random.Random(0)
        lengths = iter([draw.choice(LENGTHS) for _ in range(questions)])

        async def ask_on() -> None:
            for length in lengths:
                await self.ask(length)

        await asyncio.gather(*(ask_on() for _ in range(clients)))
        await self.batcher.close(1.0)
        assert sorted(itertools.chain(*self.rows)) == list(range(1, questions + 1))
        return questions / asyncio.get_running_loop().time()

    @property
    def padding_share(self) -> float:
        return self.padding_tokens / self.computed_tokens


def measure(machine: Callable[[], Machine], clients: int) -> tuple[float, float]:
    """Questions per second and padding share, on a loop of its own."""
    seen = []

    @in_virtual_time
    async def drive() -> None:
        built = machine()
        throughput = await built.answer(clients, 900)
        seen.append((throughput, built.padding_share))

    drive()
    return seen[0]


@pytest.mark.parametrize("clients", [4, 32, 128])
def test_little_is_padded_where_padding_costs(clients: int) -> None:
    """Below a tenth of the computed tokens; no slower than with batches of one length."""
    plain, known = (
        measure(lambda cost=cost: Machine(make_contract(CPU, cost), cost_of_tokens), n)
        for cost, n in ((None, clients), (cost_of_tokens, clients))
    )
    assert known[1] < 0.1
    assert known[0] >= 0.99 * plain[0]


@pytest.mark.parametrize(("clients", "gain"), [(8, 1.3), (32, 1.3), (128, 1.1)])
def test_lengths_mix_where_calls_cost(clients: int, gain: float) -> None:
    """An engine that is paid by the call answers more when lengths share batches."""
    pure, mixed = (
        measure(lambda cost=cost: Machine(make_contract(GPU, cost), cost_of_calls), n)
        for cost, n in ((None, clients), (cost_of_calls, clients))
    )
    assert mixed[0] >= gain * pure[0]
    assert pure[1] < 0.1


@pytest.mark.parametrize(("in_flight", "idle"), [(1, True), (2, False)])
@in_virtual_time
async def test_the_next_batch_is_there_when_the_engine_is_free(
    in_flight: int, idle: bool
) -> None:
    """Two in flight: one is assembled and sent while the other is worked on."""
    machine = Machine(
        make_contract(CPU, cost_of_tokens), cost_of_tokens, max_in_flight=in_flight
    )
    await machine.answer(32, 300)
    pauses = [
        b - a for a, b in zip(machine.ended_s, machine.started_s[1:], strict=False)
    ]
    # The last batches have nobody behind them.
    assert (max(pauses[:-4]) > 1e-9) == idle


@pytest.mark.parametrize(
    ("shapes", "cost"),
    [(CPU, cost_of_tokens), (GPU, cost_of_calls)],
    ids=["cpu", "gpu"],
)
@in_virtual_time
async def test_a_long_document_holds_up_nobody(
    shapes: dict[str, object], cost: Cost
) -> None:
    """Behind 200 windows: at most what is in flight and one batch of each length."""
    machine = Machine(make_contract(shapes, cost), cost)
    await machine.batcher.start()
    document = asyncio.create_task(machine.ask(*[384] * 199, 100))
    await let_run()
    for length in (384, 60):
        await asyncio.sleep(0.0013)
        assert not document.done()
        before = len(machine.rows)
        number = await machine.ask(length)
        [batch] = [i for i, rows in enumerate(machine.rows) if number in rows]
        # Two lengths wait, the document's; in flight are two batches more.
        assert batch - before <= 2
    await document
    await machine.batcher.close(1.0)


@pytest.mark.parametrize(
    ("shapes", "cost"),
    [(CPU, cost_of_tokens), (GPU, cost_of_calls)],
    ids=["cpu", "gpu"],
)
@in_virtual_time
async def test_a_lone_question_waits_for_nobody(
    shapes: dict[str, object], cost: Cost
) -> None:
    """It takes its way, its batch of one and its way back."""
    loop = asyncio.get_running_loop()
    machine = Machine(make_contract(shapes, cost), cost)
    await machine.batcher.start()
    for length in (30, 160, 384):
        start_s = loop.time()
        await machine.ask(length)
        padded = machine.contract.bucket_for(length)
        expected_s = 2 * WIRE_S + cost(1, padded)
        assert loop.time() - start_s == pytest.approx(expected_s)
    await machine.batcher.close(1.0)
