"""Answered questions asked again: fairly, last in line, and within a share of time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.contract import Precision
from int8qa.errors import EngineOutputError, EngineUnavailableError
from int8qa.gateway import schemas
from int8qa.gateway.activity import Activity
from int8qa.gateway.comparison import Pair
from int8qa.gateway.query import PrecisionChoice, Query, Run
from int8qa.gateway.shadow import (
    BURST_S,
    GRACE_S,
    MAX_WAITING,
    CapacityBudget,
    Sample,
    Shadow,
)
from int8qa.gateway.telemetry import StageSeconds
from int8qa.reader.spans import Span
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import ComparisonSettings
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    open_service,
    wait_until,
)

INT8, FP16, FP32 = Precision.INT8, Precision.FP16, Precision.FP32
ALWAYS = {"fraction": 1, "capacity_share": 1}


def count_calls(service: Service) -> dict[Precision, int]:
    seen = [precision for precision, _ in service.engine.calls]
    return {precision: seen.count(precision) for precision in (INT8, FP16)}


async def read_report(service: Service) -> dict:
    return (await service.client.get("/v1/comparison")).json()


async def wait_for_pairs(service: Service, pairs: int) -> None:
    comparison = service.app.state.gateway.comparison
    await wait_until(lambda: comparison.report_pairs().count >= pairs)


async def test_each_answered_question_is_asked_of_both(tokenizer: ReaderTokenizer):
    """One question costs one batch for its answer and one of each for the pair."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        for precision in ("int8", "fp16", "fp32"):
            assert (await service.ask(precision=precision)).status_code == 200
        await wait_for_pairs(service, 3)
        assert count_calls(service) == {INT8: 4, FP16: 4}
        report = await read_report(service)
        schemas.ComparisonReport.model_validate(report)
        assert report["sampling"]["replayed"] == report["count"] == 3
        assert report["agreement"] == 1.0
        metrics = await service.read_metrics()
        assert metrics['int8qa_comparisons_total{agreement="same"}'] == 3
        assert metrics["int8qa_comparison_busy_seconds_total"] > 0
        assert metrics["int8qa_comparison_agreement_ratio"] == 1.0


async def test_replays_are_no_requests(tokenizer: ReaderTokenizer):
    """Stage times and each precision's own latencies are those of requests alone."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        await service.ask(precision="int8")
        await wait_for_pairs(service, 1)
        metrics = await service.read_metrics()
        stage = 'int8qa_stage_seconds_count{precision="%s",stage="inference"}'
        assert metrics[stage % "int8"] == 1
        assert metrics[stage % "fp16"] == 0
        assert (await read_report(service))["unpaired"]["fp16"]["count"] == 0


async def test_order_alternates(tokenizer: ReaderTokenizer):
    """Neither precision always has the caches warm."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        for count in range(1, 5):
            await service.ask(precision="fp32")
            await wait_for_pairs(service, count)
        order = [p for p, _ in service.engine.calls if p in (INT8, FP16)]
        assert order == [INT8, FP16, FP16, INT8] * 2


async def test_a_request_comes_between_the_halves_of_a_pair(
    tokenizer: ReaderTokenizer,
):
    """Whoever waits comes first, and makes the pair a disturbed one."""
    engine = FakeEngine(tokenizer)
    async with open_service(tokenizer, engine=engine, comparison=ALWAYS) as service:
        pipeline = service.app.state.gateway.pipeline
        engine.gates = {INT8: asyncio.Event(), FP32: asyncio.Event()}
        engine.gates[FP32].set()
        await service.ask(precision="fp32")
        await wait_until(lambda: count_calls(service)[INT8] == 1)
        engine.gates[FP32].clear()
        late = asyncio.create_task(service.ask(precision="fp32"))
        await wait_until(lambda: engine.calls[-1][0] is FP32)
        engine.gates[INT8].set()
        await wait_until(lambda: not pipeline.shadow.busy)
        await asyncio.sleep(20 * GRACE_S)
        assert count_calls(service)[FP16] == 0
        engine.gates[FP32].set()
        await late
        await wait_for_pairs(service, 2)
        assert [p for p, _ in engine.calls][:4] == [FP32, INT8, FP32, FP16]
        report = await read_report(service)
        assert (report["sampling"]["disturbed"], report["int8"]["count"]) == (1, 1)


