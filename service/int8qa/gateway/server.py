"""The server that runs one application: signals, readiness, an end in bounded time.

In: an application, sockets. Out: requests served until SIGINT or SIGTERM, and then
those that were accepted. Knows no routes and no settings' origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from int8qa.errors import ConfigurationError
from int8qa.gateway.connections import build_protocol
from int8qa.gateway.process import bind_admin, describe_url, tell_exposure
from int8qa.gateway.reload import Gateway, Reloader
from int8qa.gateway.waiting import finish_within

_ANNOUNCE_POLL_S = 0.5

_LAST_WORDS_S = 0.5
"""Between a second signal's refusals and cutting whoever has not read them."""


class GatewayServer(uvicorn.Server):
    """Uvicorn, which drains the pipeline while it waits for connections.

    Unlike uvicorn it does not raise a caught signal again when done: who called may
    have more to stop.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        reloader: Reloader,
        *,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self._reloader = reloader
        self._drain_timeout_s = drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, finish what was accepted, in bounded time."""
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await drain

    async def _drain(self) -> None:
        await self._reloader.close()
        pipeline = self._reloader.current.pipeline
        drain = asyncio.create_task(pipeline.drain(self._drain_timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if drain.done():
            await drain
            return
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await pipeline.drain(0)
        # Uvicorn closes each connection that has its answer. What is left is still
        # sending its request, or does not read.
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM: the first drains, the second fails what is left.

        A third skips the orderly close. SIGUSR1 reloads a rebuilt model repository.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        # Not SIGHUP: a terminal that is closed sends it, and means the end.
        if hasattr(signal, "SIGUSR1"):
            before[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1,
                lambda *_: self._loop.call_soon_threadsafe(self._reloader.request),
            )
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ask the server to end; on a second signal, without waiting for answers."""
        del sig, frame
        if self._hurry.is_set():
            self.force_exit = True
        elif self.should_exit:
            # A plain set() in a signal handler would not wake the loop.
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True


async def run_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application until SIGINT or SIGTERM, then drain and return.

    Args:
        app: from ``create_app``.
        listener: from ``bind_socket``; closed at the end. The operators' address, if
            there is one, is bound here.
        on_ready: called once with the base URL, when all models can first be asked.

    Raises:
        ConfigurationError: the operators' address is taken, or not ours.
    """
    settings = app.state.gateway.settings
    try:
        listeners = [listener, *bind_admin(settings, listener)]
    except ConfigurationError:
        listener.close()
        raise
    tell_exposure(settings)
    await serve_listeners(app, listeners, on_ready=on_ready)


async def serve_listeners(
    app: FastAPI,
    listeners: Sequence[socket.socket],
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """``run_server``, with all its sockets bound; closes them, the public one first."""
    gateway: Gateway = app.state.gateway
    settings = gateway.settings
    proxies = settings.access.trusted_proxies
    drain_timeout_s = settings.limits.shutdown_timeout_s
    server = GatewayServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            http=build_protocol(settings.limits),
            ws="none",
            # Else uvicorn believes any X-Forwarded-For that comes from loopback.
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies or None,
            # A little longer than the drain, which answers what it cannot finish.
            timeout_graceful_shutdown=math.ceil(drain_timeout_s) + 1,
        ),
        app.state.reloader,
        drain_timeout_s=drain_timeout_s,
    )
    base_url = describe_url(listeners[0])

    async def announce() -> None:
        # Another gateway may take this one's place before it was ever ready.
        waiting = True
        while waiting:
            with contextlib.suppress(asyncio.TimeoutError):
                ready = app.state.gateway.pipeline.watch.wait_ready()
                await finish_within(ready, _ANNOUNCE_POLL_S)
                waiting = False
        if on_ready is not None:
            on_ready(base_url)

    announcement = asyncio.create_task(announce())
    try:
        await server.serve(sockets=list(listeners))
    finally:
        announcement.cancel()
        await asyncio.gather(announcement, return_exceptions=True)
        for one in listeners:
            one.close()
