"""The Hugging Face schema, as the real client speaks it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from int8qa.contract import Precision
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    Service,
    listen,
    open_service,
)

BODY = {"inputs": {"question": QUESTION, "context": CONTEXT}}


async def ask_hub(url: str, **parameters: Any) -> Any:
    client = InferenceClient(model=url)
    return await asyncio.to_thread(
        client.question_answering, question=QUESTION, context=CONTEXT, **parameters
    )


async def test_hub_client_works_unchanged(service: Service):
    """huggingface_hub's client gets an element for top_k 1 and a list for more."""
    async with listen(service) as url:
        one = await ask_hub(url)
        assert one.answer == KEEPER == CONTEXT[one.start : one.end]
        assert 0 < one.score <= 1
        three = await ask_hub(url, top_k=3)
        assert [type(element) for element in three] == [type(one)] * 3
        assert three[0].answer == KEEPER
        named = await ask_hub(f"{url}/models/acme/minilm-test")
        assert named.answer == KEEPER
        everything = await ask_hub(
            url,
            align_to_words=True,
            doc_stride=32,
            handle_impossible_answer=True,
            max_answer_len=20,
            max_question_len=32,
            max_seq_len=128,
            top_k=2,
        )
        assert everything[0].answer == KEEPER


async def test_hub_client_sees_our_message(service: Service):
    """A problem reaches the user of huggingface_hub with its words."""
    async with listen(service) as url:
        with pytest.raises(HfHubHTTPError, match="less than or equal to 100"):
            await ask_hub(url, top_k=1000)
        with pytest.raises(HfHubHTTPError, match="no such model"):
            await ask_hub(f"{url}/models/acme/other")


async def test_object_for_one_and_list_for_more(service: Service):
    """top_k 1 gives an object, anything else a list."""
    assert (await service.client.post("/", json=BODY)).json()["answer"] == KEEPER
    body = {**BODY, "parameters": {"top_k": 2}}
    assert len((await service.client.post("/", json=body)).json()) == 2


async def test_defaults_are_the_former_pipelines(tokenizer):
    """15 tokens at most, no null answer, half-window stride in small windows."""
    engine = FakeEngine(tokenizer, phrases={Precision.INT8: ("word " * 16,)})
    async with open_service(
        tokenizer, engine=engine, precisions=[Precision.INT8]
    ) as one:
        inputs = {"question": QUESTION, "context": "before " + "word " * 16 + "after"}
        answer = (await one.client.post("/", json={"inputs": inputs})).json()
        assert len(answer["answer"].split()) <= 15
        longer = {"inputs": inputs, "parameters": {"max_answer_len": 16}}
        answer = (await one.client.post("/", json=longer)).json()
        assert len(answer["answer"].split()) == 16


async def test_impossible_answer_is_empty_at_zero(tokenizer):
    """The null answer comes as the former pipeline gave it."""
    engine = FakeEngine(tokenizer, phrases=dict.fromkeys(Precision, ()))
    async with open_service(tokenizer, engine=engine) as one:
        body = {**BODY, "parameters": {"handle_impossible_answer": True}}
        answer = (await one.client.post("/", json=body)).json()
    assert answer["answer"] == ""
    assert (answer["start"], answer["end"]) == (0, 0)
    assert answer["score"] > 0


@pytest.mark.parametrize(
    ("model_id", "precision"),
    [
        ("acme/minilm-test", Precision.INT8),
        ("minilm-test", Precision.INT8),
        ("qa_fp16", Precision.FP16),
        ("fp32", Precision.FP32),
    ],
)
async def test_model_ids(service: Service, model_id: str, precision: Precision):
    """Checkpoint, its last part, and the names of models and precisions are known."""
    response = await service.client.post(f"/models/{model_id}", json=BODY)
    assert response.status_code == 200
    assert service.engine.calls[0][0] is precision


async def test_unknown_model_is_a_404_that_names_what_is_served(service: Service):
    """Another model's id is refused, not answered by ours."""
    response = await service.client.post("/models/deepset/roberta", json=BODY)
    assert response.status_code == 404
    assert "acme/minilm-test" in response.json()["detail"]
    assert response.json()["type"].endswith("unknown-model")


async def test_precision_by_query_or_header(service: Service):
    """The query parameter wins over the header, either over the default."""
    for arguments in (
        {"params": {"precision": "fp16"}, "headers": {"X-Precision": "fp32"}},
        {"headers": {"X-Precision": "fp16"}},
    ):
        response = await service.client.post("/", json=BODY, **arguments)
        assert response.status_code == 200
        assert service.engine.calls.pop()[0] is Precision.FP16
    response = await service.client.post("/?precision=int4", json=BODY)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "precision"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": {"question": "a"}}, "inputs.context"),
        ({"inputs": {"question": " ", "context": "b"}}, "inputs.question"),
        ({"inputs": {"question": "a", "context": ""}}, "inputs.context"),
        ({**BODY, "parameters": {"top_k": "1"}}, "parameters.top_k"),
        ({**BODY, "parameters": {"max_seq_len": 2}}, "parameters.max_seq_len"),
        ({**BODY, "parameters": {"surprise": 2}}, "parameters.surprise"),
        (
            {
                "inputs": {"question": "a b c", "context": "sea " * 400},
                "parameters": {"max_seq_len": 64, "doc_stride": 64},
            },
            "parameters.doc_stride",
        ),
        ({"inputs": "text"}, "inputs"),
    ],
)
async def test_faults_are_named_in_hugging_face_terms(
    service: Service, body: dict, field: str
):
    """Fields are named as this schema names them."""
    response = await service.client.post("/", json=body)
    assert response.status_code == 422, response.text
    assert field in [error["field"] for error in response.json()["errors"]]


async def test_nulls_and_options_are_accepted(service: Service):
    """Null parameters mean the default; old clients' options are ignored."""
    body = {
        **BODY,
        "parameters": {"top_k": None, "align_to_words": None},
        "options": {"wait_for_model": True},
    }
    assert (await service.client.post("/", json=body)).json()["answer"] == KEEPER
