"""A browser for the session, a gateway and a tab for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from int8qa.contract import Precision
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    KEEPER,
    TOKENIZER_JSON,
    FakeEngine,
    Service,
    listen,
    open_service,
)
from tests.page.chromium import Page, find_chromium, open_page, run_chromium


@pytest.fixture(scope="session")
def tokenizer() -> ReaderTokenizer:
    return ReaderTokenizer.from_file(TOKENIZER_JSON)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The websocket address of a running Chromium."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on PATH; install it: apt-get install chromium")
    profile: Path = tmp_path_factory.mktemp("chromium")
    with run_chromium(executable, profile) as address:
        yield address


@pytest.fixture
def engine(tokenizer: ReaderTokenizer) -> FakeEngine:
    """INT8 and FP16 find different words, so that their places can be told apart."""
    return FakeEngine(
        tokenizer,
        phrases={
            Precision.INT8: (KEEPER, "Ingrid"),
            Precision.FP16: ("1907", "Ingrid"),
            Precision.FP32: (KEEPER,),
        },
    )


@pytest_asyncio.fixture
async def gateway(
    tokenizer: ReaderTokenizer, engine: FakeEngine
) -> AsyncIterator[Service]:
    """A gateway around the engine, which compares nothing by itself."""
    async with open_service(
        tokenizer,
        engine=engine,
        recommended=Precision.INT8,
        verdict="INT8 <b>wins</b> here.",
        comparison={"fraction": 0.0},
        limits={"max_context_chars": 5000},
    ) as service:
        yield service


@pytest_asyncio.fixture
async def url(gateway: Service) -> AsyncIterator[str]:
    """Where the gateway listens."""
    async with listen(gateway) as address:
        yield f"{address}/"


@pytest_asyncio.fixture
async def page(browser: str, url: str) -> AsyncIterator[Page]:
    """The page, open; it may never complain, nor speak to anybody else."""
    async with open_page(browser) as tab:
        await tab.open(url)
        yield tab
        assert tab.complaints == []
        foreign = [one for one in tab.requests if not one.startswith(url)]
        assert foreign == []
