"""Logs: one line per request, and never a text of a user."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
import structlog

from int8qa.errors import EngineOutputError
from int8qa.gateway.logs import configure_logging, describe_exception
from int8qa.reader.tokenizer import ReaderTokenizer, TextTokens
from tests.gateway.fakes import (
    TOKENIZER_JSON,
    FakeEngine,
    build_settings,
    open_service,
)

CANARY = "zanzibar-canary-4711"


@pytest.fixture
def lines(restored_logging: None) -> Iterator[io.StringIO]:
    """JSON logs into memory; the process's logging as it was afterwards."""
    stream = io.StringIO()
    configure_logging(
        build_settings(log_format="json", log_level="debug"), stream=stream
    )
    # The test's own client logs its addresses.
    logging.getLogger("httpx").setLevel("WARNING")
    yield stream
    logging.getLogger("httpx").setLevel("NOTSET")


def read_lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_one_line_per_request_with_its_figures(lines, tokenizer):
    """The line holds id, route, status, sizes and timings."""
    async with open_service(tokenizer) as one:
        await one.client.post(
            "/v1/answer",
            json={"question": "Who was the keeper?", "context": "Solveig Bråten"},
            headers={"X-Request-Id": "id-1"},
        )
    (line,) = [entry for entry in read_lines(lines) if entry["event"] == "request"]
    assert line["request_id"] == "id-1"
    assert line["route"] == "/v1/answer"
    assert (line["status"], line["outcome"]) == (200, "ok")
    assert (line["precision"], line["windows"]) == ("int8", 1)
    assert (line["question_chars"], line["context_chars"]) == (19, 14)
    for name in ("tokenize_ms", "queue_ms", "inference_ms", "decode_ms", "total_ms"):
        assert line[name] >= 0
    assert line["level"] == "info"


class LeakyTokenizer(ReaderTokenizer):
    """Quotes the text in its error, as a library may."""

    __slots__ = ()

    def encode(self, text: str, *, field: str = "text") -> TextTokens:
        raise ValueError(f"cannot encode {text}")


async def ask_everything(client: httpx.AsyncClient) -> list[httpx.Response]:
    question, context = f"What is {CANARY}?", f"Here is {CANARY}. " * 3
    texts = {"question": question, "context": context}
    surrogate = json.dumps({**texts, "context": context + "\ud800"})
    return [
        await client.post("/v1/answer", json=texts),
        await client.post("/v1/answer", json={**texts, "precision": "both"}),
        await client.post("/v1/answer", json={**texts, "precision": CANARY}),
        await client.post("/v1/answer", json={**texts, "top_k": CANARY}),
        await client.post("/v1/answer", json={**texts, "context": CANARY * 30_000}),
        await client.post("/v1/answer", json={"question": [question]}),
        await client.post("/v1/answer", content=surrogate),
        await client.post("/v1/answer", content=f'{{"question": "{CANARY}'),
        await client.post("/v1/answers", json={"items": [texts, CANARY]}),
        await client.post("/", json={"inputs": texts}),
        await client.post("/", json={"inputs": CANARY}),
        await client.post("/models/acme/minilm-test", json={"inputs": texts}),
        await client.get(f"/{CANARY}"),
    ]


@pytest.mark.parametrize("trouble", [None, "engine", "output", "tokenizer"])
async def test_no_text_reaches_logs_or_problems(
    lines, tokenizer, trouble, capfd, caplog
):
    """A canary in question and context turns up in no log and no problem."""
    engine = FakeEngine(tokenizer)
    if trouble == "engine":
        engine.fault = RuntimeError("no text here")
    if trouble == "output":
        engine.fault = EngineOutputError("bad")
    if trouble == "tokenizer":
        tokenizer = LeakyTokenizer.from_file(TOKENIZER_JSON)
    async with open_service(tokenizer, engine=engine) as one:
        responses = await ask_everything(one.client)
        metrics = await one.client.get("/metrics")
    assert len(read_lines(lines)) >= len(responses)
    captured = capfd.readouterr()
    for text in (
        lines.getvalue(),
        captured.out,
        captured.err,
        caplog.text,
        metrics.text,
        *(str(response.headers) for response in responses),
        *(r.text for r in responses if r.status_code >= 400),
        *(
            json.dumps(item.get("error"))
            for r in responses
            if r.request.url.path == "/v1/answers"
            for item in r.json()["items"]
        ),
    ):
        assert CANARY not in text
    if trouble == "tokenizer":
        failed = [entry for entry in read_lines(lines) if "failure" in entry]
        assert "builtins.ValueError" in failed[0]["failure"]
        assert any("in encode" in frame for frame in failed[0]["failure"])


def test_other_loggers_share_the_format(lines):
    """Uvicorn's lines and their exceptions go through the same processors."""
    logger = logging.getLogger("uvicorn.error")
    error = ValueError(CANARY)
    logger.error("Exception in ASGI application", exc_info=error)
    (line,) = read_lines(lines)
    assert line["event"] == "Exception in ASGI application"
    assert line["failure"][0] == "builtins.ValueError"
    assert CANARY not in lines.getvalue()


def test_console_format_is_readable(restored_logging):
    """Without a terminal the console format has no colour codes, one line each."""
    stream = io.StringIO()
    configure_logging(build_settings(log_format="console"), stream=stream)
    structlog.get_logger("x").info("request", route="/live", status=200)
    structlog.get_logger("x").debug("hidden")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "route=/live" in text


def test_descriptions_keep_our_own_messages():
    """Our errors hold no text of a user, so their messages are kept; others' are not."""
    error = EngineOutputError("the engine returned 3 rows for 4")
    error.__cause__ = KeyError(CANARY)
    description = describe_exception(error)
    assert description == [
        "int8qa.errors.EngineOutputError: the engine returned 3 rows for 4",
        "builtins.KeyError",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "as_json"), [(Terminal(), False), (None, True)])
def test_format_by_itself(restored_logging, stream, as_json):
    """People on a terminal get lines to read, everything else JSON."""
    stream = stream or io.StringIO()
    configure_logging(build_settings(), stream=stream)
    structlog.get_logger("x").info("request", status=200)
    assert stream.getvalue().startswith("{") is as_json


def test_a_stream_that_is_gone_fails_no_request(restored_logging):
    """Lines are lost, and nothing else."""
    stream = io.StringIO()
    configure_logging(build_settings(), stream=stream)
    logger = structlog.get_logger("x")
    stream.close()
    logger.info("request", status=200)
