"""The batcher on a loop whose time is virtual, before an engine that obeys the test."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import math
import selectors
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    ContractError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    EngineError,
    EngineOutputError,
    EngineUnavailableError,
    Int8qaError,
    QueueFullError,
    ShuttingDownError,
)
from int8qa.gateway.batcher import Batcher
from int8qa.gateway.submission import WindowResult
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.reader.windows import Window
from int8qa.settings import BatcherSettings
from tests.records import make_model_record

PAD = 7
MAX_WAIT_S = 0.004
CONTRACT = Contract(
    build_id="test",
    checkpoint="test",
    tokenizer_sha256="0" * 64,
    pad_token_id=PAD,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    max_window_tokens=384,
    sequence_buckets=(32, 64, 128, 384),
    batch_sizes=(1, 2, 4, 8),
    max_batch_tokens=256,
    models={},
)
COSTED = CONTRACT.model_copy(
    update={
        "models": {Precision.INT8: make_model_record()},
        "batch_ms": {
            Precision.INT8: {
                s: tuple(5 + 0.01 * b * s for b in CONTRACT.list_batch_sizes(s))
                for s in CONTRACT.sequence_buckets
            }
        },
    }
)
"""The same before an engine whose time goes to calls: lengths share batches."""
LARGEST_BATCH = {32: 8, 64: 4, 128: 2, 384: 1}
"""B by S under ``max_batch_tokens``; 384 alone is above it and yet legal."""


# Virtual time


class JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for the next timer, moves the clock to it."""

    now_s = 0.0
    turns = 0
    turns_at_this_time = 0

    def select(self, timeout=None):
        self.turns += 1
        self.turns_at_this_time = 0 if timeout else self.turns_at_this_time + 1
        if timeout is None:
            raise AssertionError("every task waits for ever")
        if self.turns_at_this_time > 20_000:
            raise AssertionError("the loop spins without time passing")
        self.now_s += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self):
        return self.jumping.now_s

    @property
    def turns(self):
        return self.jumping.turns


class CoarseTimerLoop(VirtualTimeLoop):
    """Counts delays in milliseconds, as uvloop does, and so may ring early."""

    def call_later(self, delay, callback, *args, context=None):
        return super().call_later(round(delay, 3), callback, *args, context=context)


