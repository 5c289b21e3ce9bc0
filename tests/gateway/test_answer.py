"""POST /v1/answer: answers, precisions, limits."""

from __future__ import annotations

import pytest

from int8qa.contract import Precision, load_contract
from int8qa.errors import ConfigurationError, ContractError
from int8qa.gateway import schemas
from int8qa.gateway.app import create_app
from int8qa.gateway.pipeline import AnswerPipeline
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


@pytest.mark.parametrize(
    ("setting", "recommended", "expected"),
    [
        ("auto", None, "int8"),
        ("auto", Precision.INT8, "int8"),
        ("auto", Precision.FP16, "fp16"),
        ("auto", Precision.FP32, "fp32"),
        ("int8", Precision.FP16, "int8"),
        ("fp32", Precision.INT8, "fp32"),
    ],
)
async def test_default_precision_follows_the_build(
    tokenizer, setting: str, recommended: Precision | None, expected: str
):
    """The setting's word counts; `auto` is what the build recommends, else INT8."""
    async with open_service(
        tokenizer, recommended=recommended, default_precision=setting
    ) as one:
        assert (await one.ask()).json()["precision"] == expected
        assert {used.value for used, _ in one.engine.calls} == {expected}
        models = (await one.client.get("/v1/models")).json()
    schemas.ModelsReport.model_validate(models)
    assert models["default_precision"] == expected
    assert models["recommended"] == recommended


async def test_auto_is_the_default(tokenizer):
    """A gateway that is told nothing follows the build, in every route."""
    async with open_service(tokenizer, recommended=Precision.FP16) as one:
        body = {"inputs": {"question": QUESTION, "context": CONTEXT}}
        for path in ("/", "/models/acme/minilm-test"):
            assert (await one.client.post(path, json=body)).status_code == 200
        item = {"question": QUESTION, "context": CONTEXT}
        await one.client.post("/v1/answers", json={"items": [item]})
        assert {used for used, _ in one.engine.calls} == {Precision.FP16}
        await one.client.post("/models/qa_int8", json=body)
        assert one.engine.calls[-1][0] is Precision.INT8


async def test_rebuilt_repository_is_followed_at_the_next_start(tokenizer, tmp_path):
    """A new recommendation counts once its contract is loaded, and not before."""
    build_contract(tokenizer, recommended=Precision.FP16).save(tmp_path)
    settings = build_settings(model_repository=tmp_path)

    def start() -> Precision:
        contract = load_contract(settings.model_repository)
        app = create_app(settings, contract, tokenizer, FakeEngine(tokenizer))
        pipeline: AnswerPipeline = app.state.gateway.pipeline
        build_contract(tokenizer, recommended=Precision.FP32).save(tmp_path)
        return pipeline.choose_precision(None).answering

    assert start() is Precision.FP16
    assert start() is Precision.FP32


async def test_both_answers_in_int8_where_fp32_is_the_default(tokenizer):
    """FP32 takes no part in `both`, so it cannot give the answer."""
    engine = FakeEngine(
        tokenizer, phrases={Precision.INT8: (KEEPER,), Precision.FP16: ("1907",)}
    )
    async with open_service(
        tokenizer, engine=engine, recommended=Precision.FP32
    ) as one:
        body = (await one.ask(precision="both")).json()
    assert body["answer"] == body["comparison"]["int8"]["answer"]
    assert body["answer"] != body["comparison"]["fp16"]["answer"]


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


async def test_null_threshold_decides_how_soon_the_reader_abstains(tokenizer):
    """Far below 0 the null answer wins, far above it loses; scores stay as they were."""
    async with open_service(tokenizer) as one:
        usual = (await one.ask(allow_no_answer=True)).json()
        assert usual["answer"] is not None
        eager = (
            await one.ask(allow_no_answer=True, null_score_diff_threshold=-50.0)
        ).json()
        assert eager["answer"] is None
        ranked = (
            await one.ask(
                allow_no_answer=True, null_score_diff_threshold=-50.0, top_k=2
            )
        ).json()
        assert ranked["alternatives"][0] == usual["answer"]
        refused = await one.ask(null_score_diff_threshold=51)
        assert refused.status_code == 422


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


async def test_models_shows_the_verdict(tokenizer):
    """The build's paragraph is shown word for word, beside what it recommends."""
    verdict = "On <this> machine, INT8 is faster than FP16 at 1×128 (2.87×)."
    async with open_service(
        tokenizer, recommended=Precision.FP16, verdict=verdict
    ) as one:
        body = (await one.client.get("/v1/models")).json()
    assert body["verdict"] == verdict
    assert body["recommended"] == body["default_precision"] == "fp16"


def test_auto_without_int8_is_refused(tokenizer):
    """Where INT8 is not built and nothing recommended, `auto` stands for nothing."""
    contract = build_contract(tokenizer, [Precision.FP16])
    with pytest.raises(
        ConfigurationError,
        match=r"INT8QA_DEFAULT_PRECISION is auto, which stands for int8, .* fp16; set",
    ):
        create_app(build_settings(), contract, tokenizer, FakeEngine(tokenizer))


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


async def test_question_may_be_right_to_left(service: Service):
    """Hebrew and Arabic are answered like anything else."""
    response = await service.ask(
        question="מי היה השומר?", context=f"שלום {CONTEXT} مرحبا"
    )
    answer = response.json()["answer"]
    context = f"שלום {CONTEXT} مرحبا"
    assert context[answer["start"] : answer["end"]] == KEEPER
    assert QUESTION not in response.text
