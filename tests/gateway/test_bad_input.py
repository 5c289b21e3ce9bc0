"""Whatever is sent: a right answer, or a 4xx problem that names field and limit."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from int8qa.gateway import schemas
from int8qa.gateway.bodies import MAX_MEMBERS, validate_model
from int8qa.gateway.problems import MAX_FAULTS, RequestProblemError
from tests.gateway.fakes import CONTEXT, KEEPER, QUESTION, Service, open_service

GOOD = {"question": QUESTION, "context": CONTEXT}


def check_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    schemas.ProblemDetails.model_validate(body)
    assert body["status"] == status
    assert body["instance"] == response.headers["x-request-id"]
    return body


@pytest.mark.parametrize("field", ["question", "context"])
@pytest.mark.parametrize("text", ["", " ", "\t\r\n  \u3000"])
async def test_blank_texts_are_invalid(service: Service, field: str, text: str):
    """Nothing but white space is a 422 that names the field."""
    body = check_problem(await service.ask(**{field: text}), 422)
    assert body["errors"][0]["field"] == field


@pytest.mark.parametrize("field", ["question", "context"])
@pytest.mark.parametrize("text", ["\x00\x00", "\u200b\u200d", "\x7f"])
async def test_texts_without_tokens_are_invalid(
    service: Service, field: str, text: str
):
    """Characters that the model cannot see are no text either."""
    body = check_problem(await service.ask(**{field: text}), 422)
    assert body["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 10_000}, "top_k"),
        ({"top_k": "3"}, "top_k"),
        ({"top_k": 3.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"question": 3}, "question"),
        ({"question": None}, "question"),
        ({"context": ["a"]}, "context"),
        ({"context": {"a": 1}}, "context"),
        ({"max_answer_tokens": 0}, "max_answer_tokens"),
        ({"max_answer_tokens": 10**30}, "max_answer_tokens"),
        ({"doc_stride": -1}, "doc_stride"),
        ({"doc_stride": 10_000}, "doc_stride"),
        ({"allow_no_answer": "yes"}, "allow_no_answer"),
        ({"allow_no_answer": 1}, "allow_no_answer"),
        ({"precision": "int4"}, "precision"),
        ({"precision": ""}, "precision"),
        ({"precision": "INT8"}, "precision"),
        ({"precision": 8}, "precision"),
        ({"presicion": "int8"}, "presicion"),
    ],
)
async def test_wrong_fields_are_named(service: Service, change: dict, field: str):
    """Wrong types, values out of range and unknown fields name the field."""
    body = check_problem(await service.ask(**change), 422)
    assert [error["field"] for error in body["errors"]] == [field]


async def test_limits_are_in_the_messages(service: Service):
    """The message of a value out of range holds the limit."""
    assert "100" in check_problem(await service.ask(top_k=10_000), 422)["detail"]
    allowed = check_problem(await service.ask(precision="int4"), 422)["detail"]
    assert "int8, fp16, fp32, both" in allowed
    unknown = check_problem(await service.ask(topk=1), 422)["detail"]
    assert "top_k" in unknown


async def test_every_fault_is_reported_at_once(service: Service):
    """Two bad fields make two errors."""
    response = await service.client.post("/v1/answer", json={"context": 1, "x": 2})
    body = check_problem(response, 422)
    assert {error["field"] for error in body["errors"]} == {"question", "context", "x"}


@pytest.mark.parametrize("where", ["body", "inputs", "parameters"])
async def test_many_unknown_fields_are_one_fault(service: Service, where: str):
    """A body full of unknown fields is counted, not listed: the answer stays small."""
    junk = {f"{number:x}": 0 for number in range(250_000)}
    inputs = {"question": QUESTION, "context": CONTEXT}
    bodies = {
        "body": junk,
        "inputs": {"inputs": {**inputs, **junk}},
        "parameters": {"inputs": inputs, "parameters": junk},
    }
    for path in ("/v1/answer", "/") if where == "body" else ("/",):
        response = await service.client.post(path, json=bodies[where])
        body = check_problem(response, 422)
        assert [error["field"] for error in body["errors"]] == [where]
        assert str(MAX_MEMBERS) in body["detail"]
        assert len(response.content) < 1_000


def test_pydantic_never_sees_too_many_fields(monkeypatch):
    """The work for a hostile body is bounded: refused before it is validated."""

    def fail(_value: object) -> None:
        pytest.fail("validated")

    monkeypatch.setattr(schemas.AnswerRequest, "model_validate", fail)
    with pytest.raises(RequestProblemError) as caught:
        validate_model(dict.fromkeys(map(str, range(10**5))), schemas.AnswerRequest)
    assert len(caught.value.faults) == 1


async def test_listed_faults_are_few_and_short(service: Service):
    """Up to MAX_FAULTS are listed, all are counted, long names are cut."""
    fields = {f"{number}{'x' * 10_000}": 0 for number in range(40)}
    response = await service.ask(**fields)
    body = check_problem(response, 422)
    assert len(body["errors"]) == MAX_FAULTS
    assert "and 39 more" in body["detail"]
    assert all(len(error["field"]) < 100 for error in body["errors"])
    assert len(response.content) < 5_000


async def test_hostile_items_are_answered_briefly(service: Service):
    """Every item of a batch has the same limits."""
    hostile = {f"{number}{'y' * 50}": 0 for number in range(40)}
    huge = dict.fromkeys(map(str, range(10_000)), 0)
    items = [GOOD, *[hostile] * 100, huge]
    response = await service.client.post("/v1/answers", json={"items": items})
    good, *bad = response.json()["items"]
    assert good["result"]["answer"]["text"] == KEEPER
    assert {item["status"] for item in bad} == {422}
    assert [len(item["error"]["errors"]) for item in bad] == [MAX_FAULTS] * 100 + [1]
    assert bad[-1]["error"]["errors"][0]["field"] == "items.101"
    assert len(response.content) < 5_000 * len(items)


@pytest.mark.parametrize("field", ["question", "context"])
@pytest.mark.parametrize("path", ["/v1/answer", "/"])
async def test_lone_surrogates_are_invalid(service: Service, field: str, path: str):
    """Half a surrogate pair in a JSON escape is a 422 that names the field."""
    texts = {**GOOD, field: "keeper \ud83d of"}
    body = json.dumps(texts if path != "/" else {"inputs": texts})
    assert "\\ud83d" in body
    response = await service.client.post(
        path, content=body, headers={"Content-Type": "application/json"}
    )
    problem = check_problem(response, 422)
    assert problem["errors"][0]["field"].split(".")[-1] == field
    assert "surrogate" in problem["errors"][0]["message"]


async def test_lone_surrogate_as_a_field_name_is_invalid(service: Service):
    """Even a field's name that is no Unicode comes back as a readable problem."""
    body = json.dumps({**GOOD, "\ud800": 1})
    response = await service.client.post("/v1/answer", content=body)
    check_problem(response, 422)