def in_virtual_time(test, loop_class=VirtualTimeLoop):
    """Make a plain test of a coroutine; whatever the loop complains of fails it."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        loop = loop_class()
        complaints = []
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        try:
            loop.run_until_complete(test(*args, **kwargs))
            if left := asyncio.all_tasks(loop):
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(left))
        finally:
            loop.close()
        del left
        gc.collect(0)  # an exception nobody retrieved complains when collected
        assert complaints == []

    return run


async def let_run():
    """Give every task its turns; no time passes."""
    for _ in range(12):
        await asyncio.sleep(0)


# Engine, windows, observer


def make_window(ident: int, length: int) -> Window:
    """A window that names itself: each token id tells the window and the position."""
    ids = ident * 512 + np.arange(length, dtype=np.int32)
    return Window(
        index=0,
        input_ids=ids,
        token_type_ids=ids % 2,
        context_start=0,
        context_end=0,
        offsets=np.zeros((0, 2), dtype=np.int32),
        word_ids=np.zeros(0, dtype=np.int32),
    )


def echo(batch: PaddedBatch) -> BatchLogits:
    start = batch.input_ids.astype(np.float32)
    return BatchLogits(start=start, end=-start)


def is_echo(window: Window, result: WindowResult) -> bool:
    return np.array_equal(result.start, window.input_ids) and np.array_equal(
        result.end, -window.input_ids
    )


def mark_as_seen(task: asyncio.Task) -> None:
    """Spare the loop its complaint about errors a test does not look at."""
    if not task.cancelled():
        task.exception()


@dataclass(eq=False)
class Call:
    batch: PaddedBatch
    deadline: float | None
    time_s: float
    reply: asyncio.Future

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch.input_ids.shape

    @property
    def idents(self) -> list[int]:
        return [int(row[0]) // 512 for row in self.batch.input_ids]

    def answer(self, logits: BatchLogits | None = None) -> None:
        self.reply.set_result(echo(self.batch) if logits is None else logits)


@dataclass
class Engine:
    """Answers when told to, and notes whatever it should never have been asked."""

    max_in_flight: int
    mixes: bool = False
    """Whether lengths may share a batch."""
    calls: list[Call] = field(default_factory=list)
    open: list[Call] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    async def infer(self, precision, batch, deadline) -> BatchLogits:
        loop = asyncio.get_running_loop()
        call = Call(batch, deadline, loop.time(), loop.create_future())
        self.calls.append(call)
        self.open.append(call)
        self._check(precision, call)
        try:
            return await call.reply
        finally:
            self.open.remove(call)

    def _check(self, precision, call: Call) -> None:
        batch, (b, s) = call.batch, call.shape
        mask = batch.input_ids != PAD
        lengths = mask.sum(axis=1)
        padded = [CONTRACT.bucket_for(int(n)) for n in lengths]
        arrays = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
        checks = {
            "precision": precision is Precision.INT8,
            "type": all(array.dtype == np.int32 for array in arrays),
            "shape": s in LARGEST_BATCH and b in CONTRACT.batch_sizes,
            "budget": b <= LARGEST_BATCH.get(s, 0),
            "mask": np.array_equal(batch.attention_mask, mask),
            "types": np.array_equal(
                batch.token_type_ids, np.where(mask, batch.input_ids % 2, 0)
            ),
            "dummy row": bool(lengths.all()),
            "longest": max(padded) == s,
            "bucket": self.mixes or min(padded) == s,
            "in flight": len(self.open) <= self.max_in_flight,
            "beside": batch.beside == len(self.open) - 1,
            "sent twice": self.seen.isdisjoint(call.idents),
        }
        self.seen.update(call.idents)
        self.violations += [what for what, holds in checks.items() if not holds]


class Observer:
    def __init__(self):
        self.queued = 0
        self.batches = []

    def on_queue(self, precision, windows):
        self.queued = windows

    def on_batch(self, precision, windows, tokens, padding_tokens):
        self.batches.append((windows, padding_tokens / tokens))


class Rig:
    """A started batcher, its engine and the requests made of it."""

    def __init__(
        self,
        *,
        max_in_flight=2,
        max_queue_tokens=1024,
        max_wait_s=MAX_WAIT_S,
        contract=CONTRACT,
    ):
        self.engine = Engine(max_in_flight, mixes=bool(contract.batch_ms))
        self.observer = Observer()
        self.infer: Callable[..., Awaitable[BatchLogits]] = self.engine.infer
        self.idents = itertools.count(1)
        self.batcher = Batcher(
            Precision.INT8,
            contract,
            BatcherSettings(
                max_wait_s=max_wait_s,
                max_in_flight=max_in_flight,
                max_queue_tokens=max_queue_tokens,
            ),
            lambda *args: self.infer(*args),  # noqa: PLW0108 - tests replace it
            observer=self.observer,
            clock=asyncio.get_running_loop().time,
            draw=lambda: 0.5,
        )

    async def __aenter__(self):
        await self.batcher.start()
        return self

    async def __aexit__(self, *failed) -> None:
        if failed[0] is None:
            await self.batcher.close(0)
            self.check()

    def check(self) -> None:
        assert self.engine.violations == []
        assert self.batcher.queued_windows == 0
        assert self.batcher.queued_tokens == 0
        assert self.observer.queued == 0

    def windows(self, *lengths: int) -> list[Window]:
        return [make_window(next(self.idents), length) for length in lengths]

    def submit(self, *lengths: int, deadline: float | None = None) -> asyncio.Task:
        windows = self.windows(*lengths)
        task = asyncio.create_task(self.batcher.submit(windows, deadline=deadline))
        task.add_done_callback(mark_as_seen)
        return task

    async def occupy(self, batches: int = 1) -> None:
        """Put lone windows in flight, so that the engine is busy."""
        for _ in range(batches):
            self.submit(300)
            await asyncio.sleep(MAX_WAIT_S)
            await let_run()
        assert len(self.engine.open) == batches

    async def answer_all(self) -> None:
        while self.engine.open:
            for call in tuple(self.engine.open):
                call.answer()
            await let_run()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [call.shape for call in self.engine.calls]


# The ten lines of the batcher's contract


@in_virtual_time
async def test_line_1_no_polling_no_sleeps():
    """Minutes pass in a few loop turns: idle, waiting for company, and blocked."""
    loop = asyncio.get_running_loop()
    async with Rig() as rig:
        await let_run()
        for batches_before in (0, 1, 2):
            if batches_before:
                rig.submit(20)
            before = loop.turns
            await asyncio.sleep(60)
            assert loop.turns - before < 15, batches_before
        assert rig.shapes == [(1, 32), (1, 32)]


@in_virtual_time
async def test_line_2_deadline_is_oldest_arrival_plus_wait():
    """Company that comes later does not postpone the dispatch, nor does another bucket."""
    async with Rig() as rig:
        await rig.occupy()
        first = asyncio.get_running_loop().time()
        rig.submit(20)
        for _ in range(3):
            await asyncio.sleep(MAX_WAIT_S / 4 + 1e-5)
            rig.submit(20)
            rig.submit(60)
        await asyncio.sleep(1)
        assert rig.engine.calls[1].time_s == pytest.approx(first + MAX_WAIT_S, abs=1e-9)
        assert rig.engine.calls[1].shape == (4, 32)


@in_virtual_time
async def test_line_2_oldest_arrival_counts_even_after_its_turn():
    """Windows left over by a partial batch go on counting from their own arrival."""
    async with Rig(max_in_flight=3) as rig:
        await rig.occupy()
        first = asyncio.get_running_loop().time()
        rig.submit(*[20] * 9)  # eight fill a batch at once, one stays
        await asyncio.sleep(MAX_WAIT_S / 2)
        rig.submit(20)
        await asyncio.sleep(1)
        assert rig.shapes[1:] == [(8, 32), (2, 32)]
        assert rig.engine.calls[2].time_s == pytest.approx(first + MAX_WAIT_S, abs=1e-9)


@in_virtual_time
async def test_line_2_engine_knows_what_is_beside_a_batch():
    """A batch that leaves while nothing is in the engine may have all of it."""
    async with Rig() as rig:
        for _ in range(2):
            await rig.occupy()
            rig.submit(20)
            await asyncio.sleep(1)
            await rig.answer_all()
        assert [call.batch.beside for call in rig.engine.calls] == [0, 1] * 2


@in_virtual_time
async def test_line_2_deadline_is_kept_at_any_reading_of_the_clock():
    """Rounding of arrival + wait neither loses the deadline nor spins before it."""
    async with Rig(max_wait_s=0.0047) as rig:
        for _ in range(100):
            await rig.occupy()
            task = rig.submit(20)
            await asyncio.sleep(0.01)
            await rig.answer_all()
            [result] = await task
            assert result.queue_s == pytest.approx(0.0047, abs=1e-9)


@in_virtual_time
async def test_line_3_budget_is_padded_tokens_of_similar_lengths():
    """Each bucket goes by itself, in the largest legal batches under the budget."""
    async with Rig(max_in_flight=1, max_queue_tokens=10_000) as rig:
        await rig.occupy()
        rig.submit(*[30] * 13, *[33] * 7, *[100] * 3, 384, 129)
        await let_run()
        await rig.answer_all()
        largest = {
            s: [b for b, size in rig.shapes[1:] if size == s] for s in LARGEST_BATCH
        }
        assert largest == {32: [8, 4, 1], 64: [4, 2, 1], 128: [2, 1], 384: [1, 1]}


@in_virtual_time
async def test_line_3_padding_ratio_is_reported():
    """The observer hears how much of a batch is padding."""
    async with Rig() as rig:
        rig.submit(24, 16)
        await let_run()
        assert rig.observer.batches == [(2, pytest.approx(1 - 40 / 64))]


@in_virtual_time
async def test_line_4_admission_is_bounded_and_refuses_at_once():
    """A full queue refuses before anything is awaited; what leaves it makes room."""
    async with Rig(max_in_flight=1, max_queue_tokens=512) as rig:
        await rig.occupy()
        queued = rig.submit(*[20] * 15)
        await let_run()
        refused = rig.batcher.submit(rig.windows(20, 20))
        with pytest.raises(QueueFullError):
            refused.send(None)  # one step: it must not reach an await
        assert rig.batcher.queued_tokens == 480
        rig.submit(20)
        await let_run()
        assert (rig.batcher.queued_tokens, rig.batcher.queued_windows) == (512, 16)
        assert rig.observer.queued == 16
        queued.cancel()
        await let_run()
        assert rig.batcher.queued_tokens == 32
        rig.submit(20)
        await let_run()
        assert rig.batcher.queued_tokens == 64


@in_virtual_time
async def test_line_4_request_larger_than_the_queue_enters_an_empty_one():
    """A long document is legal whatever the bound, but not behind others."""
    async with Rig(max_in_flight=1, max_queue_tokens=512) as rig:
        await rig.occupy()
        document = rig.submit(*[384] * 500)
        await let_run()
        assert rig.batcher.queued_windows == 500
        with pytest.raises(QueueFullError):
            await rig.submit(20)
        await rig.answer_all()
        assert len(await document) == 500


@in_virtual_time
async def test_line_4_retry_after_reckons_with_what_batches_cost():
    """Not with their tokens, where an engine's time goes to calls."""
    async with Rig(max_queue_tokens=512, contract=COSTED) as rig:
        await measure_pace(rig)  # 8.84 ms at the build take a second here
        await rig.occupy(2)
        rig.submit(*[20] * 16)
        await let_run()
        waiting_ms = 16 * (5 + 0.01 * 8 * 32) / 8
        assert rig.batcher.drain_s == pytest.approx(waiting_ms / 8.84, abs=0.01)


