"""One life of one gateway process, as its parent sees it.

In: descriptors that it inherits, its place. Out: a process in a session of its own, a
channel to it, and what it has said of itself so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from int8qa.errors import Int8qaError
from int8qa.gateway.channel import Channel, Vote

_START = (
    "import os, sys; sys.path[:] = sys.argv.pop(1).split(os.pathsep); "
    "from int8qa.gateway.worker import main; main()"
)
"""What it runs: with our module search path, whatever its directory holds."""

_EXIT_S = 5.0
"""To end, for a process that has said its last."""


class Process(Protocol):
    """What is needed of asyncio's."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def send_signal(self, signal: int, /) -> None: ...

    async def wait(self) -> int: ...


Spawn = Callable[[Sequence[int]], Awaitable[Process]]
"""Starts a worker that inherits these descriptors."""


async def spawn_worker(inherited: Sequence[int]) -> Process:
    """Start ``int8qa.gateway.worker``."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _START, os.pathsep.join(sys.path)),
        *map(str, inherited),
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
        # Ctrl-C is the parent's to pass on, or it would count twice.
        start_new_session=True,
    )


class Life:
    """From spawn to exit."""

    def __init__(self, slot: int, process: Process, channel: Channel) -> None:
        self.slot = slot
        self.process = process
        self.started = False
        """Whether it takes connections."""
        self.ready = False
        """Whether it has had all models once."""
        self.failure: Int8qaError | None = None
        self.state: bytes | None = None
        """The last that it described."""
        self.description: asyncio.Future[None] | None = None
        """Awaits the next."""
        self.vote: asyncio.Future[Vote | None] | None = None
        self._channel = channel

    def send(self, message: object) -> None:
        """Say something; a worker that listens no more is ended."""
        if not self._channel.send(message):
            self.signal(signal.SIGKILL)

    async def attend(self, hear: Callable[[Life, object], None]) -> None:
        """Hear it to its end."""
        while (message := await self._channel.receive()) is not None:
            hear(self, message)
        ending = asyncio.ensure_future(self.process.wait())
        await asyncio.wait({ending}, timeout=_EXIT_S)
        self.signal(signal.SIGKILL)
        await ending
        await self._channel.close()

    def signal(self, number: int) -> None:
        """Send a signal, if there is still somebody to get it."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def describe_exit(self) -> str:
        """How it ended."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"
