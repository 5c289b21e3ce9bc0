"""One question from text to answers: tokenize, queue, infer, decode.

In: a question with its options and a deadline. Out: answers with the time of each
stage, or one of int8qa's errors. Owns the batchers and the readiness watch. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    ConfigurationError,
    ContractError,
    EngineError,
    EngineOutputError,
    EngineUnavailableError,
    Int8qaError,
    InvalidInputError,
    ShuttingDownError,
)
from int8qa.gateway.activity import Activity
from int8qa.gateway.batcher import Batcher
from int8qa.gateway.comparison import (
    ComparisonWindow,
    FailedPair,
    Nonsense,
    Observation,
    Pair,
    Single,
    build_pair,
    judge,
)
from int8qa.gateway.engine import Engine, ReadinessWatch, find_rebuild
from int8qa.gateway.guard import AgreementGuard, GuardReport
from int8qa.gateway.load import Load
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.query import BOTH, PAIR, Outcome, PrecisionChoice, Query, Run
from int8qa.gateway.reading import Reading
from int8qa.gateway.shadow import Sample, Shadow
from int8qa.gateway.telemetry import StageSeconds, Telemetry
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.gateway.tracing import NO_TRACING, Tracing
from int8qa.gateway.waiting import finish_within
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window
from int8qa.settings import BatcherSettings, ComparisonSettings, Settings

_REPLAY_TIMEOUT_S = 5.0
"""For one precision's answer to a sample that is asked again."""


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