@in_virtual_time
async def test_line_4_retry_after_follows_the_measured_drain_rate():
    """Padded tokens per second of engine time, whether calls overlap or not."""
    async with Rig(max_queue_tokens=512) as rig:
        assert rig.batcher.drain_s == 0
        await rig.occupy(2)
        rig.submit(*[20] * 16)
        await let_run()
        assert rig.batcher.drain_s == 1.0  # nothing measured yet
        await asyncio.sleep(3 - asyncio.get_running_loop().time())
        rig.engine.open[0].answer()  # 384 tokens in 3 s
        await let_run()
        await asyncio.sleep(1)
        rig.engine.open[0].answer()  # 384 tokens in 1 s more, though 4 s in flight
        await let_run()
        assert rig.batcher.queued_tokens == 0
        rig.submit(*[20] * 16)
        await let_run()
        with pytest.raises(QueueFullError) as refused:
            await rig.submit(20)
        drain_s = 512 / ((384 + 384) / (3 + 1))
        assert rig.batcher.drain_s == pytest.approx(drain_s)
        assert refused.value.retry_after_s == pytest.approx(drain_s * 1.25)
        await asyncio.sleep(60)  # the batches in flight should take 1.33 s each
        assert rig.batcher.drain_s == pytest.approx(drain_s + 60 - drain_s / 2)


async def measure_pace(rig: Rig) -> None:
    """Let the engine take a second for 384 tokens, and fall idle."""
    task = rig.submit(300)
    await asyncio.sleep(1)
    rig.engine.open[0].answer()
    await task
    await let_run()


@in_virtual_time
async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once():
    """Who would wait in vain is told how long it takes, and takes nobody's place."""
    async with Rig(max_in_flight=1, max_queue_tokens=10_000) as rig:
        now = asyncio.get_running_loop().time
        await measure_pace(rig)
        await rig.occupy()
        rig.submit(384)
        await let_run()
        hopeless = rig.batcher.submit(rig.windows(384), deadline=now() + 1.9)
        with pytest.raises(DeadlineUnreachableError, match="384 padded") as refused:
            hopeless.send(None)  # one step: it must not reach an await
        assert refused.value.retry_after_s > 0
        assert rig.batcher.queued_tokens == 384
        rig.submit(384, deadline=now() + 2.1)
        rig.submit(384)  # without a deadline there is nothing to miss
        await let_run()
        assert rig.batcher.queued_tokens == 3 * 384


@in_virtual_time
async def test_a_short_request_is_not_refused_for_a_long_one_ahead():
    """Requests take turns: only what goes before its own windows counts."""
    async with Rig(max_in_flight=1, max_queue_tokens=100_000) as rig:
        now = asyncio.get_running_loop().time
        await measure_pace(rig)
        await rig.occupy()
        rig.submit(*[384] * 100)
        await let_run()
        rig.submit(384, deadline=now() + 2.1)
        await let_run()
        assert rig.batcher.queued_tokens == 101 * 384


