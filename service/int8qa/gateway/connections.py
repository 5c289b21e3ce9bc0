"""A client's connection, with limits of time and size on what it may hold.

In: bytes of a socket. Out: uvicorn's own HTTP, cut off where a client dawdles: headers
that never end, bodies dripping after their response, answers that nobody reads. Knows
no routes; the body's own limits are the edge's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from int8qa.settings import LimitSettings

MAX_FRAMING_BYTES = 65_536
"""Bytes of one request that are no body: request line, headers, trailers, chunk sizes.
The parser itself has no limit. Several times what browsers and proxies send."""

FRAMING_PER_BODY_BYTE = 8
"""A body in chunks of one byte has six bytes of framing for each."""


class PatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection; class attributes are its patience."""

    receive_timeout_s = 20.0
    send_timeout_s = 20.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._message_open = False
        self._raw_bytes = 0
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request at once: who connects has something to ask."""
        super().connection_made(transport)
        self._arm_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel_header_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a request that is all framing."""
        self._raw_bytes += len(data)
        super().data_received(data)
        framing = self._raw_bytes - self._body_bytes
        allowed = MAX_FRAMING_BYTES + FRAMING_PER_BODY_BYTE * self._body_bytes
        if framing > allowed and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("Request headers are too large.")
            else:
                self.transport.abort()

    def on_message_begin(self) -> None:
        """Start to wait for the end of the headers."""
        super().on_message_begin()
        self._message_open = True
        if self._header_timer is None:
            self._arm_header_timer()

    def on_headers_complete(self) -> None:
        """Let the request begin; the edge bounds its body from here on."""
        self._cancel_header_timer()
        super().on_headers_complete()
        self._unset_keepalive_if_required()

    def on_body(self, body: bytes) -> None:
        """Count the body, which the edge bounds, apart from its framing."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count anew for the next request."""
        self._message_open = False
        self._raw_bytes = self._body_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give the client its time to read."""
        super().on_response_complete()
        self._arm_write_timer()

    def pause_writing(self) -> None:
        """Give a client that reads slowly its time to catch up."""
        super().pause_writing()
        self._cancel_write_timer()
        self._arm_write_timer()

    def resume_writing(self) -> None:
        """Wait for nothing any more: the client reads."""
        self._cancel_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, and do not wait long for its reader."""
        super().timeout_keep_alive_handler()
        self._arm_write_timer()

    def _unset_keepalive_if_required(self) -> None:
        # What still drips of a body whose response is out does not keep the connection.
        if (
            self._message_open
            and self.cycle is not None
            and self.cycle.response_complete
        ):
            return
        super()._unset_keepalive_if_required()

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _arm_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(
            self.receive_timeout_s, self._on_late_headers
        )

    def _on_late_headers(self) -> None:
        self._header_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # A request before these headers is still being answered.
            self._arm_header_timer()
        else:
            self.transport.abort()

    def _arm_write_timer(self) -> None:
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(
                self.send_timeout_s, self._on_slow_reader
            )

    def _on_slow_reader(self) -> None:
        self._write_timer = None
        unread = self.transport.get_write_buffer_size()
        if unread and (self.flow.write_paused or self.transport.is_closing()):
            self.transport.abort()


def build_protocol(limits: LimitSettings) -> type[PatientProtocol]:
    """The protocol class for a service with these limits, for uvicorn's ``http``."""

    class LimitedProtocol(PatientProtocol):
        receive_timeout_s = limits.receive_timeout_s
        send_timeout_s = limits.send_timeout_s

    return LimitedProtocol
