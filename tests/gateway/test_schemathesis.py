"""Requests made from the OpenAPI document: no 5xx, and no response it does not know."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import TOKENIZER_JSON, listen, open_service

EXAMPLES = 8
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server before the fake engine, on a loop of its own."""
    ready, stop = threading.Event(), asyncio.Event()
    found: list[str] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
        async with open_service(tokenizer) as one, listen(one) as address:
            found.append(address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield found[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(30)


def give_time(case: schemathesis.Case) -> None:
    """Who allows a microsecond asks for a 504, and is right; here nobody does."""
    for name in case.headers or ():
        if name.lower() == "x-request-timeout":
            with contextlib.suppress(ValueError):
                if float(case.headers[name]) > 0:
                    case.headers[name] = "60"


# The service's thread draws its own jitter while Hypothesis looks at the same state.
@pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_document_and_service_agree(url: str, mode: GenerationMode):
    """Every operation of the document, with requests that keep to it and that do not."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 8
    for operation in operations:

        @seed(20261123)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case) -> None:
            give_time(case)
            case.call_and_validate(checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
            ask()
