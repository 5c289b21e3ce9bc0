"""EM, F1 and agreement through a gateway that answers as it is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from int8qa import client
from int8qa.client import GatewayClient
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError
from int8qa.evaluation import evaluate_service
from int8qa.gateway.schemas import AnswerResponse, ModelsReport
from int8qa.reader.squad import ANSWER_TOKENS, SquadQuestion
from tests.stub_gateway import (
    MODELS,
    Reply,
    answer_reply,
    problem_reply,
    run_gateway,
)

BOTH = (Precision.INT8, Precision.FP16)


def make_question(number: int, *, impossible: bool = False) -> SquadQuestion:
    context = f"The key to room {number} hangs behind the bar."
    return SquadQuestion(
        id=f"q{number}",
        question=f"Where does the key to room {number} hang?",
        context=context,
        answers=() if impossible else ("behind the bar",),
        answer_starts=() if impossible else (context.index("behind"),),
        is_impossible=impossible,
    )


def test_stub_speaks_the_schema() -> None:
    """The stub's answers are the gateway's, or these tests would say nothing."""
    AnswerResponse.model_validate(answer_reply("behind").body)
    AnswerResponse.model_validate(answer_reply(None).body)
    ModelsReport.model_validate(MODELS)


async def test_paired_scores() -> None:
    """INT8 misses one of four, FP16 none: scores, agreement, times, checkpoint."""
    questions = [make_question(n) for n in range(4)]

    def answer(body: dict[str, Any]) -> Reply:
        wrong = body["precision"] == "int8" and "room 2 " in body["question"]
        return answer_reply(
            "room 2" if wrong else "behind the bar",
            precision=body["precision"],
            ms=1.0 if body["precision"] == "int8" else 4.0,
        )

    ticks: list[None] = []
    with run_gateway(answer) as gateway:
        found = await evaluate_service(
            gateway.url, questions, BOTH, on_answer=lambda: ticks.append(None)
        )
    assert found.checkpoint == "acme/reader"
    assert found.questions == 4
    assert len(ticks) == len(gateway.requests) == 8
    assert found.results.keys() == {"int8", "fp16"}
    assert found.results["int8"].scores.exact == 75.0
    assert found.results["fp16"].scores.exact == 100.0
    assert found.agreement == {"int8/fp16": 0.75}
    assert found.results["int8"].inference_ms_p50 == 1.0
    assert found.results["fp16"].total_ms_p50 == 8.0
    assert found.to_json()["results"]["int8"]["scores"]["f1"] == pytest.approx(75.0)


async def test_every_question_goes_to_every_precision_in_turns() -> None:
    """One at a time: the same question to each precision, then the next."""
    questions = [make_question(n) for n in range(3)]
    with run_gateway(lambda body: answer_reply("x")) as gateway:
        await evaluate_service(gateway.url, questions, BOTH, concurrency=1)
    asked = [(body["question"], body["precision"]) for body in gateway.requests]
    assert asked == [(q.question, str(p)) for q in questions for p in BOTH]
    assert all(body["max_answer_tokens"] == ANSWER_TOKENS for body in gateway.requests)


async def test_the_null_threshold_goes_with_every_question() -> None:
    """What the evaluation is told about abstaining is what the service is asked."""
    questions = [make_question(n) for n in range(2)]
    with run_gateway(lambda body: answer_reply("x")) as gateway:
        await evaluate_service(
            gateway.url, questions, BOTH, null_score_diff_threshold=-2.5
        )
    sent = [body["null_score_diff_threshold"] for body in gateway.requests]
    assert sent == [-2.5] * 4


@pytest.mark.parametrize("impossible", [False, True])
async def test_abstaining_follows_the_data(impossible: bool) -> None:
    """The reader may abstain where the data holds questions without an answer."""
    questions = [make_question(0), make_question(1, impossible=impossible)]

    def answer(body: dict[str, Any]) -> Reply:
        return answer_reply(None if "room 1 " in body["question"] else "behind the bar")

    with run_gateway(answer) as gateway:
        found = await evaluate_service(gateway.url, questions, [Precision.INT8])
    assert {body["allow_no_answer"] for body in gateway.requests} == {impossible}
    assert found.results["int8"].scores.exact == (100.0 if impossible else 50.0)
    assert found.agreement == {}


async def test_a_refusal_ends_it() -> None:
    """The first refusal stops all workers; its detail is the message."""

    def answer(body: dict[str, Any]) -> Reply:
        if len(gateway.requests) > 3:
            return problem_reply(422, "precision fp16 is not served")
        return answer_reply("x")

    with run_gateway(answer) as gateway:
        with pytest.raises(GatewayRequestError, match="HTTP 422: precision fp16 is"):
            await evaluate_service(
                gateway.url, [make_question(n) for n in range(200)], BOTH
            )
        assert len(gateway.requests) < 50


@pytest.mark.parametrize("status", [429, 503])
async def test_overload_is_waited_out(status: int) -> None:
    """429 and 503 mean later, not never."""

    def answer(body: dict[str, Any]) -> Reply:
        if len(gateway.requests) < 3:
            return problem_reply(status, "full", retry_after="0")
        return answer_reply("behind")

    with run_gateway(answer) as gateway:
        async with GatewayClient(gateway.url + "/") as asker:
            response = await asker.answer({"question": "?", "context": "."})
    assert response["answer"]["text"] == "behind"
    assert len(gateway.requests) == 3


async def test_overload_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last attempt the gateway's own reason is shown."""
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 2)
    full = problem_reply(503, "Triton is not there", retry_after="0")
    with run_gateway(lambda body: full) as gateway:
        async with GatewayClient(gateway.url) as asker:
            with pytest.raises(GatewayRequestError, match="503: Triton is not there"):
                await asker.answer({})
    assert len(gateway.requests) == 2


