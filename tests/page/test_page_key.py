"""The page of a gateway that asks for API keys."""

from __future__ import annotations

from pathlib import Path

from int8qa.gateway.key_file import build_key, generate_key, hash_key
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    CONTEXT,
    KEEPER,
    QUESTION,
    FakeEngine,
    listen,
    open_service,
)
from tests.page.chromium import open_page

SHOWN = "!document.querySelector('#key-form').hidden"
STORED = "localStorage.length + sessionStorage.length + document.cookie.length"


async def test_key_is_asked_for_used_and_kept_nowhere(
    browser: str, tokenizer: ReaderTokenizer, engine: FakeEngine, tmp_path: Path
):
    """A field appears, the key in it answers questions, and a reload forgets it."""
    key = generate_key()
    path = tmp_path / "keys"
    path.write_text(build_key("alice", hash_key(key) or b"").format_line(), "utf-8")
    async with (
        open_service(
            tokenizer, engine=engine, access={"keys_file": str(path)}
        ) as service,
        listen(service) as url,
        open_page(browser) as page,
    ):
        await page.open(f"{url}/")
        await page.wait_for(SHOWN)
        hidden = "[...document.querySelectorAll('nav a')].filter(a => a.hidden).length"
        assert await page.evaluate(hidden) == 3

        await page.write("#key", "hunter2")
        await page.press("Enter")
        assert await page.evaluate(SHOWN), "what is no key is not sent"

        await page.write("#key", generate_key())
        await page.press("Enter")
        await page.wait_for("document.querySelector('#key').value === ''")
        await page.wait_for(SHOWN)

        await page.write("#key", key)
        await page.press("Enter")
        await page.wait_for(
            "document.querySelector('#service-state').dataset.state === 'ready'"
        )
        assert not await page.evaluate(SHOWN)
        await page.write("#context", CONTEXT)
        await page.write("#question", QUESTION)
        await page.click("#ask")
        await page.wait_for("!document.querySelector('#result').hidden")
        assert (await page.texts(".answer.best .words"))[0] == KEEPER
        assert await page.evaluate(STORED) == 0
        assert key not in str(await page.evaluate("document.documentElement.outerHTML"))
        assert await page.evaluate("document.querySelector('#key').value") == ""

        await page.open(f"{url}/")
        await page.wait_for(SHOWN)


async def test_no_field_without_need(browser: str, url: str):
    """Where no key is asked for there is none."""
    async with open_page(browser) as page:
        await page.open(url)
        await page.wait_for(
            "document.querySelector('#service-state').dataset.state === 'ready'"
        )
        assert not await page.evaluate(SHOWN)


async def test_docs_page_works_under_its_policy(browser: str, url: str):
    """Swagger UI draws every operation, and the browser has nothing to complain of."""
    async with open_page(browser) as page:
        await page.open(url)
        await page.evaluate("void (location.href = 'docs')")
        await page.wait_for("document.querySelectorAll('.opblock').length > 8")
        assert page.complaints == []
