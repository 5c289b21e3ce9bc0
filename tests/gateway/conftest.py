"""Fixtures of the gateway's tests: the shipped tokenizer and a running service."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import structlog

from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import TOKENIZER_JSON, Service, open_service


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """The process's logging as it was, after a test that configures it."""
    root = logging.getLogger()
    before = root.handlers, root.level
    yield
    root.handlers, root.level = before[0], before[1]
    logging.getLogger("uvicorn.access").disabled = False
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def tokenizer() -> ReaderTokenizer:
    return ReaderTokenizer.from_file(TOKENIZER_JSON)


@pytest_asyncio.fixture
async def service(tokenizer: ReaderTokenizer) -> AsyncIterator[Service]:
    async with open_service(tokenizer) as running:
        yield running
