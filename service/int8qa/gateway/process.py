"""What a gateway process needs before it serves anything: sockets, an event loop.

In: settings. Out: bound sockets, or why not; a word on who may ask. Imports nothing
heavy: the parent of several gateway processes needs no more than this.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

from int8qa.errors import ConfigurationError
from int8qa.gateway.logs import get_logger
from int8qa.settings import Settings

_BACKLOG = 2048

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def bind_socket(host: str, port: int, *, setting: str = "INT8QA_PORT") -> socket.socket:
    """Bind and listen, before anything expensive is started.

    Args:
        host: a local address.
        port: 0 for any free one.
        setting: where the port can be changed, for the message.

    Raises:
        ConfigurationError: the address is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}. Stop what listens "
            f"there, or choose another port with {setting}"
        ) from error


def bind_admin(settings: Settings, public: socket.socket) -> list[socket.socket]:
    """The operators' socket, if there is to be one."""
    host, port = settings.admin.host, settings.admin.port
    if not port:
        return []
    # Requests are told apart by the port.
    if port == public.getsockname()[1]:
        raise ConfigurationError(
            f"INT8QA_ADMIN__PORT and INT8QA_PORT are both {port}; choose two ports"
        )
    return [bind_socket(host, port, setting="INT8QA_ADMIN__PORT")]


def tell_exposure(settings: Settings) -> None:
    """Say who may ask, where that is more than this machine's own."""
    log, admin = get_logger(), settings.admin
    if admin.port:
        log.info("admin_address", host=admin.host, port=admin.port)
    if not settings.access.keys_file and settings.host not in _LOOPBACK:
        log.warning(
            "open_to_all",
            host=settings.host,
            hint="whoever reaches this address may ask; INT8QA_ACCESS__KEYS_FILE asks "
            "for API keys",
        )


def describe_url(listener: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_event_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` to its end, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # not on Windows, nor on every Python
        asyncio.run(main)
    else:
        uvloop.run(main)