async def test_a_slow_sender_does_not_stop_the_comparison(tokenizer: ReaderTokenizer):
    """A request that is admitted and asks nothing yet keeps no engine busy."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        with service.app.state.gateway.pipeline.admit():
            await service.ask(precision="int8")
            await wait_for_pairs(service, 1)
        assert (await read_report(service))["int8"]["count"] == 1


async def test_what_a_client_left_in_the_engine_is_waited_for(
    tokenizer: ReaderTokenizer,
):
    """Its batch still computes: a replay beside it would measure that."""
    engine = FakeEngine(tokenizer)
    async with open_service(tokenizer, engine=engine, comparison=ALWAYS) as service:
        engine.gates = {FP32: asyncio.Event()}
        gone = asyncio.create_task(service.ask(precision="fp32"))
        await wait_until(lambda: engine.calls)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await service.ask(precision="int8")
        await asyncio.sleep(20 * GRACE_S)
        assert count_calls(service) == {INT8: 1, FP16: 0}
        engine.gates[FP32].set()
        await wait_for_pairs(service, 1)
        assert (await read_report(service))["int8"]["count"] == 1


async def test_disturbed_pair_gives_agreement_and_no_latency(
    tokenizer: ReaderTokenizer,
):
    """Somebody else's batch was in the engine: the time is not the precision's own."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        await service.ask(precision="fp32")
        service.engine.open_gate.clear()
        await wait_until(lambda: count_calls(service)[INT8] == 1)
        service.app.state.gateway.pipeline.shadow._draw = lambda: 1.0
        late = asyncio.create_task(service.ask(precision="fp32"))
        activity = service.app.state.gateway.pipeline.activity
        await wait_until(lambda: activity.requests == 1)
        service.engine.open_gate.set()
        await late
        await wait_for_pairs(service, 1)
        report = await read_report(service)
        assert (report["count"], report["int8"]["count"]) == (1, 0)
        assert report["speedup"] is None
        metrics = await service.read_metrics()
        assert metrics["int8qa_comparison_disturbed_total"] == 1


async def test_concurrent_both_requests_are_disturbed(tokenizer: ReaderTokenizer):
    """Two questions of one batch request share the engine: their times do not count."""
    async with open_service(tokenizer) as service:
        service.engine.open_gate.clear()
        item = {"question": QUESTION, "context": CONTEXT, "precision": "both"}
        post = service.client.post("/v1/answers", json={"items": [item] * 2})
        asked = asyncio.create_task(post)
        await wait_until(lambda: len(service.engine.calls) == 2)
        service.engine.open_gate.set()
        assert [i["status"] for i in (await asked).json()["items"]] == [200, 200]
        report = await read_report(service)
        assert (report["count"], report["int8"]["count"]) == (2, 0)


async def test_fraction_zero_asks_nothing_again(tokenizer: ReaderTokenizer):
    """Switched off, the engine sees requests alone."""
    async with open_service(tokenizer, comparison={"fraction": 0}) as service:
        for _ in range(5):
            await service.ask(precision="int8")
        assert count_calls(service) == {INT8: 5, FP16: 0}
        assert (await read_report(service))["sampling"]["waiting"] == 0


async def test_without_fp16_there_is_nothing_to_compare(tokenizer: ReaderTokenizer):
    """A repository with INT8 alone serves, and replays nothing."""
    async with open_service(
        tokenizer, precisions=(INT8,), comparison=ALWAYS
    ) as service:
        await service.ask(precision="int8")
        assert count_calls(service)[INT8] == 1
        assert (await read_report(service))["sampling"]["waiting"] == 0


async def test_long_documents_are_left_out(tokenizer: ReaderTokenizer):
    """A replay of many windows would stand in the way of whoever comes meanwhile."""
    settings = {**ALWAYS, "max_windows": 2}
    async with open_service(tokenizer, comparison=settings) as service:
        response = await service.ask(precision="int8", context=CONTEXT * 60)
        assert response.json()["windows"] > 2
        report = await read_report(service)
        assert report["sampling"]["skipped"]["too_long"] == 1
        metrics = await service.read_metrics()
        assert metrics['int8qa_comparison_skipped_total{reason="too_long"}'] == 1


