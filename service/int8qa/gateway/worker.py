"""One of several gateway processes, from its first message to its last.

In: descriptors of inherited sockets as arguments, all else from the parent. Out: an
application that serves, on the sockets that all processes share.
"""

from __future__ import annotations

import asyncio
import socket
import sys

from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import Int8qaError
from int8qa.gateway import channel as messages
from int8qa.gateway.app import open_app
from int8qa.gateway.channel import Boot, Channel, open_channel
from int8qa.gateway.crew import Crew, open_build
from int8qa.gateway.load import Load
from int8qa.gateway.logs import configure_logging
from int8qa.gateway.process import run_event_loop
from int8qa.gateway.server import serve_listeners


def main() -> None:
    """Serve: the arguments are the channel, the file of ``Load``, and the sockets."""
    channel, load, *listeners = map(int, sys.argv[1:])
    run_event_loop(_run(channel, load, listeners))


async def _run(descriptor: int, load: int, listeners: list[int]) -> None:
    channel = await open_channel(socket.socket(fileno=descriptor))
    boot = await channel.receive()
    if boot is None:
        return
    configure_logging(boot.settings, worker=boot.slot)
    try:
        await _serve(channel, boot, load, listeners)
    except Int8qaError as error:
        channel.send(messages.Failed(error))
        await channel.close()


async def _serve(channel: Channel, boot: Boot, load: int, listeners: list[int]) -> None:
    settings = boot.settings
    source = str(settings.model_repository / TOKENIZER_FILENAME)
    contract, tokenizer = open_build(boot.build, source)
    shared = Load(load, slot=boot.slot, slots=settings.workers)
    crew = Crew(channel, boot, shared)
    app = open_app(settings, contract, tokenizer, crew)

    def tell_ready(_url: str) -> None:
        channel.send(messages.Ready())

    listening = asyncio.create_task(crew.listen(), name="crew")
    try:
        await serve_listeners(
            app,
            [socket.socket(fileno=one) for one in listeners],
            on_ready=tell_ready,
        )
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    await crew.leave()
