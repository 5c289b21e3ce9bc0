"""A rebuilt model in all gateway processes at once, or in none.

In: the word to reload, a model repository, the processes' votes. Out: a decision that
all of them get, and one of them that unloads the former build when the last has drained
it. Knows no model and no request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from int8qa.contract import TOKENIZER_FILENAME, load_contract
from int8qa.errors import ContractError, Int8qaError
from int8qa.gateway import channel as messages
from int8qa.gateway.channel import Build
from int8qa.gateway.history import History
from int8qa.gateway.life import Life
from int8qa.gateway.logs import get_logger
from int8qa.settings import Settings

_RETRY_S = 30.0
"""Between rounds that no operator asked for: each worker sees what Triton lacks."""
_VOTE_S = 600.0
"""For a worker to have a build loaded."""


def read_build(repository: Path) -> Build:
    """What a model repository holds now.

    Raises:
        ContractError: it is incomplete.
    """
    contract = load_contract(repository)
    try:
        return Build(contract, (repository / TOKENIZER_FILENAME).read_bytes())
    except OSError as error:
        raise ContractError(
            f"{repository} has no {TOKENIZER_FILENAME}: {error.strerror}. Run `int8qa "
            f"build`"
        ) from error


class Rounds:
    """The build that serves, its history, and how another takes its place."""

    def __init__(
        self,
        settings: Settings,
        build: Build,
        list_lives: Callable[[], Iterable[Life]],
    ) -> None:
        self.build = build
        self.history = History(settings.comparison)
        self.changing = asyncio.Lock()
        """Held while a build changes: no worker begins with the wrong one meanwhile."""
        self._settings = settings
        self._list_lives = list_lives
        self._running: asyncio.Task[None] | None = None
        self._again = False
        self._ended_s = float("-inf")
        self._draining: dict[str, tuple[set[Life], list[Life]]] = {}
        """Of each former build: whose requests are still on it, and whose not."""
        self._log = get_logger()

    @property
    def running(self) -> bool:
        """Whether a round goes on."""
        return self._running is not None and not self._running.done()

    def request(self) -> None:
        """Reload; where a round goes on, once more after it."""
        self._again = True
        if not self.running:
            self._running = asyncio.create_task(self._run(), name="rounds")

    async def close(self) -> None:
        """Decide nothing any more."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def hear(self, life: Life, message: object) -> None:
        """Take a worker's word on it."""
        match message:
            case messages.WantReload():
                if not self.running and time.monotonic() - self._ended_s > _RETRY_S:
                    self.request()
            case messages.Vote():
                messages.settle(life.vote, message)
            case messages.Drained(build_id):
                self._note_drained(build_id, life, lives=True)

    def forget(self, life: Life) -> None:
        """A worker is gone: nobody waits for it."""
        messages.settle(life.vote, None)
        for build_id in list(self._draining):
            self._note_drained(build_id, life, lives=False)

    async def _run(self) -> None:
        while self._again:
            self._again = False
            async with self.changing:
                try:
                    await self._change_over()
                except Int8qaError as error:
                    self._log.error(
                        "reload_failed",
                        reason=str(error),
                        serving=self.build.contract.build_id,
                    )
            self._ended_s = time.monotonic()

    async def _change_over(self) -> None:
        """Have each prepare what is there now; then all change over, or none.

        One after the other: the first has Triton load the models, the others find them.
        """
        build = await asyncio.to_thread(read_build, self._settings.model_repository)
        prepared: dict[Life, messages.Vote] = {}
        refusal = None
        for life in list(self._list_lives()):
            vote = await self._ask_vote(life, build)
            if vote is None:  # gone; who takes its place begins with what is decided
                continue
            if vote.refusal is not None:
                refusal = f"worker {life.slot}: {vote.refusal}"
                break
            prepared[life] = vote
        if refusal is None:
            self._adopt(build, prepared)
        decision = messages.Decide(
            refusal, self.history.list(), self.history.report_guard()
        )
        for life in prepared:
            life.send(decision)
        if refusal is not None:
            raise ContractError(refusal)

    async def _ask_vote(self, life: Life, build: Build) -> messages.Vote | None:
        if life not in self._list_lives():
            return None
        life.vote = asyncio.get_running_loop().create_future()
        life.send(messages.Propose(build))
        await asyncio.wait({life.vote}, timeout=_VOTE_S)
        if not life.vote.done():
            return messages.Vote(f"it did not answer within {_VOTE_S:g} s")
        return life.vote.result()

    def _adopt(self, build: Build, prepared: dict[Life, messages.Vote]) -> None:
        former = self.build.contract.build_id
        self.build = build
        if build.contract.build_id != former:
            self.history = History(self._settings.comparison)
        changing = {life for life in self._list_lives() if life in prepared}
        changing = {life for life in changing if prepared[life].changes_over}
        if changing:
            self._draining[former] = changing, []

    def _note_drained(self, build_id: str, life: Life, *, lives: bool) -> None:
        """Once the last has drained a build, have one unload it: nobody needs it."""
        if build_id not in self._draining:
            return
        waited_for, drained = self._draining[build_id]
        waited_for.discard(life)
        if lives:
            drained.append(life)
        elif life in drained:
            drained.remove(life)
        if waited_for:
            return
        del self._draining[build_id]
        for place, one in enumerate(drained):
            one.send(messages.Dismiss(build_id, unload=place == 0))