async def test_waiting_samples_are_bounded(tokenizer: ReaderTokenizer):
    """The oldest make room: a busy gateway does not hoard its users' texts."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        item = {"question": QUESTION, "context": CONTEXT, "precision": "int8"}
        items = {"items": [item] * (MAX_WAITING + 5)}
        await service.client.post("/v1/answers", json=items)
        await wait_for_pairs(service, MAX_WAITING)
        report = await read_report(service)
        assert report["sampling"]["skipped"]["busy"] == 5
        assert report["sampling"]["replayed"] == MAX_WAITING


async def test_a_failing_side_is_an_error_and_the_next_pair_counts(
    tokenizer: ReaderTokenizer,
):
    """The task outlives what goes wrong."""
    async with open_service(tokenizer, comparison=ALWAYS) as service:
        service.engine.fault = EngineOutputError("broken")
        service.engine.faulty = frozenset({FP16})
        await service.ask(precision="int8")
        comparison = service.app.state.gateway.comparison
        await wait_until(lambda: comparison.report_pairs().errors == 1)
        service.engine.fault = ValueError("a bug")
        await service.ask(precision="int8")
        await wait_until(lambda: comparison.report_pairs().errors == 2)
        service.engine.fault = None
        await service.ask(precision="int8")
        await wait_for_pairs(service, 1)


async def test_closing_does_not_wait_for_replays(tokenizer: ReaderTokenizer):
    """A service that ends has better to do than to measure itself."""
    engine = FakeEngine(tokenizer)
    async with open_service(tokenizer, engine=engine, comparison=ALWAYS) as service:
        await service.ask(precision="fp32")
        engine.open_gate.clear()
        await wait_until(lambda: count_calls(service)[INT8] == 1)
        await asyncio.wait_for(service.app.state.gateway.pipeline.drain(60), 10)
    assert engine.cancelled == 1


async def test_disagreements_name_ids_and_places_and_no_text(
    tokenizer: ReaderTokenizer,
):
    """Whoever looks for the worst disputes finds the requests in the log."""
    phrases = {INT8: ["1907"], FP16: [KEEPER], Precision.FP32: [KEEPER]}
    engine = FakeEngine(tokenizer, phrases=phrases)
    async with open_service(tokenizer, engine=engine, comparison=ALWAYS) as service:
        body = {"question": QUESTION, "context": CONTEXT, "precision": "fp32"}
        await service.client.post(
            "/v1/answer", json=body, headers={"X-Request-Id": "dispute-1"}
        )
        await wait_for_pairs(service, 1)
        response = await service.client.get("/v1/comparison")
        (dispute,) = response.json()["disagreements"]
        assert dispute["request_id"] == "dispute-1"
        assert CONTEXT[slice(*_span(dispute["int8"]))] == "1907"
        assert CONTEXT[slice(*_span(dispute["fp16"]))] == KEEPER
        assert dispute["context_chars"] == len(CONTEXT)
        assert KEEPER not in response.text
        metrics = await service.client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text"}
        )
        assert 'request_id="dispute-1"' in metrics.text
        assert metrics.text.endswith("# EOF\n")
        assert KEEPER not in metrics.text
        plain = await service.client.get("/metrics")
        assert "dispute-1" not in plain.text


def _span(place: dict) -> tuple[int, int]:
    return place["start"], place["end"]


# The guard, with live replays.


@dataclass
class Guarded:
    service: Service
    engine: FakeEngine

    async def ask(self, times: int = 1) -> list[str]:
        """Ask without naming a precision; wait for the replays; who answered?"""
        comparison = self.service.app.state.gateway.comparison
        seen = []
        for _ in range(times):
            before = comparison.report_pairs()
            response = await self.service.ask()
            seen.append(response.json().get("precision", str(response.status_code)))
            await wait_until(lambda before=before: _grew(comparison, before))
        return seen


def _grew(comparison, before) -> bool:
    report = comparison.report_pairs()
    return report.count + report.errors > before.count + before.errors


@pytest.fixture
async def guarded(tokenizer: ReaderTokenizer) -> AsyncIterator[Guarded]:
    engine = FakeEngine(tokenizer)
    settings = {**ALWAYS, "guard": "fallback", "guard_pairs": 4}
    async with open_service(tokenizer, engine=engine, comparison=settings) as service:
        yield Guarded(service, engine)


async def test_fallback_moves_traffic_and_recovers(guarded: Guarded):
    """INT8 goes wrong, FP16 takes over; INT8 is mended, and gets its traffic back."""
    sound = guarded.engine.phrases
    assert await guarded.ask(4) == ["int8"] * 4
    guarded.engine.phrases = {**sound, INT8: ["1907"]}
    assert (await guarded.ask(3))[-1] == "fp16"
    report = await read_report(guarded.service)
    assert report["guard"]["state"] == "tripped"
    assert report["guard"]["serving"] == "fp16"
    models = (await guarded.service.client.get("/v1/models")).json()
    assert models["default_precision"] == "fp16"
    explicit = await guarded.service.ask(precision="int8")
    assert explicit.json()["precision"] == "int8"
    metrics = await guarded.service.read_metrics()
    assert metrics["int8qa_guard_tripped"] == 1
    assert metrics['int8qa_guard_switches_total{to="fp16"}'] == 1

    guarded.engine.phrases = sound
    assert (await guarded.ask(6))[-1] == "int8"
    metrics = await guarded.service.read_metrics()
    assert metrics["int8qa_guard_tripped"] == 0
    assert metrics['int8qa_guard_switches_total{to="int8"}'] == 1


async def test_nonsense_from_int8_trips_the_guard(guarded: Guarded):
    """NaN logits agree with nothing, though they make no pair."""
    guarded.engine.fault = EngineOutputError("NaN")
    guarded.engine.faulty = frozenset({INT8})
    assert await guarded.ask(4) == ["502"] * 4
    assert await guarded.ask(1) == ["fp16"]


async def test_failures_count_no_more_often_than_answers(tokenizer: ReaderTokenizer):
    """Unsampled, neither is evidence: one broken batch must not be a verdict."""
    engine = FakeEngine(tokenizer, fault=EngineOutputError("blip"))
    settings = {"fraction": 0, "guard_pairs": 4}
    async with open_service(tokenizer, engine=engine, comparison=settings) as service:
        assert [(await service.ask()).status_code for _ in range(10)] == [502] * 10
        assert (await read_report(service))["guard"]["pairs"] == 0


async def test_nonsense_in_both_requests_counts(tokenizer: ReaderTokenizer):
    """Each of these would have been a pair."""
    engine = FakeEngine(tokenizer, fault=EngineOutputError("NaN"))
    engine.faulty = frozenset({INT8})
    settings = {"fraction": 0, "guard_pairs": 4}
    async with open_service(tokenizer, engine=engine, comparison=settings) as service:
        for _ in range(4):
            assert (await service.ask(precision="both")).status_code == 502
        assert (await read_report(service))["guard"]["state"] == "tripped"


async def test_fallback_needs_an_fp16_that_can_serve(
    guarded: Guarded, capsys: pytest.CaptureFixture[str]
):
    """An answer under suspicion is better than none; that it moved is seen."""
    guarded.engine.phrases = {**guarded.engine.phrases, INT8: ["1907"]}
    await guarded.ask(5)
    pipeline = guarded.service.app.state.gateway.pipeline
    assert pipeline.serving_precision is FP16
    pipeline.watch.report_loss(FP16, EngineUnavailableError("gone"))
    assert pipeline.serving_precision is INT8
    metrics = await guarded.service.read_metrics()
    assert metrics['int8qa_diversions_total{to="fp16"}'] == 1
    assert metrics['int8qa_diversions_total{to="int8"}'] == 1
    assert metrics['int8qa_serving_precision{precision="int8"}'] == 1
    assert "".join(capsys.readouterr()).count("serving_changed") == 2


async def test_fallback_without_fp16_changes_nothing(tokenizer: ReaderTokenizer):
    """A repository of INT8 alone has nowhere to go."""
    settings = {"guard": "fallback", "guard_pairs": 2}
    async with open_service(
        tokenizer, precisions=(INT8,), comparison=settings
    ) as service:
        for _ in range(2):
            service.app.state.gateway.pipeline.guard.add(agreed=False)
        assert (await service.ask()).json()["precision"] == "int8"


async def test_switches_are_logged_without_texts(
    guarded: Guarded, capsys: pytest.CaptureFixture[str]
):
    """The line says how low, over how many, and who serves now."""
    guarded.engine.phrases = {**guarded.engine.phrases, INT8: ["1907"]}
    await guarded.ask(4)
    written = "".join(capsys.readouterr())
    assert "guard_tripped" in written
    assert "serving" in written
    assert KEEPER not in written


# The shadow alone: time is a number here.


@dataclass
class Rig:
    """A shadow whose clock advances when it sleeps and when it asks."""

    share: float = 1.0
    queued: bool = False
    in_flight: bool = False
    now_s: float = 0.0
    spent_s: float = 0.0
    work_s: float = 0.05
    overspent_s: float = 0.0
    pairs: list[Pair | None] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)

    async def ask(self, _sample: Sample, _precision: Precision) -> Run:
        allowed_s = self.share * (self.now_s + BURST_S) + 2 * self.work_s
        self.overspent_s = max(self.overspent_s, self.spent_s - allowed_s)
        self.now_s += self.work_s
        self.spent_s += self.work_s
        return Run((Span("a", 0, 1, 0.5),), StageSeconds(0, 0, self.work_s, 0))

    def on_skip(self, reason: str) -> None:
        """Nobody counts here."""

    def on_replay(self, busy_s: float) -> None:
        """Nobody counts here."""

    def open(self, activity: Activity) -> Shadow:
        return Shadow(
            ComparisonSettings(fraction=1, capacity_share=self.share),
            activity,
            self,
            ask=self.ask,
            report=self.pairs.append,
            observer=self,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )


def build_sample() -> Sample:
    choice = PrecisionChoice("int8", (INT8,), INT8)
    query = Query("q", "a", choice, 1, 30, 128, False, 384)
    return Sample(query, [None])  # type: ignore[list-item] # only counted


async def test_no_replay_begins_while_the_budget_is_overdrawn():
    """Twenty samples at a twentieth of the time take their time."""
    rig, activity = Rig(share=0.05), Activity()
    shadow = rig.open(activity)
    await shadow.start()
    for count in range(20):
        shadow.offer(build_sample())
        await wait_until(lambda count=count: len(rig.pairs) > count)
    await shadow.close()
    assert rig.overspent_s <= 1e-9
    assert rig.now_s > 20 * 2 * rig.work_s / 0.05 - BURST_S - 2 * rig.work_s / 0.05


async def test_patience_ends_where_queues_are_empty(monkeypatch: pytest.MonkeyPatch):
    """A gateway that is never idle still learns agreement, but no latency."""
    monkeypatch.setattr("int8qa.gateway.shadow.PATIENCE_S", 0.01)
    rig, activity = Rig(queued=True), Activity()
    shadow = rig.open(activity)
    await shadow.start()
    with activity.question():
        shadow.offer(build_sample())
        await asyncio.sleep(0.1)
        assert rig.spent_s == 0
        rig.queued = False
        await wait_until(lambda: rig.pairs)
    await shadow.close()
    (pair,) = rig.pairs
    assert pair is not None
    assert pair.agreed
    assert not pair.undisturbed


# The budget.


@given(
    st.floats(0.01, 1),
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.001, 0.5)), min_size=1, max_size=100
    ),
)
def test_budget_is_kept_over_any_span(share, turns):
    """Replays as early as allowed spend at most the share, one burst and one replay."""
    budget, now_s, spent_s = CapacityBudget(share, 0.0), 0.0, 0.0
    for pause_s, work_s in turns:
        now_s += pause_s
        now_s += budget.wait_s(now_s) * (1 + 1e-9)
        assert budget.wait_s(now_s) < 1e-6
        now_s += work_s
        spent_s += work_s
        budget.spend(work_s, now_s)
        assert spent_s <= share * now_s + share * BURST_S + work_s + 1e-6


def test_rest_is_never_saved_up_beyond_the_burst():
    """An hour of quiet allows one burst, not six minutes of replays."""
    budget = CapacityBudget(0.1, 0.0)
    budget.spend(0.2, 3600.0)
    assert math.isclose(budget.wait_s(3600.0), 1.0)


def test_recovery_at_the_defaults_is_eighty_five_of_a_hundred():
    """The sum of the shares, not of their nearest floats."""
    assert ComparisonSettings().guard_recovery == 0.85