@in_virtual_time
async def test_a_request_alone_is_tried_whatever_the_pace_was():
    """A bad minute must not refuse for ever what would be answered now."""
    async with Rig(max_in_flight=1) as rig:
        now = asyncio.get_running_loop().time
        await measure_pace(rig)
        task = rig.submit(384, deadline=now() + 0.5)
        await let_run()
        rig.engine.open[0].answer()
        assert len(await task) == 1


@in_virtual_time
async def test_line_5_a_batch_is_cancelled_when_its_last_caller_leaves():
    """Not before; then its place is free at once, and the engine counts as busy on."""
    async with Rig(max_in_flight=1) as rig:
        await measure_pace(rig)
        first, second, waits = rig.submit(300), rig.submit(20), rig.submit(20)
        await let_run()
        document = rig.engine.open[0]
        first.cancel()
        await let_run()
        assert document.reply.cancelled()
        assert rig.engine.open[0].shape == (2, 32)
        assert rig.batcher.in_flight == 2  # what the engine began, it ends
        second.cancel()
        await let_run()
        assert not rig.engine.open[0].reply.done()
        rig.engine.open[0].answer()
        assert len(await waits) == 1
        await asyncio.sleep(1.1)
        assert rig.batcher.in_flight == 0


@in_virtual_time
async def test_line_5_a_batch_is_cancelled_at_its_last_deadline():
    """An engine that hangs keeps no place after everybody's deadline."""
    async with Rig(max_in_flight=1) as rig:
        rig.submit(20, deadline=1.0)
        rig.submit(20, deadline=2.0)
        await asyncio.sleep(1.5)
        call = rig.engine.open[0]
        assert not call.reply.done()
        await asyncio.sleep(1)
        assert call.reply.cancelled()


@pytest.mark.parametrize("turns", range(6))
@in_virtual_time
async def test_line_5_cancelled_callers_are_skipped_before_dispatch(turns):
    """A caller cancelled in the very turn that frees the engine takes no row."""
    async with Rig(max_in_flight=1) as rig:
        await rig.occupy()
        tasks = [rig.submit(20, 20), *[rig.submit(20) for _ in range(4)]]
        await let_run()
        rig.engine.open[0].answer()
        for _ in range(turns):
            await asyncio.sleep(0)
        all_queued = rig.batcher.queued_windows == 6
        for task in (tasks[0], tasks[2]):
            task.cancel()
        await let_run()
        # Windows 2 and 3 (both of the first request) and 5 are gone.
        assert rig.engine.calls[1].idents == ([4, 6] if all_queued else [2, 4, 5, 6])
        await rig.answer_all()
        assert rig.engine.calls[2].idents == [7]


@pytest.mark.parametrize("turns", range(8))
@in_virtual_time
async def test_line_5_cancellation_in_any_turn_of_the_loop(turns):
    """Whenever the cancellation lands, everybody else is answered."""
    async with Rig(max_in_flight=1) as rig:
        tasks = [rig.submit(20, 20, 60), rig.submit(20), rig.submit(20)]
        for _ in range(turns):
            for call in rig.engine.open:
                if not call.reply.done():
                    call.answer()
            await asyncio.sleep(0)
        tasks[1].cancel()
        await let_run()
        await rig.answer_all()
        assert len(await tasks[0]) == 3
        assert len(await tasks[2]) == 1
        assert rig.batcher.healthy


@in_virtual_time
async def test_line_5_futures_are_settled_only_if_not_done():
    """Answers and failures for callers that left disturb nobody."""
    async with Rig() as rig:
        gone, stays = rig.submit(20), rig.submit(20)
        await let_run()
        gone.cancel()
        await let_run()
        rig.engine.open[0].answer()
        assert len(await stays) == 1
        gone, fails = rig.submit(20), rig.submit(20)
        await let_run()
        gone.cancel()
        await let_run()
        rig.engine.open[0].reply.set_exception(EngineUnavailableError("gone"))
        await let_run()
        assert isinstance(fails.exception(), EngineUnavailableError)
        assert gone.cancelled()
        assert rig.batcher.healthy