@pytest.mark.parametrize(
    "context",
    [
        f"\x00 {CONTEXT}",
        CONTEXT.replace("Solveig", "Solveig\u200f"),
        "👨‍👩‍👧‍👦 " * 20 + CONTEXT,
        CONTEXT.replace(" ", "\r\n"),
        "e\u0301" * 30 + " " + CONTEXT,
    ],
    ids=["nul", "direction mark", "emoji", "crlf", "combining"],
)
async def test_odd_characters_keep_offsets_right(service: Service, context: str):
    """NUL, direction marks, joined emoji, CRLF and combining marks shift nothing."""
    response = await service.ask(context=context)
    assert response.status_code == 200, response.text
    answer = response.json()["answer"]
    assert context[answer["start"] : answer["end"]] == answer["text"]
    assert answer["text"].startswith("Solveig")
    assert answer["text"].endswith("Bråten")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"question": "a", "context": "b",}',
        b"\xff\xfe",
        b'{"question": "\xe9"}',
        b'{"question": "a\x00"}',
        b'{"top_k": NaN}',
        b'{"top_k": -Infinity}',
        b'{"question": "a", "question": "b"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"top_k": ' + b"9" * 10_000 + b"}",
    ],
    ids=[
        *("empty", "open", "word", "comma", "utf-16", "latin-1", "raw nul", "nan"),
        *("infinity", "twice", "deep lists", "deep objects", "digits"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/answer", "/v1/answers", "/"])
async def test_malformed_bodies_are_refused(service: Service, path: str, body: bytes):
    """What is no JSON object in UTF-8 is a 400, whatever the route."""
    response = await service.client.post(
        path, content=body, headers={"Content-Type": "application/json"}
    )
    check_problem(response, 400)


@pytest.mark.parametrize("body", [b"[]", b"3", b'"text"', b"null", b"true"])
async def test_other_json_is_invalid(service: Service, body: bytes):
    """JSON that is no object is a 422 about the body."""
    response = await service.client.post("/v1/answer", content=body)
    problem = check_problem(response, 422)
    assert problem["errors"][0]["field"] == "body"


async def test_byte_order_mark_is_skipped(service: Service):
    """A byte order mark before the JSON does no harm."""
    body = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
    response = await service.client.post("/v1/answer", content=body)
    assert response.json()["answer"]["text"] == KEEPER


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.acme+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_media_type_must_be_json(
    service: Service, content_type: str, status: int
):
    """JSON types pass, everything a browser sends unasked does not."""
    response = await service.client.post(
        "/v1/answer", json=GOOD, headers={"Content-Type": content_type}
    )
    assert response.status_code == status


async def test_megabyte_of_context_is_too_large(service: Service):
    """1 MB of context is over the limit of characters, and the problem says both."""
    body = check_problem(await service.ask(context="word " * 200_000), 413)
    assert body["errors"][0]["field"] == "context"
    assert "1000000" in body["detail"]
    assert "500000" in body["detail"]


async def test_megabyte_of_context_is_answered_where_allowed(tokenizer):
    """With the limits raised the same 1 MB is answered, with the right offsets."""
    context = "word " * 200_000 + CONTEXT
    async with open_service(
        tokenizer,
        limits={"max_context_chars": 2_000_000, "max_windows": 5_000},
        batcher={"max_queue_tokens": 10_000_000},
    ) as one:
        body = (await one.ask(context=context)).json()
    answer = body["answer"]
    assert context[answer["start"] : answer["end"]] == KEEPER


async def test_long_question_is_too_large(service: Service):
    """A question over the limit of characters names itself and the limit."""
    body = check_problem(await service.ask(question="why " * 600), 413)
    assert body["errors"][0]["field"] == "question"
    assert "2000" in body["detail"]


async def test_question_without_room_is_too_large(service: Service):
    """A question that leaves no room in a window is refused, not cut."""
    body = check_problem(await service.ask(question="a " * 500), 413)
    assert body["errors"][0]["field"] == "question"


async def test_stride_without_room_is_invalid(service: Service):
    """A stride as long as the room for context is refused with that room."""
    body = check_problem(await service.ask(context="sea " * 600, doc_stride=384), 422)
    assert body["errors"][0]["field"] == "doc_stride"


async def test_too_many_windows_are_refused_before_they_are_made(service: Service):
    """A stride just below the room would make a window per token; 413 instead."""
    length = 100_000
    body = check_problem(
        await service.ask(context="sea " * length, doc_stride=374), 413
    )
    assert body["errors"][0]["field"] == "context"
    assert "allowed are 512" in body["detail"]
    assert not service.engine.calls


async def test_five_megabyte_body_is_too_large(service: Service):
    """A 5 MB body is a 413 that names the body and its limit."""
    response = await service.client.post("/v1/answer", content=b"x" * 5_000_000)
    body = check_problem(response, 413)
    assert body["errors"][0]["field"] == "body"
    assert str(4 * 2**20) in body["detail"]


async def test_undeclared_large_body_is_cut_off_while_it_streams(tokenizer):
    """Without a Content-Length the limit is counted, and reading stops there."""
    async with open_service(tokenizer, limits={"max_body_bytes": 10_000}) as one:
        chunks = [b"x" * 1000] * 100

        async def receive() -> dict[str, object]:
            body = chunks.pop()
            return {"type": "http.request", "body": body, "more_body": bool(chunks)}

        sent = []

        async def send(message: dict[str, Any]) -> None:
            sent.append((len(chunks), message))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/answer", "headers": [],
            "query_string": b"", "http_version": "1.1", "scheme": "http",
            "server": ("gateway", 80), "client": ("test", 1), "root_path": "",
            "raw_path": b"/v1/answer", "asgi": {"version": "3.0"},
        }  # fmt: skip
        await one.app(scope, receive, send)
    (unread, head), (unread_at_body, _), *_ = sent
    assert head["status"] == 413
    # Answered after eleven chunks; the rest was read to be thrown away.
    assert unread == unread_at_body == 100 - 11
    assert not chunks


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/answer", 405),
        ("DELETE", "/", 405),
        ("POST", "/v1/answer/", 404),
        ("POST", "/metrics", 405),
    ],
)
async def test_wrong_paths_and_methods_are_problems(
    service: Service, method: str, path: str, status: int
):
    """Routing failures are problem JSON too."""
    response = await service.client.request(method, path)
    check_problem(response, status)
    if status == 405:
        assert response.headers["allow"]


async def test_messages_never_quote_values(service: Service):
    """No validation message echoes what was sent."""
    canary = "canary-7f3a"
    for change in (
        {"top_k": canary},
        {"precision": canary},
        {"allow_no_answer": canary},
        {"question": canary + "\ud800"},
        {"question": [canary]},
        {"context": {"x": canary}},
    ):
        body = json.dumps({**GOOD, **change})
        response = await service.client.post("/v1/answer", content=body)
        assert response.status_code == 422
        assert canary not in response.text