@pytest.mark.parametrize(
    ("header", "delay_s"),
    [
        ("3", 3.0),
        ("0", 0.1),
        ("-5", 0.1),
        ("3600", 10.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0),
        ("nan", 1.0),
        ("inf", 1.0),
        (None, 1.0),
    ],
)
def test_retry_after(header: str | None, delay_s: float) -> None:
    """The header is obeyed within reason; a date, or nonsense, means a second."""
    headers = {} if header is None else {"retry-after": header}
    assert client._retry_delay_s(httpx.Response(503, headers=headers)) == delay_s


@pytest.mark.parametrize("body", ["<html>", "[1]", ""])
async def test_another_service_listens_there(body: str) -> None:
    """A 200 that is no JSON object did not come from a gateway."""
    with run_gateway(lambda _: Reply(body)) as gateway:
        async with GatewayClient(gateway.url) as asker:
            with pytest.raises(GatewayRequestError, match="is no int8qa gateway"):
                await asker.answer({})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (problem_reply(422, "top_k: too large"), "HTTP 422: top_k: too large"),
        (Reply({"title": "Not Found"}, 404), "HTTP 404: Not Found"),
        (Reply("<html>", 500), "HTTP 500: no reason given"),
        (Reply([1], 500), "HTTP 500: no reason given"),
    ],
)
async def test_refusals_are_described(reply: Reply, reason: str) -> None:
    """Detail, else title, else nothing is invented."""
    with run_gateway(lambda _: reply) as gateway:
        async with GatewayClient(gateway.url) as asker:
            with pytest.raises(GatewayRequestError, match=rf"{reason}$"):
                await asker.answer({})


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://localhost", "", "http://[::1"]
)
async def test_no_address(url: str) -> None:
    """An address without http:// is a likely slip; the message shows a right one."""
    async with GatewayClient(url) as asker:
        with pytest.raises(GatewayRequestError, match="--url http://127"):
            await asker.list_models()