@pytest.mark.parametrize("turns", range(6))
@in_virtual_time
async def test_line_5_an_error_for_a_caller_who_just_left_is_no_complaint(turns):
    """The loop has no unseen exception to report when failure and cancellation meet."""
    async with Rig() as rig:
        task = rig.submit(20)
        await let_run()
        rig.engine.open[0].reply.set_exception(EngineUnavailableError("away"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


class ThirdRowTrap(np.ndarray):
    """Logits that fail while the third row is handed out."""

    def __getitem__(self, key):
        if isinstance(key, tuple) and key[0] == 2:
            raise RuntimeError("secret text of a user")
        return super().__getitem__(key)


def raise_now(error: BaseException):
    def infer(*_):
        raise error

    return infer


def raise_later(error: BaseException):
    async def infer(*_):
        await asyncio.sleep(1)
        raise error

    return infer


def answer_with(make_logits: Callable[[PaddedBatch], object]):
    async def infer(_, batch, __):
        return make_logits(batch)

    return infer


UNAVAILABLE = EngineUnavailableError("Triton is away")
LATE = DeadlineExceededError("Triton was late")


@pytest.mark.parametrize(
    ("infer", "expected"),
    [
        (raise_now(UNAVAILABLE), UNAVAILABLE),
        (raise_later(UNAVAILABLE), UNAVAILABLE),
        (raise_later(LATE), LATE),
        (raise_now(TypeError("secret text")), EngineUnavailableError),
        (raise_later(OSError("secret text")), EngineUnavailableError),
        (raise_later(asyncio.CancelledError()), EngineUnavailableError),
        (raise_later(asyncio.TimeoutError()), EngineUnavailableError),
        (answer_with(lambda _: None), EngineOutputError),
        (answer_with(lambda b: BatchLogits(echo(b).start, None)), EngineOutputError),
    ],
    # Names, not addresses: all processes that share the tests must agree on them.
    ids=(
        *("away-now", "away-later", "late", "type", "os", "cancelled", "timeout"),
        *("nothing", "half"),
    ),
)
@in_virtual_time
async def test_line_6_exception_boundary_covers_dispatch(infer, expected):
    """Whatever the engine raises or returns fails that batch alone, as an EngineError."""
    async with Rig() as rig:
        spared = rig.submit(20)
        await let_run()
        rig.infer = infer
        tasks = [rig.submit(60), rig.submit(60)]
        for task in tasks:
            with pytest.raises(Int8qaError) as failed:
                await task
            if isinstance(expected, Int8qaError):
                assert failed.value is expected
            else:
                assert type(failed.value) is expected
                assert failed.value.__cause__ is not None
                assert "secret" not in str(failed.value)
        rig.infer = rig.engine.infer
        after = rig.submit(60)
        await asyncio.sleep(1)
        await rig.answer_all()
        assert len(await spared) == len(await after) == 1


@in_virtual_time
async def test_line_6_exception_boundary_covers_assembling():
    """A malformed window fails its batch before the engine hears of it."""
    async with Rig(max_in_flight=1) as rig:
        await rig.occupy()
        broken = make_window(99, 20)
        object.__setattr__(broken, "token_type_ids", np.zeros(21, dtype=np.int32))
        tasks = [rig.submit(20), asyncio.create_task(rig.batcher.submit([broken]))]
        other = rig.submit(60)
        await let_run()
        await rig.answer_all()
        for task in tasks:
            with pytest.raises(EngineUnavailableError) as failed:
                await task
            assert isinstance(failed.value.__cause__, ValueError)
        assert rig.shapes == [(1, 384), (1, 64)]
        assert len(await other) == 1


@in_virtual_time
async def test_line_6_exception_boundary_covers_fan_out():
    """Rows handed out before the exception stand, the others fail, the task lives on."""
    async with Rig(max_in_flight=1) as rig:
        await rig.occupy()
        tasks = [rig.submit(20) for _ in range(4)]
        await let_run()
        rig.engine.open[0].answer()
        await let_run()
        logits = echo(rig.engine.open[0].batch)
        rig.engine.open[0].answer(
            BatchLogits(logits.start.view(ThirdRowTrap), logits.end)
        )
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in done] == [
            list,
            list,
            EngineOutputError,
            EngineOutputError,
        ]
        assert "secret" not in str(done[2])
        after = rig.submit(20)
        await let_run()
        await rig.answer_all()
        assert len(await after) == 1


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("width", [31, 32, 33])
@pytest.mark.parametrize("which", ["start", "end"])
@in_virtual_time
async def test_line_7_number_and_width_of_results_are_checked(rows, width, which):
    """Logits of any other shape than the batch's are nobody's answer."""
    async with Rig() as rig:
        tasks = [rig.submit(20), rig.submit(20)]
        await let_run()
        good = np.zeros((2, 32), dtype=np.float32)
        logits = {"start": good, "end": good}
        logits[which] = np.zeros((rows, width), dtype=np.float32)
        rig.engine.open[0].answer(BatchLogits(**logits))
        for task in tasks:
            with pytest.raises(EngineOutputError, match="shapes"):
                await task


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["start", "end"])
@in_virtual_time
async def test_line_7_non_finite_logits_fail_their_own_request(value, which):
    """One window that overflows fails its request; its neighbours' logits are sound."""
    async with Rig() as rig:
        tasks = [rig.submit(20), rig.submit(20), rig.submit(25), rig.submit(20)]
        await let_run()
        logits = echo(rig.engine.open[0].batch)
        getattr(logits, which)[2, 24] = value
        getattr(logits, which)[3, 20:] = value  # padding is nobody's answer
        rig.engine.open[0].answer(logits)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(o) for o in outcomes] == [list, list, EngineOutputError, list]


@pytest.mark.parametrize("limit", [1, 2, 5])
@in_virtual_time
async def test_line_8_at_most_n_batches_in_flight(limit):
    """The next batch is sent while the engine works, up to the limit and no further."""
    async with Rig(max_in_flight=limit, max_queue_tokens=10_000) as rig:
        rig.submit(*[100] * 40)
        await let_run()
        assert rig.shapes == [(2, 128)] * limit
        rig.engine.open[-1].answer()
        await let_run()
        assert rig.shapes == [(2, 128)] * (limit + 1)
        assert len(rig.engine.open) == limit
        await asyncio.sleep(100)
        assert len(rig.engine.open) == limit


@pytest.mark.parametrize("death", ["cancelled", "raised"])
@in_virtual_time
async def test_line_9_if_the_task_dies_all_waiters_fail(death, caplog):
    """Queued and in flight alike, at once; afterwards nobody is let in."""
    async with Rig(max_in_flight=1) as rig:
        assert rig.batcher.healthy
        in_flight = rig.submit(20)
        await let_run()
        queued = rig.submit(20, 60)
        await let_run()
        if death == "cancelled":
            rig.batcher._dispatcher.cancel()
        else:
            rig.batcher._take_batch = raise_now(RuntimeError("a defect"))
            rig.submit(20)
        for waiter in (in_flight, queued):
            with pytest.raises(EngineUnavailableError) as failed:
                await waiter
        if death == "raised":
            assert isinstance(failed.value.__cause__, RuntimeError)
        assert [record.levelname for record in caplog.records] == ["CRITICAL"]
        assert not rig.batcher.healthy
        with pytest.raises(EngineUnavailableError):
            await rig.submit(20)
        await let_run()
        assert rig.engine.open == []
        await rig.batcher.close(1)


