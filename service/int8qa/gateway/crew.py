"""What one of several gateway processes has in common with the others.

In: what happens here; what the parent passes on. Out: the same comparison, the same
guard and the same limits of keys in each process, the metrics of all, and a build that
changes in all or none. Everything goes through the parent, in one order for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from int8qa.contract import TOKENIZER_FILENAME, Contract
from int8qa.errors import ContractError, Int8qaError
from int8qa.gateway import channel as messages
from int8qa.gateway.channel import Boot, Build, Channel, KeyUse, settle
from int8qa.gateway.comparison import Observation
from int8qa.gateway.load import Load
from int8qa.gateway.logs import get_logger
from int8qa.gateway.merging import ProcessState
from int8qa.gateway.reload import Consent, Gateway, Reloader
from int8qa.gateway.waiting import finish_within
from int8qa.reader.tokenizer import ReaderTokenizer

if TYPE_CHECKING:
    from int8qa.gateway.access import KeyRing

TELL_INTERVAL_S = 0.05
"""How long what happens here is collected before the others are told."""
_GATHER_S = 3.0
"""Prometheus' usual patience is more, and the parent waits a second for each worker."""
_SETTLE_S = 5.0
"""How long a replacement holds back for its models: those before it serve meanwhile."""


class Crew(Consent):
    """This process's end of the channel to the parent."""

    def __init__(self, channel: Channel, boot: Boot, load: Load) -> None:
        self.load = load
        self.leads = boot.slot == 0
        """Whether this process counts what all of them do."""
        self._channel = channel
        self._boot = boot
        self._build = boot.build
        self._seen: list[Observation] = []
        self._seen_of = ""
        self._uses: dict[str, tuple[int, int]] = {}
        self._telling: asyncio.TimerHandle | None = None
        self._tickets = itertools.count(1)
        self._gatherings: dict[int, asyncio.Future[tuple[bytes, ...]]] = {}
        self._asked_to_vote = False
        self._prepared: Gateway | None = None
        self._decision: asyncio.Future[str | None] | None = None
        self._dismissals: dict[str, asyncio.Future[bool]] = {}
        self._gateway: Gateway
        self._reloader: Reloader
        self._keys: KeyRing | None

    def attach(
        self, gateway: Gateway, reloader: Reloader, keys: KeyRing | None
    ) -> None:
        """Name who is to learn of the others; first of all, what was before."""
        self._gateway, self._reloader, self._keys = gateway, reloader, keys
        gateway.pipeline.restore(self._boot.observations, self._boot.guard)

    async def settle(self) -> None:
        """Wait for the models, if others serve meanwhile; then take connections."""
        if self._boot.replaces:
            ready = self._gateway.pipeline.watch.wait_ready()
            with contextlib.suppress(asyncio.TimeoutError):
                await finish_within(ready, _SETTLE_S)
        self._channel.send(messages.Started())

    async def listen(self) -> None:
        """Do what the parent says; once it is gone, have this process end in order."""
        while (message := await self._channel.receive()) is not None:
            self._hear(message)
        get_logger().error("parent_gone")
        os.kill(os.getpid(), signal.SIGTERM)

    # What happens here.

    def share(self, build_id: str, seen: Observation) -> None:
        """Have all processes observe it, this one too, in one order."""
        if build_id != self._seen_of:
            self._tell()
        self._seen_of = build_id
        self._seen.append(seen)
        self._tell_soon()

    def tell_key_use(self, use: KeyUse) -> None:
        """Have the others charge a key with what it did here."""
        before, _ = self._uses.get(use.name, (0, 0))
        self._uses[use.name] = before + use.taken, use.in_flight
        self._tell_soon()

    def _tell_soon(self) -> None:
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_INTERVAL_S, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self._seen:
            self._channel.send(messages.Observed(self._seen_of, tuple(self._seen)))
            self._seen.clear()
        for name, (taken, in_flight) in self._uses.items():
            self._channel.send(KeyUse(self._boot.slot, name, taken, in_flight))
        self._uses.clear()

    # The state of all.

    def describe(self) -> bytes:
        """This process's own state."""
        state = ProcessState(
            self._gateway.contract.build_id,
            list(self._gateway.telemetry.registry.collect()),
            self._gateway.pipeline.shadow.report(),
        )
        return pickle.dumps(state, pickle.HIGHEST_PROTOCOL)

    async def gather(self) -> list[ProcessState]:
        """The states of all processes, and of those that are gone.

        Raises:
            Int8qaError: the parent does not answer.
        """
        ticket = next(self._tickets)
        answer = asyncio.get_running_loop().create_future()
        self._gatherings[ticket] = answer
        self._channel.send(messages.Gather(ticket))
        try:
            states = await finish_within(answer, _GATHER_S)
        except asyncio.TimeoutError:
            raise Int8qaError(
                f"the gateway's parent process did not answer within {_GATHER_S:g} s; "
                f"restart the gateway if it stays so"
            ) from None
        finally:
            del self._gatherings[ticket]
        return [pickle.loads(state) for state in states]  # noqa: S301 - from ourselves

    async def leave(self) -> None:
        """Say the last: what was counted here stays counted."""
        self._tell()
        self._channel.send(messages.Described(self.describe()))
        await self._channel.close()

    # Reloads.

    def want_reload(self, begin: Callable[[], None]) -> None:
        """Ask the parent, which proposes a build to one after the other."""
        del begin
        self._channel.send(messages.WantReload())

    async def read_build(self, repository: Path) -> tuple[Contract, ReaderTokenizer]:
        """The build that was proposed: the same for all, whatever is there by now."""
        build = self._build
        source = str(repository / TOKENIZER_FILENAME)
        tokenizer = await asyncio.to_thread(
            ReaderTokenizer.from_bytes, build.tokenizer_json, source
        )
        return build.contract, tokenizer

    async def agree(self, gateway: Gateway | None) -> None:
        """Vote for it, and wait for the others."""
        self._prepared = gateway
        self._decision = asyncio.get_running_loop().create_future()
        self._asked_to_vote = False
        self._channel.send(messages.Vote(changes_over=gateway is not None))
        refusal = await self._decision
        if refusal is not None:
            raise ContractError(refusal)

    def refuse(self, reason: str) -> None:
        """Vote against it, if that is still asked."""
        if self._asked_to_vote:
            self._asked_to_vote = False
            self._channel.send(messages.Vote(reason))

    async def may_unload(self, build_id: str) -> bool:
        """Wait for the last of all: whoever unloads takes the models from everybody."""
        dismissal: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._dismissals[build_id] = dismissal
        self._channel.send(messages.Drained(build_id))
        return await dismissal

    def _decide(self, decision: messages.Decide) -> None:
        # Here, not where it is awaited: what all observe from now on is of this build.
        prepared, self._prepared = self._prepared, None
        if decision.refusal is None and prepared is not None:
            prepared.pipeline.restore(decision.observations, decision.guard)
            self._gateway = prepared
        settle(self._decision, decision.refusal)

    # What the parent says.

    def _hear(self, message: object) -> None:
        match message:
            case messages.Observed():
                self._observe(message)
            case KeyUse() if self._keys is not None:
                self._keys.hear(message)
            case messages.Gone(slot) if self._keys is not None:
                self._keys.forget(slot)
            case messages.Describe():
                self._channel.send(messages.Described(self.describe()))
            case messages.Gathered(ticket, states):
                settle(self._gatherings.get(ticket), states)
            case _:
                self._hear_of_reload(message)

    def _hear_of_reload(self, message: object) -> None:
        match message:
            case messages.Propose(build):
                self._build = build
                self._asked_to_vote = True
                self._reloader.begin()
            case messages.Decide():
                self._decide(message)
            case messages.Dismiss(build_id, unload):
                settle(self._dismissals.pop(build_id, None), unload)

    def _observe(self, message: messages.Observed) -> None:
        gateway = self._gateway
        if message.build_id == gateway.contract.build_id:
            for seen in message.items:
                gateway.pipeline.observe(seen)


def open_build(build: Build, source: str) -> tuple[Contract, ReaderTokenizer]:
    """Contract and tokenizer of a build as it came through the channel.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    return build.contract, ReaderTokenizer.from_bytes(build.tokenizer_json, source)
