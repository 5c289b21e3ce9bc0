"""Between the parent of several gateway processes and each of them.

In: messages, as Python objects. Out: the same objects at the other end of a pair of
sockets, in order. Both ends run this code and trust each other; nothing of a client's
comes here but ids and sizes. Knows no message's meaning, but here they are listed.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any, TypeVar

from int8qa.contract import Contract
from int8qa.errors import Int8qaError
from int8qa.gateway.comparison import Observation
from int8qa.gateway.guard import GuardReport
from int8qa.settings import Settings

T = TypeVar("T")

_HEAD = struct.Struct("!I")
_MAX_UNSENT_BYTES = 64 * 2**20
"""What the other end may leave unread. Nobody reads that slowly: it stands still."""


@dataclass(frozen=True, slots=True)
class Build:
    """One build's contract and tokenizer, from the hands of who coordinates."""

    contract: Contract
    tokenizer_json: bytes


# From the parent.


@dataclass(frozen=True, slots=True)
class Boot:
    """The first message: what to be."""

    settings: Settings
    slot: int
    build: Build
    observations: tuple[Observation, ...]
    """Recent ones of this build, by all."""
    guard: GuardReport
    replaces: bool
    """Whether another worker was here before."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What workers saw, in an order that is the same for all of them."""

    build_id: str
    items: tuple[Observation, ...]


@dataclass(frozen=True, slots=True)
class Describe:
    """A worker is to send its ``Described``."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """The states of all workers, pickled, and what is left of former ones."""

    ticket: int
    states: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Propose:
    """A worker is to prepare a build, and to vote."""

    build: Build


@dataclass(frozen=True, slots=True)
class Decide:
    """All have prepared; or one could not, and why."""

    refusal: str | None
    observations: tuple[Observation, ...]
    """Of the new build, if it is not so new; as in ``Boot``."""
    guard: GuardReport


@dataclass(frozen=True, slots=True)
class Dismiss:
    """All have drained a former build; one is to unload its models."""

    build_id: str
    unload: bool


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker has ended."""

    slot: int


# From a worker.


@dataclass(frozen=True, slots=True)
class Started:
    """It takes connections."""


@dataclass(frozen=True, slots=True)
class Ready:
    """All models can be asked."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker cannot serve at all; it ends."""

    error: Int8qaError


@dataclass(frozen=True, slots=True)
class Gather:
    """A worker wants the state of all."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Described:
    """A worker's state, pickled: asked for, or its last."""

    state: bytes


@dataclass(frozen=True, slots=True)
class WantReload:
    """A worker has lost the models that it serves."""


@dataclass(frozen=True, slots=True)
class Vote:
    """Whether a build can be served from now on."""

    refusal: str | None = None
    """Why not."""
    changes_over: bool = False
    """False: it serves already."""


@dataclass(frozen=True, slots=True)
class Drained:
    """A worker has answered all that it took with a former build."""

    build_id: str


# Both ways.


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What became of an API key in one worker."""

    origin: int
    name: str
    taken: int
    """Tokens of its bucket, since the last word on it."""
    in_flight: int
    """Requests under way now."""


class Channel:
    """One end; opened by ``open_channel``."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: object) -> bool:
        """Send soon, if anybody is there; False if it has stopped reading."""
        transport = self._writer.transport
        if transport.is_closing():
            return True
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            return False
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._writer.write(_HEAD.pack(len(content)) + content)
        return True

    async def receive(self) -> Any:
        """The next message; None once the other end is gone."""
        try:
            (size,) = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            content = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None
        return pickle.loads(content)  # noqa: S301 - from ourselves

    async def close(self) -> None:
        """Hand the other end what was sent, and leave."""
        try:
            self._writer.close()
            await self._writer.wait_closed()
        except OSError:
            return


def settle(future: asyncio.Future[T] | None, value: T) -> None:
    """Give a result to whoever still waits for it."""
    if future is not None and not future.done():
        future.set_result(value)


async def open_channel(end: socket.socket) -> Channel:
    """Take one end of a ``socket.socketpair``."""
    return Channel(*await asyncio.open_unix_connection(sock=end))
