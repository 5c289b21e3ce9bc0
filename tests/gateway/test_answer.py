"""POST /v1/answer: answers, precisions, limits."""

from __future__ import annotations

import pytest

from int8qa.contract import Precision
from int8qa.errors import ConfigurationError, ContractError
from int8qa.gateway import schemas
from int8qa.gateway.app import create_app
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    build_contract,
    build_settings,
    open_service,
)


async def test_answer_is_the_span_in_the_context(service: Service):
    """The answer's offsets are code points of the context as it was sent."""
    response = await service.ask()
    assert response.status_code == 200, response.text
    body = response.json()
    schemas.AnswerResponse.model_validate(body)
    answer = body["answer"]
    assert answer["text"] == KEEPER
    assert CONTEXT[answer["start"] : answer["end"]] == KEEPER
    assert body["precision"] == "int8"
    assert body["windows"] == 1
    assert body["alternatives"] == []
    assert "comparison" not in body


async def test_offsets_count_code_points_behind_an_emoji(tokenizer):
    """An astral character before the answer counts as one."""
    engine = FakeEngine(tokenizer, phrases={Precision.INT8: ("1952",)})
    async with open_service(
        tokenizer, engine=engine, precisions=[Precision.INT8]
    ) as one:
        answer = (await one.ask()).json()["answer"]
    assert CONTEXT[answer["start"] : answer["end"]] == "1952" == answer["text"]


async def test_stages_add_up_to_the_total(service: Service):
    """The four stages follow each other, so their sum is the total."""
    timing = (await service.ask()).json()["timing_ms"]
    parts = [timing[stage] for stage in ("tokenize", "queue", "inference", "decode")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(timing["total"], abs=0.01)


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
async def test_precision_chooses_the_model(service: Service, precision: str):
    """Only the model that was asked for works."""
    body = (await service.ask(precision=precision)).json()
    assert body["precision"] == precision
    assert {used.value for used, _ in service.engine.calls} == {precision}


async def test_default_precision_is_a_setting(tokenizer):
    """A request that names no precision gets the setting's."""
    async with open_service(tokenizer, default_precision="fp16") as one:
        assert (await one.ask()).json()["precision"] == "fp16"
        assert (await one.ask(precision=None)).json()["precision"] == "fp16"


async def test_top_k_gives_alternatives_best_first(service: Service):
    """The answers after the first are the alternatives, in descending order."""
    body = (await service.ask(top_k=4)).json()
    scores = [a["score"] for a in [body["answer"], *body["alternatives"]]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    for answer in body["alternatives"]:
        assert CONTEXT[answer["start"] : answer["end"]] == answer["text"]


async def test_null_answer_wins_only_when_allowed(tokenizer):
    """Without a findable phrase the answer is null if and only if that is allowed."""
    engine = FakeEngine(tokenizer, phrases=dict.fromkeys(Precision, ()))
    async with open_service(tokenizer, engine=engine) as one:
        allowed = (await one.ask(allow_no_answer=True)).json()
        assert allowed["answer"] is None
        assert (await one.ask()).json()["answer"] is not None
        ranked = (await one.ask(allow_no_answer=True, top_k=3)).json()
        assert ranked["answer"] is None
        assert len(ranked["alternatives"]) == 2


async def test_long_document_answers_from_a_late_window(service: Service):
    """A document of many windows answers from wherever the phrase stands."""
    filler = "Nothing of note happened on that grey day at sea. " * 300
    context = filler + CONTEXT
    response = await service.ask(context=context)
    body = response.json()
    assert body["windows"] > 4
    answer = body["answer"]
    assert context[answer["start"] : answer["end"]] == KEEPER


async def test_both_compares_and_answers_with_the_default(tokenizer):
    """`both` returns each engine's answer, and the default precision's as the answer."""
    engine = FakeEngine(
        tokenizer, phrases={Precision.INT8: (KEEPER,), Precision.FP16: ("1907",)}
    )
    async with open_service(
        tokenizer,
        engine=engine,
        precisions=[Precision.INT8, Precision.FP16],
        default_precision="fp16",
    ) as one:
        body = (await one.ask(precision="both")).json()
    schemas.AnswerResponse.model_validate(body)
    comparison = body["comparison"]
    assert body["precision"] == "both"
    assert comparison["int8"]["answer"]["text"] == KEEPER
    assert comparison["fp16"]["answer"]["text"] == "1907"
    assert body["answer"] == comparison["fp16"]["answer"]
    assert comparison["agreement"] is False
    assert comparison["speedup"] > 0


async def test_both_alternates_which_precision_goes_first(service: Service):
    """Neither precision always runs second, on warm caches."""
    for _ in range(4):
        assert (await service.ask(precision="both")).json()["comparison"]["agreement"]
    order = [precision for precision, _ in service.engine.calls]
    assert order == [
        *(Precision.INT8, Precision.FP16, Precision.FP16, Precision.INT8),
        *(Precision.INT8, Precision.FP16, Precision.FP16, Precision.INT8),
    ]


async def test_both_needs_both_models(tokenizer):
    """Where FP16 is not built, `both` is refused and not among the allowed values."""
    async with open_service(tokenizer, precisions=[Precision.INT8]) as one:
        response = await one.ask(precision="both")
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "precision"
        assert "allowed here: int8" in response.json()["detail"]


async def test_models_lists_what_is_loaded(service: Service):
    """/v1/models names each precision with its accuracy at build."""
    body = (await service.client.get("/v1/models")).json()
    schemas.ModelsReport.model_validate(body)
    assert [model["precision"] for model in body["models"]] == ["int8", "fp16", "fp32"]
    assert body["precisions"] == ["int8", "fp16", "fp32", "both"]
    assert body["models"][0]["f1"] == 80.5
    assert all(model["ready"] for model in body["models"])


def test_default_precision_must_be_built(tokenizer):
    """A default that the repository lacks is a configuration error at start."""
    contract = build_contract(tokenizer, [Precision.INT8])
    settings = build_settings(default_precision="fp16")
    with pytest.raises(ConfigurationError, match="INT8QA_DEFAULT_PRECISION"):
        create_app(settings, contract, tokenizer, FakeEngine(tokenizer))


def test_foreign_tokenizer_is_refused(tokenizer):
    """A tokenizer other than the build's is a contract error at start."""
    contract = build_contract(tokenizer).model_copy(
        update={"tokenizer_sha256": "0" * 64}
    )
    with pytest.raises(ContractError, match="tokenizer"):
        create_app(build_settings(), contract, tokenizer, FakeEngine(tokenizer))


async def test_lifespan_closes_the_engine(tokenizer):
    """What the lifespan opened is closed when it ends."""
    engine = FakeEngine(tokenizer)
    async with open_service(tokenizer, engine=engine):
        assert engine.connected
    assert not engine.connected


async def test_index_page_shows_a_curl_line_for_this_address(service: Service):
    """GET / is a page whose curl line names the address it was asked at, escaped."""
    response = await service.client.get("/", headers={"Accept": "text/html"})
    assert response.status_code == 200
    assert "curl -s http://gateway/v1/answer" in response.text
    hostile = await service.client.get("/", headers={"Host": 'a"><script>x'})
    assert "<script>" not in hostile.text


async def test_question_may_be_right_to_left(service: Service):
    """Hebrew and Arabic are answered like anything else."""
    response = await service.ask(
        question="מי היה השומר?", context=f"שלום {CONTEXT} مرحبا"
    )
    answer = response.json()["answer"]
    context = f"שלום {CONTEXT} مرحبا"
    assert context[answer["start"] : answer["end"]] == KEEPER
    assert QUESTION not in response.text