@in_virtual_time
async def test_line_9_not_healthy_before_start():
    """A batcher that was never started says so instead of queueing for ever."""
    rig = Rig()
    assert not rig.batcher.healthy
    with pytest.raises(EngineUnavailableError):
        await rig.submit(20)
    await rig.batcher.close(1)
    rig.check()


@in_virtual_time
async def test_line_10_closing_drains():
    """What was accepted is answered without further waiting, what is new refused."""
    loop = asyncio.get_running_loop()
    async with Rig() as rig:
        await rig.occupy()
        waiting = rig.submit(20)
        await let_run()
        start = loop.time()
        closing = asyncio.create_task(rig.batcher.close(10))
        await let_run()
        assert rig.shapes == [(1, 384), (1, 32)]  # no company will come
        with pytest.raises(ShuttingDownError):
            rig.batcher.submit(rig.windows(20)).send(None)
        await asyncio.sleep(1)
        assert not closing.done()
        await rig.answer_all()
        await closing
        assert len(await waiting) == 1
        assert loop.time() - start == pytest.approx(1)
        assert not rig.batcher.healthy


@in_virtual_time
async def test_line_10_closing_keeps_its_limit(caplog):
    """An engine that never answers delays nobody: all that is left fails in time."""
    loop = asyncio.get_running_loop()
    async with Rig(max_in_flight=1) as rig:
        tasks = [rig.submit(20), rig.submit(60, 20)]
        await let_run()
        start = loop.time()
        await rig.batcher.close(3)
        assert loop.time() - start == pytest.approx(3)
        for task in tasks:
            with pytest.raises(ShuttingDownError):
                await task
        assert rig.engine.open == []
        assert caplog.records == []
        await rig.batcher.close(3)
        assert loop.time() - start == pytest.approx(3)


# The adaptive wait


@in_virtual_time
async def test_idle_engine_gets_a_lone_window_at_once():
    """No fixed wait when nothing is in flight."""
    async with Rig() as rig:
        await asyncio.sleep(5)
        task = rig.submit(20)
        await let_run()
        assert [call.time_s for call in rig.engine.calls] == [5.0]
        await asyncio.sleep(0.25)
        rig.engine.open[0].answer()
        [result] = await task
        assert (result.queue_s, result.inference_s) == (0.0, 0.25)


@in_virtual_time
async def test_busy_engine_gets_a_full_batch_at_once():
    """With room in flight a batch waits for company only until it is full."""
    async with Rig() as rig:
        await rig.occupy()
        rig.submit(*[20] * 7)
        await let_run()
        assert len(rig.engine.calls) == 1
        rig.submit(20)
        await let_run()
        assert rig.shapes == [(1, 384), (8, 32)]


@in_virtual_time
async def test_waiting_for_company_ends_when_the_engine_falls_idle():
    """The last answer releases whatever waits, before its wait is over."""
    async with Rig() as rig:
        await rig.occupy()
        task = rig.submit(20)
        await asyncio.sleep(MAX_WAIT_S / 4)
        assert len(rig.engine.calls) == 1
        rig.engine.open[0].answer()
        await asyncio.sleep(0.5)
        rig.engine.open[0].answer()
        [result] = await task
        assert result.queue_s == pytest.approx(MAX_WAIT_S / 4)
        assert result.inference_s == pytest.approx(0.5)


@in_virtual_time
async def test_submits_of_one_turn_share_a_batch():
    """Requests that arrive together are not sent one by one to an idle engine."""
    async with Rig() as rig:
        for _ in range(4):
            rig.submit(20)
        await let_run()
        assert rig.shapes == [(4, 32)]


def test_a_coarse_timer_is_believed():
    """A timer that rings before the clock is there sends the batch and does not spin."""

    async def scenario():
        async with Rig(max_wait_s=0.0044) as rig:
            await rig.occupy()
            rig.submit(20)
            await asyncio.sleep(0.1)
            assert rig.shapes == [(1, 384), (1, 32)]

    in_virtual_time(scenario, CoarseTimerLoop)()


# Fairness


@in_virtual_time
async def test_a_long_document_does_not_block_later_requests_of_its_bucket():
    """Requests take turns: latecomers ride in the very next batch."""
    async with Rig(max_in_flight=1, max_queue_tokens=100_000) as rig:
        document = rig.submit(*[30] * 200)
        await let_run()
        late = [rig.submit(30) for _ in range(3)]
        await let_run()
        rig.engine.open[0].answer()
        await let_run()
        assert sum(ident > 200 for ident in rig.engine.open[0].idents) == 3
        rig.engine.open[0].answer()
        await asyncio.gather(*late)
        assert not document.done()


@in_virtual_time
async def test_a_long_document_does_not_block_another_bucket():
    """A request of another length goes after one batch of the document, not after all."""
    async with Rig(max_in_flight=1, max_queue_tokens=100_000) as rig:
        rig.submit(*[30] * 200)
        await let_run()
        rig.submit(100)
        await let_run()
        for _ in range(2):
            rig.engine.open[0].answer()
            await let_run()
        assert (1, 128) in rig.shapes[1:3]


@in_virtual_time
async def test_the_bucket_whose_head_stands_longest_in_line_goes_first():
    """Neither the shortest length nor the fullest bucket has a privilege."""
    async with Rig(max_in_flight=1) as rig:
        await rig.occupy()
        for lengths in ((100,), (384,), (30,) * 8, (60,)):
            rig.submit(*lengths)
        await let_run()
        await rig.answer_all()
        assert [s for _, s in rig.shapes[1:]] == [128, 384, 32, 64]


