"""A lean HTTP/1.1 client for the load generator: bytes out, status and body back.

In: whole requests as bytes, prepared before the clock runs. Out: one reply each, on
the event loop's thread. It shares the machine with what it measures, so it does as
little as it can: kept-alive connections, httptools, no header is looked at twice.
Knows no LoadGen and no schema; retries nothing that may have been answered.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from int8qa.errors import GatewayRequestError

REFUSED = "no connection"
"""Failure of a request for which no connection could be opened."""
LOST = "connection lost"
TIMED_OUT = "timeout"


class Reply(NamedTuple):
    """What became of one request."""

    failure: str | None
    """None for a 200; else ``HTTP 503``, or one of this module's names."""
    body: bytes
    seconds: float
    """From the request's first byte to the reply's last."""


OnReply = Callable[[Reply], None]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway listens."""

    host: str
    port: int
    tls: bool
    authority: str
    prefix: str
    """Path before the gateway's own, without a slash at its end."""
    key: str = field(default="", repr=False)
    """The gateway's API key; empty if it asks for none."""

    @classmethod
    def parse(cls, url: str, *, key: str = "") -> Address:
        """Of ``http://host:port``.

        Raises:
            GatewayRequestError: it is no such address.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise GatewayRequestError(
                f"{url} is no address of a gateway; give one such as "
                f"--url http://127.0.0.1:8080"
            )
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=port or (443 if tls else 80),
            tls=tls,
            authority=parts.netloc.rpartition("@")[2],
            prefix=parts.path.rstrip("/"),
            key=key.strip(),
        )

    def get(self, path: str) -> bytes:
        """A whole GET request."""
        return self._head("GET", path) + b"\r\n"

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """A whole POST request with a JSON body."""
        # ASCII escapes carry even what is no Unicode text.
        data = json.dumps(body).encode("ascii")
        head = f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        return self._head("POST", path) + head.encode("ascii") + data

    def _head(self, method: str, path: str) -> bytes:
        lines = f"{method} {self.prefix}{path} HTTP/1.1\r\nhost: {self.authority}\r\n"
        if self.key:
            lines += f"authorization: Bearer {self.key}\r\n"
        return lines.encode("latin-1")


@dataclass(slots=True)
class Exchange:
    """One request under way."""

    request: bytes
    on_reply: OnReply
    started: float = 0.0
    resent: bool = False


@dataclass(slots=True)
class ConnectionPool:
    """At most so many requests under way at once; others wait their turn.

    All of it runs on the event loop's thread.
    """

    address: Address
    connections: int
    timeout_s: float
    _idle: list[Connection] = field(default_factory=list)
    _waiting: deque[Exchange] = field(default_factory=deque)
    _opening: set[asyncio.Task[None]] = field(default_factory=set)
    _open: int = 0

    def send(self, request: bytes, on_reply: OnReply) -> None:
        """Send a request; ``on_reply`` is called exactly once."""
        self._dispatch(Exchange(request, on_reply))

    async def ask(self, request: bytes) -> Reply:
        """Send a request and wait for its reply."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.send(request, reply.set_result)
        return await reply

    def close(self) -> None:
        """Close idle connections; whoever calls it has nothing under way."""
        for connection in self._idle:
            connection.abort()

    def _dispatch(self, exchange: Exchange) -> None:
        if self._idle:
            # The one used last: the server closes those that idle for long.
            self._idle.pop().start(exchange)
        elif self._open < self.connections:
            self._open += 1
            task = asyncio.get_running_loop().create_task(self._connect(exchange))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        else:
            self._waiting.append(exchange)

    async def _connect(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        address = self.address
        try:
            _, connection = await asyncio.wait_for(
                loop.create_connection(
                    lambda: Connection(self),
                    address.host,
                    address.port,
                    ssl=address.tls or None,
                ),
                self.timeout_s,
            )
        except (OSError, asyncio.TimeoutError):
            self._open -= 1
            exchange.on_reply(Reply(REFUSED, b"", 0.0))
            if self._waiting:  # perhaps nobody else is left to take them
                self._dispatch(self._waiting.popleft())
        else:
            connection.start(exchange)

    def release(self, connection: Connection) -> None:
        """A connection has nothing to do."""
        if self._waiting:
            connection.start(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def drop(self, connection: Connection, unsent: Exchange | None) -> None:
        """A connection is gone; what it had not begun to answer is sent elsewhere."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if unsent is not None:
            self._waiting.appendleft(unsent)
        if self._waiting:
            self._dispatch(self._waiting.popleft())


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parser: Any = None
        self._body: list[bytes] = []
        self._answered = 0
        self._heard = False
        self._complete = False
        self._keep_alive = False
        self._timed_out = False

    def start(self, exchange: Exchange) -> None:
        """Send a request; the connection must be idle."""
        import httptools

        assert self._transport is not None
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._body = []
        self._heard = self._complete = False
        self._timer = asyncio.get_running_loop().call_later(
            self._pool.timeout_s, self._give_up
        )
        exchange.started = time.perf_counter()
        self._transport.write(exchange.request)

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not a check: uvloop's transports do not inherit from asyncio's.
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        import httptools

        if self._exchange is None:
            self.abort()  # nobody asked
            return
        self._heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
            return
        if self._complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        exchange, self._exchange = self._exchange, None
        self._stop_timer()
        unsent = None
        if exchange is not None:
            # A kept-alive connection that the server closed as we wrote: it has seen
            # nothing of the request. Once, or a server that hangs up would loop us.
            stale = self._answered and not self._heard and not self._timed_out
            if stale and not exchange.resent:
                exchange.resent = True
                unsent = exchange
        self._pool.drop(self, unsent)
        if exchange is not None and unsent is None:
            failure = TIMED_OUT if self._timed_out else LOST
            seconds = time.perf_counter() - exchange.started
            exchange.on_reply(Reply(failure, b"", seconds))

    # The parser's side.

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the reply."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The reply is whole."""
        self._complete = True
        # Asked later, httptools has forgotten the reply's headers.
        self._keep_alive = self._parser.should_keep_alive()

    def _finish(self) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        seconds = time.perf_counter() - exchange.started
        self._stop_timer()
        self._answered += 1
        status = self._parser.get_status_code()
        failure = None if status == 200 else f"HTTP {status}"
        reply = Reply(failure, b"".join(self._body), seconds)
        # First the reply: what it sets free may be sent on this very connection.
        exchange.on_reply(reply)
        if self._keep_alive:
            self._pool.release(self)
        else:
            self.abort()

    def _give_up(self) -> None:
        self._timed_out = True
        self.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
