"""One question from text to answers: tokenize, queue, infer, decode.

In: a question with its options and a deadline. Out: answers with the time of each
stage, or one of int8qa's errors. Owns the batchers, the tokenizing threads and the
readiness watch. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    ConfigurationError,
    ContractError,
    DeadlineExceededError,
    EngineUnavailableError,
    InputTooLargeError,
    Int8qaError,
    InvalidInputError,
    QueueFullError,
    ShuttingDownError,
)
from int8qa.gateway.batcher import Batcher, BatchLogits, PaddedBatch
from int8qa.gateway.comparison import ComparisonWindow
from int8qa.gateway.engine import Engine, ReadinessWatch, find_rebuild
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.telemetry import StageSeconds, Telemetry
from int8qa.gateway.waiting import finish_within
from int8qa.reader.spans import Span, decode_spans
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_tokens
from int8qa.settings import Settings

BOTH = "both"
"""The ``precision`` that asks INT8 and FP16 and compares them."""

PAIR = (Precision.INT8, Precision.FP16)

_INLINE_WINDOWS = 4
"""Up to so many windows are decoded on the event loop: a thread costs more."""
_MAX_THREADS = 4
_PENDING_CONTEXTS = 8
"""Longest contexts' worth of characters that may wait for a tokenizing thread."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What a request's ``precision`` means here."""

    label: str
    """As asked, or the default's name; one of a closed set."""
    precisions: tuple[Precision, ...]
    answering: Precision
    """Whose answer is the answer."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question and how it is to be answered."""

    question: str
    context: str
    choice: PrecisionChoice
    top_k: int
    max_answer_tokens: int
    doc_stride: int
    allow_no_answer: bool
    max_window_tokens: int
    max_question_tokens: int | None = None
    align_to_words: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """One precision's answers to a query, best first, never empty."""

    spans: tuple[Span, ...]
    stages: StageSeconds

    @property
    def best(self) -> Span | None:
        """The best answer, None where the null answer won."""
        return None if self.spans[0].is_null else self.spans[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a query."""

    choice: PrecisionChoice
    windows: int
    runs: dict[Precision, Run]
    stages: StageSeconds
    """Sums over the precisions asked; the texts are tokenized once."""
    agreement: bool | None = None
    speedup: float | None = None

    @property
    def run(self) -> Run:
        """The run whose answer is the answer."""
        return self.runs[self.choice.answering]


def resolve_default_precision(settings: Settings, contract: Contract) -> Precision:
    """The precision of requests that name none.

    The setting's, or with ``auto`` the one that the build recommends, or INT8 where it
    recommends none. Asked once, with the contract: a repository that was rebuilt and
    recommends otherwise is followed with the rest of its contract.

    Raises:
        ConfigurationError: it is not in the model repository.
    """
    asked = settings.default_precision
    default = Precision.INT8 if asked == "auto" else Precision(asked)
    if asked == "auto" and contract.recommended is not None:
        default = contract.recommended
    if default not in contract.models:
        stands_for = f", which stands for {default}" if asked == "auto" else ""
        raise ConfigurationError(
            f"INT8QA_DEFAULT_PRECISION is {asked}{stands_for}, but the model "
            f"repository holds {', '.join(contract.models)}; set it to one of these"
        )
    return default


class AnswerPipeline:
    """Answers questions; opened by ``start``, closed by ``close``.

    Raises:
        ConfigurationError: the default precision is not in the model repository.
        ContractError: the tokenizer is not the one the models were built with.
    """

    def __init__(
        self,
        settings: Settings,
        contract: Contract,
        tokenizer: ReaderTokenizer,
        engine: Engine,
        *,
        telemetry: Telemetry,
        comparison: ComparisonWindow,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.default_precision = resolve_default_precision(settings, contract)
        """What a request that names no precision gets."""
        if tokenizer.fingerprint != contract.tokenizer_sha256:
            raise ContractError(
                f"the tokenizer's SHA-256 is {tokenizer.fingerprint}, the contract "
                f"says {contract.tokenizer_sha256}; rebuild with `int8qa build`"
            )
        self.clock = clock
        self.watch = ReadinessWatch(
            engine,
            contract,
            probe_interval_s=settings.triton.probe_interval_s,
            find_rebuild=functools.partial(
                find_rebuild, settings.model_repository, contract
            ),
            on_change=lambda precision, ready: telemetry.set_model_ready(
                precision, ready=ready
            ),
        )
        self._settings = settings
        self._contract = contract
        self._tokenizer = tokenizer
        self._engine = engine
        self._telemetry = telemetry
        self._comparison = comparison
        self._batchers = {
            precision: Batcher(
                precision,
                contract,
                settings.batcher,
                self._infer,
                observer=telemetry,
                clock=clock,
            )
            for precision in contract.models
        }
        self._threads: ThreadPoolExecutor | None = None
        self._pending_chars = 0
        self._turn = itertools.count()
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._drained = False

    async def start(self) -> None:
        """Open the engine, start the batchers and the watch; waits for neither."""
        self._threads = ThreadPoolExecutor(
            min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="reader"
        )
        await self._engine.connect()
        for batcher in self._batchers.values():
            await batcher.start()
        await self.watch.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse what is new, finish what was accepted, fail the rest in time."""
        self._draining = True
        until = self.clock() + timeout_s
        with contextlib.suppress(asyncio.TimeoutError):
            await finish_within(self._idle.wait(), timeout_s)
        await asyncio.gather(
            *(
                batcher.close(max(0.0, until - self.clock()))
                for batcher in self._batchers.values()
            )
        )
        self._drained = True

    async def close(self) -> None:
        """Close whatever ``start`` opened; drains first, if nobody did."""
        if not self._drained:
            await self.drain(self._settings.limits.shutdown_timeout_s)
        await self.watch.close()
        await self._engine.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def draining(self) -> bool:
        """Whether the service is on its way down."""
        return self._draining

    def report_parts(self) -> dict[str, str | None]:
        """Each part of the service: None where ready, else why not."""
        faults = self.watch.faults()
        parts: dict[str, str | None] = {}
        for precision, batcher in self._batchers.items():
            fault = faults.get(precision)
            if fault is None and not batcher.healthy:
                fault = "its batcher does not run; restart the gateway"
            parts[precision.value] = fault
        if self._draining:
            parts["gateway"] = "shutting down"
        return parts

    def list_precisions(self) -> list[str]:
        """Allowed values of a request's ``precision``."""
        allowed = [precision.value for precision in self._contract.models]
        if all(precision in self._contract.models for precision in PAIR):
            allowed.append(BOTH)
        return allowed

    def choose_precision(
        self, name: str | None, *, field: str = "precision"
    ) -> PrecisionChoice:
        """Resolve a request's ``precision``; None is the default.

        Raises:
            InvalidInputError: it is unknown or not loaded; lists what is.
        """
        default = self.default_precision
        if name is None:
            return PrecisionChoice(default.value, (default,), default)
        allowed = self.list_precisions()
        if name not in allowed:
            raise InvalidInputError(
                field, f"unknown {field}; allowed here: {', '.join(allowed)}"
            )
        if name == BOTH:
            answering = default if default in PAIR else Precision.INT8
            return PrecisionChoice(BOTH, PAIR, answering)
        precision = Precision(name)
        return PrecisionChoice(name, (precision,), precision)

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request while it is worked on.

        Raises:
            ShuttingDownError: the service is draining.
        """
        if self._draining:
            raise ShuttingDownError("the service is shutting down; ask again shortly")
        self._inflight += 1
        self._idle.clear()
        self._telemetry.set_inflight(self._inflight)
        try:
            yield
        finally:
            self._inflight -= 1
            self._telemetry.set_inflight(self._inflight)
            if not self._inflight:
                self._idle.set()

    async def answer(self, query: Query, *, deadline: float) -> Outcome:
        """Answer one question.

        Args:
            query: the question.
            deadline: on ``clock``.

        Raises:
            InvalidInputError: a field cannot be answered as given.
            OverloadedError: refused at the door.
            DeadlineExceededError: not answered in time.
            EngineError: Triton is not there or answered nonsense.
        """
        self._check_texts(query)
        for precision in query.choice.precisions:
            self.watch.require(precision)
        started = self.clock()
        windows = await self._split(query, deadline)
        tokenize_s = self.clock() - started

        order = query.choice.precisions
        if len(order) > 1 and next(self._turn) % 2:
            order = order[::-1]
        runs: dict[Precision, Run] = {}
        try:
            for precision in order:
                runs[precision] = await self._run(
                    precision, query, windows, tokenize_s, deadline
                )
        except Int8qaError:
            if len(order) > 1:
                self._comparison.add_error()
                self._telemetry.count_comparison_error()
            raise
        for precision, run in runs.items():
            self._comparison.add_single(precision, run.stages.inference)
        if len(order) == 1:
            run = runs[order[0]]
            return Outcome(query.choice, len(windows), runs, run.stages)
        return self._compare(query.choice, len(windows), runs, tokenize_s)

    def _compare(
        self,
        choice: PrecisionChoice,
        windows: int,
        runs: dict[Precision, Run],
        tokenize_s: float,
    ) -> Outcome:
        int8, fp16 = runs[Precision.INT8], runs[Precision.FP16]
        texts = [run.best.text if run.best else None for run in (int8, fp16)]
        agreed = texts[0] == texts[1]
        int8_s, fp16_s = int8.stages.inference, fp16.stages.inference
        self._comparison.add_pair(int8_s=int8_s, fp16_s=fp16_s, agreed=agreed)
        self._telemetry.observe_pair(int8_s=int8_s, fp16_s=fp16_s, agreed=agreed)
        return Outcome(
            choice,
            windows,
            runs,
            StageSeconds(
                tokenize=tokenize_s,
                queue=int8.stages.queue + fp16.stages.queue,
                inference=int8_s + fp16_s,
                decode=int8.stages.decode + fp16.stages.decode,
            ),
            agreement=agreed,
            speedup=fp16_s / int8_s if int8_s > 0 else None,
        )

    def _check_texts(self, query: Query) -> None:
        limits = self._settings.limits
        for field, text, limit in (
            ("question", query.question, limits.max_question_chars),
            ("context", query.context, limits.max_context_chars),
        ):
            if not text or text.isspace():
                raise InvalidInputError(
                    field, f"{field} is blank; send at least one word of text"
                )
            if len(text) > limit:
                raise InputTooLargeError(
                    field,
                    f"{field} has {len(text)} characters; allowed are {limit}. Send "
                    f"less text, or raise INT8QA_LIMITS__MAX_{field.upper()}_CHARS",
                )

    async def _split(self, query: Query, deadline: float) -> list[Window]:
        chars = len(query.question) + len(query.context)
        limits = self._settings.limits
        allowed = _PENDING_CONTEXTS * limits.max_context_chars
        if self._pending_chars and self._pending_chars + chars > allowed:
            raise QueueFullError(
                f"{self._pending_chars} characters wait to be tokenized; allowed are "
                f"{allowed}. Ask again in a second"
            )
        self._pending_chars += chars
        try:
            return await self._run_in_thread(self._split_now, query, deadline=deadline)
        finally:
            self._pending_chars -= chars

    def _split_now(self, query: Query) -> list[Window]:
        question = self._tokenizer.encode(query.question, field="question")
        context = self._tokenizer.encode(query.context, field="context")
        question_tokens = len(question)
        if query.max_question_tokens is not None:
            question_tokens = min(question_tokens, query.max_question_tokens)
        room = (
            query.max_window_tokens
            - self._tokenizer.template.special_tokens
            - question_tokens
        )
        # Counted before they are made: a stride just below the room asks for a
        # window per token. What makes no sense at all is the reader's to refuse.
        step = room - query.doc_stride
        limit = self._settings.limits.max_windows
        if step > 0 and len(context) > room:
            windows = 1 + -(-(len(context) - room) // step)
            if windows > limit:
                raise InputTooLargeError(
                    "context",
                    f"context needs {windows} windows of {query.max_window_tokens} "
                    f"tokens that overlap by {query.doc_stride}; allowed are {limit}. "
                    f"Send less text, lower doc_stride, or raise "
                    f"INT8QA_LIMITS__MAX_WINDOWS",
                )
        return split_tokens(
            self._tokenizer.template,
            question,
            context,
            max_window_tokens=query.max_window_tokens,
            doc_stride=query.doc_stride,
            max_question_tokens=query.max_question_tokens,
        )

    async def _run(
        self,
        precision: Precision,
        query: Query,
        windows: list[Window],
        tokenize_s: float,
        deadline: float,
    ) -> Run:
        results = await self._batchers[precision].submit(windows, deadline=deadline)
        queue_s = min(result.queue_s for result in results)
        done_s = max(result.queue_s + result.inference_s for result in results)
        started = self.clock()

        def decode() -> list[Span]:
            return decode_spans(
                query.context,
                windows,
                [result.start for result in results],
                [result.end for result in results],
                top_k=query.top_k,
                max_answer_tokens=query.max_answer_tokens,
                allow_no_answer=query.allow_no_answer,
                align_to_words=query.align_to_words,
            )

        if len(windows) <= _INLINE_WINDOWS:
            spans = decode()
        else:
            spans = await self._run_in_thread(decode, deadline=deadline)
        stages = StageSeconds(
            tokenize=tokenize_s,
            queue=queue_s,
            inference=done_s - queue_s,
            decode=self.clock() - started,
        )
        self._telemetry.observe_stages(precision, stages)
        return Run(tuple(spans), stages)

    async def _infer(
        self, precision: Precision, batch: PaddedBatch, deadline: float | None
    ) -> BatchLogits:
        timeout_s = None if deadline is None else max(deadline - self.clock(), 0.001)
        try:
            return await self._engine.infer(precision, batch, timeout_s)
        except EngineUnavailableError as error:
            self.watch.report_loss(precision, error)
            raise
        except Int8qaError:
            raise
        except Exception as error:
            # The batcher turns it into an error of ours; here its cause is kept.
            get_logger().error(
                "engine_call_failed",
                precision=precision.value,
                failure=describe_exception(error),
            )
            raise

    async def _run_in_thread(
        self, work: Callable[..., T], *arguments: object, deadline: float
    ) -> T:
        """Run blocking work in a thread; a caller that leaves does not stop it."""
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, work, *arguments
        )
        try:
            return await finish_within(future, deadline - self.clock())
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                "the text was not tokenized or decoded before the deadline; send less "
                "text, or raise INT8QA_LIMITS__REQUEST_TIMEOUT_S"
            ) from None
