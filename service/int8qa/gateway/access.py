"""Who may ask, and how much: API keys at the door.

In: ASGI messages, and a file of keys that may change at any time. Out: the same
messages with the key's name on the request's record; or a 401, 403 or 429 for which
nothing was read or done. Without a file everybody may ask. Knows no questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from int8qa.errors import ConfigurationError
from int8qa.gateway.addresses import is_admin, needs_key
from int8qa.gateway.channel import KeyUse
from int8qa.gateway.key_file import MAX_FILE_BYTES, ApiKey, hash_key, parse_key_file
from int8qa.gateway.logs import get_logger
from int8qa.gateway.problems import Problem, ProblemKind
from int8qa.gateway.rate_limit import TokenBucket
from int8qa.gateway.telemetry import RequestRecord, Telemetry

RELOAD_INTERVAL_S = 2.0
"""How soon a changed file counts. It is read, not only looked at: contents tell more
than times of change, and a file of keys is small."""

MISSING = ProblemKind(401, "missing-key", "API key missing", "denied")
UNKNOWN = ProblemKind(401, "unknown-key", "API key unknown", "denied")
OUT_OF_SCOPE = ProblemKind(403, "out-of-scope", "Not this key's", "denied")
TOO_FAST = ProblemKind(429, "rate-limited", "Too many requests", "limited")
TOO_MANY = ProblemKind(429, "too-many-at-once", "Too many requests at once", "limited")

_BEARER = re.compile(r"bearer +([^\s]+) *", re.IGNORECASE)
_REALM = 'Bearer realm="int8qa"'
_METRICS_PATH = "/metrics"


@dataclass(slots=True)
class Client:
    """A key at work."""

    key: ApiKey
    bucket: TokenBucket | None
    in_flight: int = 0
    """In this process."""
    elsewhere: dict[int, int] = field(default_factory=dict)
    """In others, by their numbers."""
    tell: Callable[[KeyUse], None] | None = None
    """Whom to tell of each use: the other processes."""

    def count_under_way(self) -> int:
        """Requests of this key, as far as is known here."""
        return self.in_flight + sum(self.elsewhere.values())

    def change(self, in_flight: int, taken: int = 0) -> None:
        """Note the beginning or end of a request, and what it took of the bucket."""
        self.in_flight += in_flight
        if self.tell is not None:
            self.tell(KeyUse(0, self.key.name, taken, self.in_flight))


class KeyRing:
    """The keys of a file, as it stands now.

    Raises:
        ConfigurationError: the file cannot be read, or is malformed.
    """

    def __init__(
        self,
        path: Path,
        telemetry: Telemetry,
        *,
        tell: Callable[[KeyUse], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._telemetry = telemetry
        self._tell = tell
        self._clock = clock
        self._clients: dict[str, Client] = {}
        self._seen: bytes | str = b""
        """What was last read, or why that failed."""
        self._log = get_logger()
        content = self._read()
        if isinstance(content, str):
            raise ConfigurationError(content)
        self._seen = content
        self._adopt(parse_key_file(content, str(path)))

    def find(self, key: str) -> Client | None:
        """Whose key it is. The time it takes says nothing of the keys there are."""
        digest = hash_key(key)
        found = None
        if digest is not None:
            for client in self._clients.values():
                if hmac.compare_digest(client.key.digest, digest):
                    found = client
        return found

    def hear(self, use: KeyUse) -> None:
        """Charge a key with what another process let it do."""
        client = self._clients.get(use.name)
        if client is None:
            return
        client.elsewhere[use.origin] = use.in_flight
        if client.bucket is not None and use.taken:
            client.bucket.charge(use.taken)

    def forget(self, origin: int) -> None:
        """A process is gone, and its requests with it."""
        for client in self._clients.values():
            client.elsewhere.pop(origin, None)

    @contextlib.asynccontextmanager
    async def watch(self, interval_s: float = RELOAD_INTERVAL_S) -> AsyncIterator[None]:
        """Follow the file's changes meanwhile."""

        async def follow() -> None:
            while True:
                await asyncio.sleep(interval_s)
                await self.refresh()

        task = asyncio.create_task(follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def refresh(self) -> None:
        """Read the file, and take its keys if it changed.

        A broken one changes nothing; that is logged once, and shown as a metric.
        """
        content = await asyncio.to_thread(self._read)
        if content == self._seen:
            return
        self._seen = content
        try:
            if isinstance(content, str):
                raise ConfigurationError(content)  # noqa: TRY301 - one end for both
            keys = parse_key_file(content, str(self._path))
        except ConfigurationError as error:
            self._telemetry.set_key_file(sound=False)
            self._log.error("key_file_refused", reason=str(error))
            return
        self._adopt(keys)
        self._log.info("key_file_read", keys=len(keys))

    def _read(self) -> bytes | str:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            return (
                f"cannot read the API keys of INT8QA_ACCESS__KEYS_FILE, {self._path}: "
                f"{error.strerror}"
            )

    def _adopt(self, keys: tuple[ApiKey, ...]) -> None:
        clients = {}
        for key in keys:
            # What a key has under way, and has used up, stays its own.
            client = self._clients.get(key.name) or Client(key, None, tell=self._tell)
            client.key = key
            client.bucket = self._fit_bucket(key, client.bucket)
            clients[key.name] = client
        self._clients = clients
        self._telemetry.set_key_file(sound=True)

    def _fit_bucket(
        self, key: ApiKey, bucket: TokenBucket | None
    ) -> TokenBucket | None:
        if key.rate_per_s is None:
            return None
        wanted = (key.rate_per_s, key.capacity)
        if bucket is not None and (bucket.rate_per_s, bucket.capacity) == wanted:
            return bucket
        return TokenBucket(*wanted, self._clock)


class _RefusedError(Exception):
    """A request that goes no further."""

    def __init__(
        self,
        kind: ProblemKind,
        detail: str,
        *,
        challenge: str | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        retry_after_s = None if wait_s is None else max(1, math.ceil(wait_s))
        self.problem = Problem(kind, detail, retry_after_s=retry_after_s)
        self.headers = {} if challenge is None else {"WWW-Authenticate": challenge}


class AccessGate:
    """ASGI middleware: no request without a good key passes; one per application.

    Sits behind ``RequestEdge``, whose record it writes to.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, telemetry: Telemetry) -> None:
        self._app = app
        self._keys = keys
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_admin(scope) or not needs_key(scope):
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        try:
            client = self._identify(scope, record)
            with _admit(client, record):
                self._telemetry.count_key_request(record.key, "allowed")
                await self._app(scope, receive, send)
        except _RefusedError as refusal:
            kind = refusal.problem.kind
            self._telemetry.count_key_request(record.key, kind.slug)
            record.outcome, record.problem = kind.outcome, kind.slug
            if kind.status == 401:
                record.client = (scope.get("client") or [None])[0]
            response = refusal.problem.to_response(
                record.request_id, headers=refusal.headers
            )
            await response(scope, receive, send)

    def _identify(self, scope: Scope, record: RequestRecord) -> Client:
        given = Headers(scope=scope).getlist("authorization")
        match = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            raise _RefusedError(
                MISSING,
                "this service wants an API key: send one header Authorization: Bearer "
                "KEY; the commands of int8qa take it from INT8QA_API_KEY",
                # Without a code, where no key was given. Source: RFC 6750, 3.1.
                challenge=_REALM,
            )
        client = self._keys.find(match[1])
        if client is None:
            raise _RefusedError(
                UNKNOWN,
                "the API key is not known here: check that it is whole, or ask the "
                "operator for another",
                challenge=f'{_REALM}, error="invalid_token"',
            )
        record.key = client.key.name
        needed = "metrics" if scope["path"] == _METRICS_PATH else "ask"
        if client.key.scope != needed:
            raise _RefusedError(
                OUT_OF_SCOPE,
                f"this needs a key of scope {needed}; this one's is {client.key.scope}",
                challenge=f'{_REALM}, error="insufficient_scope", scope="{needed}"',
            )
        return client


@contextlib.contextmanager
def _admit(client: Client, record: RequestRecord) -> Iterator[None]:
    """Hold a request to its key's limits.

    The items of a batch are not known before it is read: the first is paid for at the
    door, the others when it is done, if need be as a debt.
    """
    key, bucket = client.key, client.bucket
    under_way = client.count_under_way() if key.concurrent is not None else 0
    if key.concurrent is not None and under_way >= key.concurrent:
        raise _RefusedError(
            TOO_MANY,
            f"this key has {under_way} requests under way; allowed are "
            f"{key.concurrent}. Wait until one is answered",
            wait_s=1.0,
        )
    wait_s = 0.0 if bucket is None else bucket.take()
    if wait_s > 0:
        raise _RefusedError(
            TOO_FAST,
            f"this key may ask {key.rate_per_s:g} questions a second, and "
            f"{key.capacity} at once; ask again in {math.ceil(wait_s)} s",
            wait_s=wait_s,
        )
    client.change(1, taken=1)
    try:
        yield
    finally:
        more = 0
        if bucket is not None and record.items is not None and record.status < 400:
            more = record.items - 1
            bucket.charge(more)
        client.change(-1, taken=more)
