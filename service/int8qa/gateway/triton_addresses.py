"""Where the Tritons are that ``INT8QA_TRITON__URL`` names.

In: the setting: one host:port, several with commas between, or ``dns:///name:port``.
Out: addresses with port, looked up anew each time, and a target that gRPC takes. Knows
no Triton. gRPC's own resolver takes one name, and asks again only once a connection is
lost: Tritons that were added would get nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

from int8qa.gateway.logs import get_logger

DNS_SCHEME = "dns:///"
"""As gRPC writes it: all addresses of the name behind it, not the first alone."""

LOOKUP_TIMEOUT_S = 1.0
"""A name server that hangs holds nobody up: the addresses known by then stand."""


def names_several(url: str) -> bool:
    """Whether a setting may stand for more than one Triton."""
    return "," in url or url.startswith(DNS_SCHEME)


def build_target(addresses: Sequence[str]) -> str:
    """All addresses as one gRPC target. Source: gRPC's doc/naming.md.

    A target is of one family. Where there is an IPv6 address, IPv4 ones are written as
    such too.
    """
    if not any(address.startswith("[") for address in addresses):
        return f"ipv4:{','.join(addresses)}"
    written = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        written.append(address if "[" in host else f"[::ffff:{host}]:{port}")
    return f"ipv6:{','.join(written)}"


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name: its IPv4 ones, where it has any.

    Triton listens to IPv4 alone unless told otherwise, and a Triton with both must not
    count twice.

    Raises:
        OSError: there is none, or no name server answers.
        UnicodeError: it is no name.
    """
    loop = asyncio.get_running_loop()
    found: list[Any] = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ipv4 = [f"{a[0]}:{a[1]}" for family, *_, a in found if family == socket.AF_INET]
    ipv6 = [f"[{a[0]}]:{a[1]}" for family, *_, a in found if family == socket.AF_INET6]
    return ipv4 or ipv6


class AddressBook:
    """The addresses of one setting, as far as they are known."""

    def __init__(self, url: str) -> None:
        self._names = tuple(url.split(","))
        self._known: dict[str, list[str]] = {name: [] for name in self._names}
        self._lost: set[str] = set()
        self._lookup: asyncio.Task[None] | None = None

    async def find(self) -> list[str]:
        """Look up every name; what could not be looked up stays as it was.

        Returns:
            Distinct addresses in the setting's order, each with its port.
        """
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.create_task(self._look_up_all())
        await asyncio.wait({self._lookup}, timeout=LOOKUP_TIMEOUT_S)
        every = (address for name in self._names for address in self._known[name])
        return list(dict.fromkeys(every))

    def close(self) -> None:
        """Look nothing up any more."""
        if self._lookup is not None:
            self._lookup.cancel()

    async def _look_up_all(self) -> None:
        await asyncio.gather(*(self._look_up(name) for name in self._names))

    async def _look_up(self, name: str) -> None:
        host, _, port = name.removeprefix(DNS_SCHEME).rpartition(":")
        try:
            found = await look_up(host.strip("[]"), int(port))
        except (OSError, UnicodeError) as error:
            if name not in self._lost:
                self._lost.add(name)
                get_logger().warning(
                    "triton_not_looked_up",
                    name=name,
                    failure=type(error).__name__,
                    kept=self._known[name],
                )
            return
        self._lost.discard(name)
        several = name.startswith(DNS_SCHEME)
        self._known[name] = sorted(found) if several else found[:1]
