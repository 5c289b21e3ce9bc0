"""API keys: how one is made, and the file that says which are good.

In: the bytes of a key file, written by operators with ``int8qa keys new``. Out: the
keys it names, by hash; a key itself is never in it. Knows no HTTP, no limits at work
and no file system: who reads the file, and when, is ``access``'s business.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from dataclasses import dataclass
from typing import Literal, cast, get_args

from int8qa.errors import ConfigurationError

KEY_PREFIX = "int8qa_"
"""So that a scanner of secrets, and a person, sees what a leaked string is."""

KEY_BYTES = 32
"""256 random bits: nobody guesses them, so a fast hash keeps them. Slow, salted hashes
are for secrets that people choose; for random ones of at least 112 bits an approved
one-way function is enough. Source: NIST SP 800-63B (2017), 5.1.2.2."""

MAX_KEYS = 256
"""Keys of one file. Each is compared with each request's, and each is a label value."""

MAX_FILE_BYTES = 2**18

Scope = Literal["ask", "metrics"]
"""``ask``: everything but ``/metrics``. ``metrics``: that alone."""

_KEY = re.compile(re.escape(KEY_PREFIX) + r"[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_OPTIONS = ("scope", "rate", "burst", "concurrent")
_MAX_LIMIT = 10**6


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file."""

    name: str
    """The id in metrics and logs."""
    digest: bytes
    scope: Scope = "ask"
    rate_per_s: float | None = None
    """Questions a second on average, None for any number."""
    burst: int | None = None
    """Questions at once; with a rate only. None: one second's worth, at least 1."""
    concurrent: int | None = None
    """Requests under way at once, None for any number."""

    @property
    def capacity(self) -> int:
        """Questions that a rested key may ask at once."""
        return self.burst or max(1, math.ceil(self.rate_per_s or 1))

    def format_line(self) -> str:
        """The line of the file."""
        options = {
            "scope": None if self.scope == "ask" else self.scope,
            "rate": None if self.rate_per_s is None else f"{self.rate_per_s:g}",
            "burst": self.burst,
            "concurrent": self.concurrent,
        }
        given = [f"{name}={value}" for name, value in options.items() if value]
        return " ".join([self.name, f"sha256:{self.digest.hex()}", *given])


def generate_key() -> str:
    """A new key: the prefix and 256 random bits in base64url."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> bytes | None:
    """A key's hash, or None for what has not the form of a key.

    That a weak secret of somebody's own never opens anything, whatever its hash in the
    file, is what the form is for.
    """
    if _KEY.fullmatch(key) is None:
        return None
    return hashlib.sha256(key.encode("ascii")).digest()


def parse_key_file(content: bytes, name: str) -> tuple[ApiKey, ...]:
    """The keys of a file.

    One line for each: a name, ``sha256:`` and the hash, then any of ``scope=``,
    ``rate=``, ``burst=`` and ``concurrent=``. Empty lines and those that begin with
    ``#`` do not count.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        ConfigurationError: a line is malformed, a name or a hash is there twice, or
            there is no key at all; the message has the line's number.
    """
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(
            f"{name} has more than {MAX_FILE_BYTES} bytes; it is no file of API keys"
        )
    keys: list[ApiKey] = []
    lines: dict[str | bytes, int] = {}
    # Not splitlines(): editors count lines by \n alone.
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            key = _parse_line(line.decode("utf-8").strip())
            if key is None:
                continue
            _note_line(lines, key, number)
        except UnicodeDecodeError:
            raise ConfigurationError(f"{name}:{number}: not UTF-8") from None
        except ValueError as error:
            raise ConfigurationError(f"{name}:{number}: {error}") from None
        keys.append(key)
    if not keys:
        raise ConfigurationError(
            f"{name} holds no key, so that nobody could ask; make one with "
            f"`int8qa keys new NAME`"
        )
    if len(keys) > MAX_KEYS:
        raise ConfigurationError(
            f"{name} holds {len(keys)} keys; allowed are {MAX_KEYS}"
        )
    return tuple(keys)


def _parse_line(line: str) -> ApiKey | None:
    # No message quotes the line: somebody may have put a key itself into it.
    if not line or line.startswith("#"):
        return None
    name, _, rest = line.partition(" ")
    if _KEY.search(line):
        raise ValueError(
            "there is a key itself here; the file holds hashes. Replace the key, which "
            "others may have read, with `int8qa keys new NAME`"
        )
    check_name(name)
    digest, *options = rest.split() or [""]
    match = _HASH.fullmatch(digest)
    if match is None:
        raise ValueError(
            "after the name must come sha256: and 64 hexadecimal digits in lower case, "
            "as `int8qa keys new` prints them"
        )
    given: dict[str, str] = {}
    for option in options:
        field, _, value = option.partition("=")
        if field not in _OPTIONS or field in given:
            raise ValueError(
                f"after the hash may come {', '.join(f'{o}=' for o in _OPTIONS)}, "
                f"each once, without spaces"
            )
        given[field] = value
    scope = given.get("scope", "ask")
    if scope not in get_args(Scope):
        raise ValueError(f"scope= must be one of {', '.join(get_args(Scope))}")
    return build_key(
        name,
        bytes.fromhex(match[1]),
        scope=cast("Scope", scope),
        rate_per_s=_read_number(given, "rate"),
        burst=_read_count(given, "burst"),
        concurrent=_read_count(given, "concurrent"),
    )


def _note_line(lines: dict[str | bytes, int], key: ApiKey, number: int) -> None:
    for what, value in (("name", key.name), ("hash", key.digest)):
        before = lines.setdefault(value, number)
        if before != number:
            raise ValueError(f"this {what} is that of line {before} already")


def check_name(name: str) -> str:
    """Return the name of a key.

    Raises:
        ValueError: it is no name for a key.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            "a key's name has 1 to 64 of a-z 0-9 . _ - and begins with a letter or "
            "digit; it is shown in metrics and logs"
        )
    return name


def build_key(
    name: str,
    digest: bytes,
    *,
    scope: Scope = "ask",
    rate_per_s: float | None = None,
    burst: int | None = None,
    concurrent: int | None = None,
) -> ApiKey:
    """A key from its parts.

    Raises:
        ValueError: a part is out of range, or contradicts another.
    """
    check_name(name)
    limits = {"rate": rate_per_s, "burst": burst, "concurrent": concurrent}
    for field, value in limits.items():
        # Written so that NaN fails as well.
        if value is not None and not 0 < value <= _MAX_LIMIT:
            raise ValueError(f"{field}= must be above 0 and at most {_MAX_LIMIT}")
    if burst is not None and rate_per_s is None:
        raise ValueError("burst= means nothing without rate=")
    return ApiKey(name, digest, scope, rate_per_s, burst, concurrent)


def _read_number(given: dict[str, str], field: str) -> float | None:
    if field not in given:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", given[field], re.ASCII) is None:
        raise ValueError(f"{field}= must be a decimal number, such as 2.5")
    return float(given[field])


def _read_count(given: dict[str, str], field: str) -> int | None:
    if field not in given:
        return None
    if re.fullmatch(r"\d{1,9}", given[field], re.ASCII) is None:
        raise ValueError(f"{field}= must be a whole number")
    return int(given[field])