@in_virtual_time
async def test_a_stream_of_latecomers_does_not_starve_a_document():
    """Nor a lone window of a rare length: each turn comes after those before it."""
    async with Rig(max_in_flight=1, max_queue_tokens=100_000) as rig:
        await rig.occupy()
        document, rare = rig.submit(*[30] * 5), rig.submit(100)
        for _ in range(20):
            for _ in range(9):
                rig.submit(30)
            await let_run()
            rig.engine.open[0].answer()
        await let_run()
        assert document.done()
        assert rare.done()


# Deadlines, errors and results of one request


@in_virtual_time
async def test_a_deadline_fails_on_time_and_drops_what_waits():
    """Queued or in flight, at the deadline the request ends; the engine gets no more."""
    loop = asyncio.get_running_loop()
    async with Rig(max_in_flight=1) as rig:
        task = rig.submit(*[20] * 12, deadline=2.0)
        await asyncio.sleep(1)
        with pytest.raises(DeadlineExceededError):
            await task
        assert loop.time() == pytest.approx(2.0)
        assert rig.batcher.queued_windows == 0
        await rig.answer_all()
        assert rig.shapes == [(8, 32)]


@in_virtual_time
async def test_a_late_timer_does_not_send_what_is_expired(monkeypatch):
    """Entries past their deadline fail before dispatch even if no timer rang yet."""
    async with Rig(max_in_flight=1) as rig:
        await rig.occupy()
        now = asyncio.get_running_loop().time()
        timeouts_s = [9, *[1] * 11, 9, *[1] * 3, 9]
        tasks = [rig.submit(20, deadline=now + timeout) for timeout in timeouts_s]
        await let_run()
        # The loop was blocked: the clock is past the deadline, no timer has rung.
        monkeypatch.setattr(rig.batcher, "_clock", lambda: now + 2)
        rig.engine.open[0].answer()
        await let_run()
        await rig.answer_all()
        for task, timeout in zip(tasks, timeouts_s, strict=True):
            assert (task.exception() is None) == (timeout == 9)
        assert [call.idents for call in rig.engine.calls[1:]] == [[2, 14], [18]]


@in_virtual_time
async def test_an_answered_request_leaves_no_timer_behind():
    """A deadline that was met and a wait that was cut short are forgotten."""
    loop = asyncio.get_running_loop()
    async with Rig() as rig:
        await rig.occupy()
        task = rig.submit(20, deadline=60.0)
        await let_run()
        await rig.answer_all()
        await task
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []


@in_virtual_time
async def test_a_deadline_already_past_sends_nothing():
    """The engine is not asked for what nobody waits for."""
    async with Rig() as rig:
        await asyncio.sleep(1)
        for deadline in (0.0, 1.0):
            with pytest.raises(DeadlineExceededError):
                await rig.submit(20, deadline=deadline)
        assert rig.engine.calls == []


@pytest.mark.parametrize(
    ("deadlines", "expected"), [((3.0, 8.0), 8.0), ((3.0, None), None), ((2.0,), 2.0)]
)
@in_virtual_time
async def test_the_engine_gets_the_latest_deadline_of_a_batch(deadlines, expected):
    """Nobody's answer is cut short by a neighbour's deadline."""
    async with Rig() as rig:
        for deadline in deadlines:
            rig.submit(20, deadline=deadline)
        await let_run()
        assert [call.deadline for call in rig.engine.calls] == [expected]


@in_virtual_time
async def test_the_first_error_ends_a_request_and_drops_its_rest():
    """One request is one submit: all of its windows succeed or the first error counts."""
    async with Rig(max_in_flight=1, max_queue_tokens=10_000) as rig:
        task = rig.submit(*[20] * 30)
        await let_run()
        error = EngineUnavailableError("Triton is away")
        rig.engine.open[0].reply.set_exception(error)
        with pytest.raises(EngineUnavailableError) as failed:
            await task
        assert failed.value is error
        assert rig.batcher.queued_windows == 0
        await let_run()
        assert rig.shapes == [(8, 32)]


@in_virtual_time
async def test_results_come_in_the_order_of_the_windows():
    """Across buckets, batches and the engine's own order, each window gets its logits."""
    async with Rig() as rig:
        lengths = [384, 20, 60, 21, 100, 22, 61, 23, 1, 24, 32, 33]
        windows = rig.windows(*lengths)
        task = asyncio.create_task(rig.batcher.submit(windows))
        await let_run()
        while rig.engine.open:
            rig.engine.open[-1].answer()
            await let_run()
        results = await task
        assert [len(result.start) for result in results] == lengths
        assert all(map(is_echo, windows, results))


@in_virtual_time
async def test_no_windows_need_no_engine():
    """An empty request is answered with an empty list."""
    async with Rig() as rig:
        assert await rig.batcher.submit([]) == []
        assert rig.engine.calls == []


@in_virtual_time
async def test_a_window_longer_than_the_longest_bucket_is_refused():
    """It is refused whole, before any of its windows is queued."""
    async with Rig() as rig:
        with pytest.raises(ContractError):
            await rig.submit(20, 385)
        assert rig.batcher.queued_windows == 0


# Random interleavings


LENGTHS = st.sampled_from([1, 20, 32, 33, 64, 100, 128, 384])
SUBMIT = st.tuples(
    st.just("submit"),
    st.lists(LENGTHS, min_size=1, max_size=12),
    st.none() | st.sampled_from([0.0, 0.001, 0.004, 0.02]),
)
ANSWER = st.tuples(
    st.just("answer"),
    st.integers(0, 7),
    st.sampled_from(["ok"] * 5 + ["error", "unknown", "cancelled", "nan", "rows"]),
)
STEPS = st.lists(
    SUBMIT
    | ANSWER
    | st.tuples(st.just("cancel"), st.integers(0, 30))
    | st.tuples(st.just("pass"), st.sampled_from([0.0005, 0.003, 0.004, 0.05]))
    | st.tuples(st.just("turns"), st.integers(0, 4)),
    max_size=40,
)


