"""A real headless Chromium, spoken to over its DevTools protocol.

In: what a person does: open, click, type, drop, resize. Out: what the page then holds,
and what the browser complains of. Needs an installed Chromium and a websocket client
(which uvicorn brings); downloads nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

WAIT_S = 60
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_KEYS = {
    "Enter": {
        "key": "Enter",
        "code": "Enter",
        "windowsVirtualKeyCode": 13,
        "text": "\r",
    },
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
    "Space": {"key": " ", "code": "Space", "windowsVirtualKeyCode": 32, "text": " "},
    "ArrowLeft": {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37},
}
CTRL = 2
SHIFT = 8


def find_chromium() -> str | None:
    """The path of an installed Chromium, None without one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def run_chromium(executable: str, profile: Path) -> Iterator[str]:
    """Start a browser with an empty profile; yield its websocket address."""
    process = subprocess.Popen(
        [
            executable,
            "--headless",
            "--no-sandbox",  # it only ever opens this test's pages, often as root
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--no-default-browser-check",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _await_address(process, profile / "DevToolsActivePort")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_address(process: subprocess.Popen[bytes], announcement: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = announcement.read_text().split() if announcement.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"Chromium did not start; its exit status: {process.poll()}")


@dataclass
class Page:
    """One tab, with cookies and caches of its own."""

    connection: ClientConnection
    session_id: str = ""
    requests: list[str] = field(default_factory=list)
    """URLs that the page asked for."""
    complaints: list[str] = field(default_factory=list)
    """Console errors, exceptions and policy violations."""
    refusals: list[str] = field(default_factory=list)
    """Responses of 400 and above, which the browser's console names too."""
    _waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    async def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self.session_id:
            message["sessionId"] = self.session_id
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        await self.connection.send(json.dumps(message))
        return await asyncio.wait_for(answer, WAIT_S)

    async def listen(self) -> None:
        """Take in what the browser says, until the connection closes."""
        async for raw in self.connection:
            message = json.loads(raw)
            if "id" in message:
                answer = self._waiting.pop(message["id"])
                if answer.done():
                    continue
                if "error" in message:
                    answer.set_exception(RuntimeError(message["error"]["message"]))
                else:
                    answer.set_result(message["result"])
            else:
                self._note(message["method"], message["params"])

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            self.complaints.append(text)
        elif method == "Runtime.consoleAPICalled" and event["type"] in (
            *("error", "warning", "assert"),
        ):
            self.complaints.append(str(event["args"]))
        elif method == "Audits.issueAdded" and "ContentSecurity" in str(event):
            self.complaints.append(str(event["issue"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            entry = event["entry"]
            found = self.refusals if entry["source"] == "network" else self.complaints
            found.append(entry["text"])

    async def open(self, url: str) -> None:
        """Go to an address, and wait until the page has put itself together."""
        await self.send("Page.navigate", url=url)
        await self.wait_for("document.querySelector('#examples button') !== null")

    async def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression, awaited if it is a promise."""
        answer = await self.send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Wait until an expression is true; fails with what the page complained of."""
        deadline = time.monotonic() + WAIT_S
        while not await self._holds(condition):
            if time.monotonic() > deadline:
                shown = await self.evaluate("document.body.innerText")
                raise AssertionError(
                    f"not within {WAIT_S} s: {condition}\n{self.complaints}\n{shown}"
                )
            await asyncio.sleep(0.02)

    async def _holds(self, condition: str) -> bool:
        try:
            return bool(await self.evaluate(f"Boolean({condition})"))
        except RuntimeError as error:
            if "navigated" not in str(error):
                raise
            return False  # asked of the page before

    async def text(self, selector: str) -> str:
        """What an element says."""
        found = await self.evaluate(
            f"document.querySelector({json.dumps(selector)})?.textContent"
        )
        assert found is not None, f"no {selector}"
        return str(found)

    async def texts(self, selector: str) -> list[str]:
        """What each of the elements says."""
        found: list[str] = await self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".map((node) => node.textContent)"
        )
        return found

    async def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        place = await self.evaluate(
            f"""(() => {{
              const node = document.querySelector({json.dumps(selector)});
              node.scrollIntoView({{block: "center", behavior: "instant"}});
              const box = node.getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    async def write(self, selector: str, text: str) -> None:
        """Replace what a field holds, by typing."""
        await self.evaluate(
            f"""(() => {{
              const field = document.querySelector({json.dumps(selector)});
              field.focus();
              field.select();
            }})()"""
        )
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        facts = _KEYS[key] if not modifiers else {**_KEYS[key], "text": ""}
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **facts
            )

    async def resize(self, width: int, height: int) -> None:
        """Give the page a window of that many CSS pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def prefer(self, **features: str) -> None:
        """Set media features: ``prefers_color_scheme="dark"``."""
        await self.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": name.replace("_", "-"), "value": value}
                for name, value in features.items()
            ],
        )

    async def photograph(self, *, whole: bool = False) -> bytes:
        """What can be seen, or the whole page, as PNG."""
        shot = await self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        return base64.b64decode(shot["data"])


@contextlib.asynccontextmanager
async def open_page(address: str) -> AsyncIterator[Page]:
    """A new tab in a context of its own, closed at the end."""
    async with connect(address, max_size=None) as connection:
        page = Page(connection)
        listening = asyncio.create_task(page.listen())
        try:
            context = await page.send("Target.createBrowserContext")
            context_id = context["browserContextId"]
            target = await page.send(
                "Target.createTarget", url="about:blank", browserContextId=context_id
            )
            attached = await page.send(
                "Target.attachToTarget", targetId=target["targetId"], flatten=True
            )
            page.session_id = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
                await page.send(f"{domain}.enable")
            await page.resize(1280, 900)
            yield page
            page.session_id = ""
            await page.send("Target.disposeBrowserContext", browserContextId=context_id)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