def _take_share(settings: Settings) -> tuple[BatcherSettings, ComparisonSettings]:
    """One process's part of what all of them may queue, and spend on asking again."""
    processes = settings.workers
    batching, sampling = settings.batcher, settings.comparison
    if processes == 1:
        return batching, sampling
    tokens = max(1, batching.max_queue_tokens // processes)
    share = sampling.capacity_share / processes
    return (
        batching.model_copy(update={"max_queue_tokens": tokens}),
        sampling.model_copy(update={"capacity_share": share}),
    )


class _Queues:
    """All batchers as the shadow sees them."""

    def __init__(self, batchers: Iterable[Batcher]) -> None:
        self._batchers = tuple(batchers)

    @property
    def queued(self) -> bool:
        return any(batcher.queued_windows for batcher in self._batchers)

    @property
    def in_flight(self) -> bool:
        return any(batcher.in_flight for batcher in self._batchers)


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
        tracing: Tracing = NO_TRACING,
        on_other_build: Callable[[], None] = lambda: None,
        load: Load | None = None,
        share: Callable[[Observation], None] | None = None,
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
            on_other_build=on_other_build,
            on_change=self._on_readiness,
        )
        self._settings = settings
        self._contract = contract
        self._engine = engine
        self._telemetry = telemetry
        self._comparison = comparison
        self._tracing = tracing
        self._share = share or self.observe
        batching, sampling = _take_share(settings)
        self._batchers = {
            precision: Batcher(
                precision,
                contract,
                batching,
                self._infer,
                observer=telemetry,
                tracing=tracing,
                clock=clock,
            )
            for precision in contract.models
        }
        self._reading = Reading(tokenizer, settings.limits, clock)
        self._turn = itertools.count()
        self.activity = Activity(telemetry.set_inflight, load)
        self._queues = _Queues(self._batchers.values())
        self._serving = self.default_precision
        telemetry.set_serving(self._serving)
        self.guard = AgreementGuard(settings.comparison, on_switch=self._on_switch)
        self.shadow = Shadow(
            sampling,
            self.activity,
            self._queues,
            ask=self._ask_again,
            report=self._note_pair,
            observer=telemetry,
            clock=clock,
        )
        self._draining = False
        self._drained = False

    async def start(self) -> None:
        """Open the engine, start the batchers and the watch; waits for neither."""
        self._reading.start()
        await self._engine.connect()
        for batcher in self._batchers.values():
            await batcher.start()
        await self.watch.start()
        if all(precision in self._contract.models for precision in PAIR):
            await self.shadow.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse what is new, finish what was accepted, fail the rest in time."""
        self._draining = True
        until = self.clock() + timeout_s
        await self.shadow.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await finish_within(self.activity.wait_for_no_request(), timeout_s)
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
        self._reading.close()

    def show_state(self) -> None:
        """Tell telemetry, which another pipeline spoke to before, how things stand."""
        for precision in self._contract.models:
            ready = self.watch.is_ready(precision)
            self._telemetry.set_model_ready(precision, ready=ready)
        self._telemetry.set_serving(self._serving)
        self._telemetry.set_guard(tripped=self.guard.tripped)

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

    @property
    def serving_precision(self) -> Precision:
        """What a request that names no precision gets now.

        The default; or FP16 while the guard diverts from INT8, if FP16 can serve: an
        answer under suspicion is better than none.
        """
        if (
            self.guard.diverts
            and self.default_precision is Precision.INT8
            and self.watch.is_ready(Precision.FP16)
        ):
            return Precision.FP16
        return self.default_precision

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
        if name is None:
            served = self.serving_precision
            return PrecisionChoice(served.value, (served,), served)
        allowed = self.list_precisions()
        if name not in allowed:
            raise InvalidInputError(
                field, f"unknown {field}; allowed here: {', '.join(allowed)}"
            )
        if name == BOTH:
            default = self.serving_precision
            answering = default if default in PAIR else Precision.INT8
            return PrecisionChoice(BOTH, PAIR, answering)
        precision = Precision(name)
        return PrecisionChoice(name, (precision,), precision)

    def admit(self) -> contextlib.AbstractContextManager[None]:
        """Count a request while it is worked on, as the context manager returned.

        Raises:
            ShuttingDownError: the service is draining.
        """
        if self._draining:
            raise ShuttingDownError("the service is shutting down; ask again shortly")
        return self.activity.request()

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
        self._reading.check_texts(query)
        for precision in query.choice.precisions:
            self.watch.require(precision)
        with self.activity.question(), self._tracing.trace_stage("answer"):
            started = self.clock()
            with self._tracing.trace_stage("tokenize"):
                windows = await self._reading.split(query, deadline)
            tokenize_s = self.clock() - started
            if len(query.choice.precisions) > 1:
                return await self._answer_both(query, windows, tokenize_s, deadline)
            (precision,) = query.choice.precisions
            try:
                run = await self._run(precision, query, windows, tokenize_s, deadline)
            except EngineOutputError:
                # Asked again like any other, it tells the guard; no more often, or one
                # broken batch would outweigh all sampled answers.
                self.shadow.offer(Sample(query, windows))
                raise
        self._note_run(precision, run)
        self.shadow.offer(Sample(query, windows))
        return Outcome(query.choice, len(windows), {precision: run}, run.stages)

    async def _answer_both(
        self, query: Query, windows: list[Window], tokenize_s: float, deadline: float
    ) -> Outcome:
        runs: dict[Precision, Run] = {}
        # What is in the engine now is a replay, or what a client left behind.
        undisturbed = self.activity.questions == 1 and not self._queues.in_flight
        arrivals = self.activity.arrivals
        try:
            for precision in PAIR if next(self._turn) % 2 == 0 else PAIR[::-1]:
                runs[precision] = await self._run_paired(
                    precision, query, windows, tokenize_s, deadline
                )
        except EngineError:
            self._note_pair(None)
            raise
        for precision, run in runs.items():
            self._note_run(precision, run)
        pair = build_pair(
            runs,
            undisturbed=undisturbed and self.activity.arrivals == arrivals,
            request_id=query.request_id,
            windows=len(windows),
            question_chars=len(query.question),
            context_chars=len(query.context),
            seen_s=self.clock(),
        )
        self._note_pair(pair)
        return Outcome(
            query.choice,
            len(windows),
            runs,
            StageSeconds(
                tokenize=tokenize_s,
                queue=sum(run.stages.queue for run in runs.values()),
                inference=pair.int8_s + pair.fp16_s,
                decode=sum(run.stages.decode for run in runs.values()),
            ),
            agreement=pair.agreed,
            speedup=pair.fp16_s / pair.int8_s if pair.int8_s > 0 else None,
        )

    async def _run_paired(
        self,
        precision: Precision,
        query: Query,
        windows: list[Window],
        tokenize_s: float,
        deadline: float,
    ) -> Run:
        """One half of a pair; an INT8 answer that is nonsense agrees with nothing."""
        try:
            return await self._run(precision, query, windows, tokenize_s, deadline)
        except EngineOutputError:
            if precision is Precision.INT8:
                self._share(Nonsense())
            raise

    async def _ask_again(self, sample: Sample, precision: Precision) -> Run:
        """A replay's half: as a request's run, but no request's latency."""
        self.watch.require(precision)
        # A hung engine would else be charged to the budget for minutes.
        timeout_s = min(_REPLAY_TIMEOUT_S, self._settings.limits.request_timeout_s)
        return await self._run_paired(
            precision, sample.query, sample.windows, 0.0, self.clock() + timeout_s
        )

    def _note_run(self, precision: Precision, run: Run) -> None:
        self._telemetry.observe_stages(precision, run.stages)
        self._share(Single(precision, run.stages.inference))

    def _note_pair(self, pair: Pair | None) -> None:
        """Keep a pair, or count one in which a side failed."""
        if pair is None:
            self._share(FailedPair())
            self._telemetry.count_comparison_error()
            return
        self._share(pair)
        self._telemetry.observe_pair(pair)

    def observe(self, seen: Observation) -> None:
        """Take what was seen of a question into the comparison and its guard.

        Where several processes serve, ``share`` has all of them call this with what
        any of them saw, in one order: so all judge alike.
        """
        self._comparison.add(seen)
        agreed = judge(seen)
        if agreed is not None:
            self.guard.add(agreed=agreed)

    def restore(self, seen: Iterable[Observation], known: GuardReport) -> None:
        """Take what other processes have observed before this one was there."""
        judgements = []
        for one in seen:
            self._comparison.add(one)
            agreed = judge(one)
            if agreed is not None:
                judgements.append(agreed)
        self.guard.restore(judgements, known)
        self._serving = self.serving_precision
        self.show_state()

    def _on_switch(self, tripped: bool, report: GuardReport) -> None:
        self._telemetry.count_guard_switch(tripped=tripped)
        get_logger().warning(
            "guard_tripped" if tripped else "guard_recovered",
            agreement=report.agreement,
            pairs=report.pairs,
            mode=self._settings.comparison.guard,
            serving=self.serving_precision.value,
        )
        self._note_serving()

    def _on_readiness(self, precision: Precision, ready: bool) -> None:
        self._telemetry.set_model_ready(precision, ready=ready)
        self._note_serving()

    def _note_serving(self) -> None:
        """Log and count when requests that name no precision move to another."""
        before, self._serving = self._serving, self.serving_precision
        self._telemetry.set_serving(self._serving)
        if self._serving is not before:
            self._telemetry.count_diversion(self._serving)
            get_logger().warning(
                "serving_changed", before=before.value, after=self._serving.value
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
        with self._tracing.trace_stage("decode"):
            spans = await self._reading.decode(query, windows, results, deadline)
        stages = StageSeconds(
            tokenize=tokenize_s,
            queue=queue_s,
            inference=done_s - queue_s,
            decode=self.clock() - started,
        )
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