@dataclass(eq=False)
class Asked:
    """One submit of the random test, and what is known of it."""

    windows: list[Window]
    arrival: float
    deadline: float
    queue_was_empty: bool = False
    ended: float | None = None
    task: asyncio.Task | None = None

    @property
    def idents(self) -> set[int]:
        return {int(window.input_ids[0]) // 512 for window in self.windows}


class Scenario(Rig):
    """Plays random steps and remembers what must follow from them."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.loop = asyncio.get_running_loop()
        self.asked: list[Asked] = []
        self.answered: set[int] = set()
        self.failed: set[int] = set()
        self.cancelled: set[asyncio.Task] = set()
        self.closed = False

    def ask(self, lengths: Iterable[int], timeout_s: float | None) -> None:
        now = self.loop.time()
        deadline = None if timeout_s is None else now + timeout_s
        until = math.inf if deadline is None else deadline
        asked = Asked(self.windows(*lengths), now, until)

        async def submit() -> list[WindowResult]:
            asked.queue_was_empty = not self.batcher.queued_windows
            try:
                return await self.batcher.submit(asked.windows, deadline=deadline)
            finally:
                asked.ended = self.loop.time()

        asked.task = asyncio.create_task(submit())
        self.asked.append(asked)

    def reply(self, which: int, how: str) -> None:
        calls = [call for call in self.engine.open if not call.reply.done()]
        if not calls:
            return
        call = calls[which % len(calls)]
        idents = call.idents
        logits = echo(call.batch)
        sick = set(idents)
        if how == "ok":
            sick = set()
            call.answer(logits)
        elif how == "nan":
            sick = {idents[-1]}
            logits.end[-1, 0] = np.nan
            call.answer(logits)
        elif how == "rows":
            call.answer(BatchLogits(logits.start[:-1], logits.end[:-1]))
        elif how == "cancelled":
            call.reply.cancel()
        else:
            error = EngineUnavailableError if how == "error" else ZeroDivisionError
            call.reply.set_exception(error("as told"))
        self.failed |= sick
        self.answered |= set(idents) - sick

    async def play(self, step: tuple) -> None:
        match step:
            case ("submit", lengths, timeout_s):
                self.ask(lengths, timeout_s)
            case ("answer", which, how):
                self.reply(which, how)
            case ("cancel", which) if self.asked:
                task = self.asked[which % len(self.asked)].task
                if task.cancel():
                    self.cancelled.add(task)
            case ("pass", seconds):
                await asyncio.sleep(seconds)
                await let_run()
                self.check_nobody_waits_in_vain()
            case ("turns", turns):
                for _ in range(turns):
                    await asyncio.sleep(0)

    def check_nobody_waits_in_vain(self) -> None:
        if self.closed or len(self.engine.open) >= self.engine.max_in_flight:
            return
        waiting = [a for a in self.asked if not a.task.done()]
        due = [a.arrival + MAX_WAIT_S for a in waiting if a.idents - self.engine.seen]
        assert self.engine.open or not due
        assert min(due, default=math.inf) > self.loop.time() - 1e-9

    def check_outcome(self, asked: Asked) -> None:
        task = asked.task
        assert task.done()
        if task.cancelled():
            assert task in self.cancelled
        elif (error := task.exception()) is None:
            results = task.result()
            assert len(results) == len(asked.windows)
            assert all(map(is_echo, asked.windows, results))
            assert asked.idents <= self.answered
            assert asked.ended <= asked.deadline + 1e-9
        elif isinstance(error, DeadlineExceededError):
            assert asked.ended == pytest.approx(asked.deadline, abs=1e-9)
        elif isinstance(error, EngineError):
            assert asked.idents & self.failed
        elif isinstance(error, (QueueFullError, DeadlineUnreachableError)):
            assert not asked.queue_was_empty
            assert asked.idents.isdisjoint(self.engine.seen)
        else:
            assert isinstance(error, ShuttingDownError)
            assert self.closed


@settings(max_examples=300)
@given(
    steps=STEPS,
    ending=st.lists(ANSWER | st.tuples(st.just("pass"), st.just(0.05)), max_size=6),
    max_in_flight=st.integers(1, 3),
    drained=st.booleans(),
    contract=st.sampled_from([CONTRACT, COSTED]),
)
def test_every_submit_settles_once_and_rightly(
    steps, ending, max_in_flight, drained, contract
):
    """Whatever happens in whatever order, each caller gets its own outcome, in time."""

    async def scenario():
        rig = Scenario(
            max_in_flight=max_in_flight, max_queue_tokens=768, contract=contract
        )
        async with rig:
            for step in steps:
                await rig.play(step)
            if drained:
                await let_run()
                while rig.engine.open:
                    rig.reply(0, "ok")
                    await let_run()
                assert rig.batcher.queued_windows == 0
            rig.closed = True
            closing = asyncio.create_task(rig.batcher.close(0.03))
            start = rig.loop.time()
            for step in ending:
                await rig.play(step)
            await closing
            assert rig.batcher._dispatcher.done()
            await let_run()
            assert rig.loop.time() - start < 0.03 + 0.05 * len(ending) + 1e-9
        for asked in rig.asked:
            rig.check_outcome(asked)
        assert not rig.batcher._requests
        assert not rig.batcher.in_flight

    in_virtual_time(scenario)()
