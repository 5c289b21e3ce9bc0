"""API keys and the file that names them."""

from __future__ import annotations

import hashlib
import re

import pytest

from int8qa.errors import ConfigurationError
from int8qa.gateway.key_file import (
    MAX_FILE_BYTES,
    MAX_KEYS,
    ApiKey,
    generate_key,
    hash_key,
    parse_key_file,
)

DIGEST = hashlib.sha256(b"x").hexdigest()
OTHER = hashlib.sha256(b"y").hexdigest()


def test_generated_keys_have_the_form_and_differ():
    """The prefix and 43 characters of base64url, that is 256 bits; each time others."""
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"int8qa_[A-Za-z0-9_-]{43}", key) for key in keys)


def test_hash_is_sha256_of_the_whole_key():
    """So that the line of a key can be made with any tool."""
    key = generate_key()
    assert hash_key(key) == hashlib.sha256(key.encode()).digest()


@pytest.mark.parametrize(
    "wrong",
    ["", "hunter2", "int8qa_", "x" + "int8qa_" + "a" * 43, "int8qa_" + "a" * 42,
     "int8qa_" + "a" * 43 + "\n", "int8qa_" + "ä" * 43],
)  # fmt: skip
def test_what_is_no_key_has_no_hash(wrong: str):
    """A weak secret opens nothing, though its hash may stand in the file."""
    assert hash_key(wrong) is None


@pytest.mark.parametrize(
    "key",
    [
        ApiKey("alice", bytes.fromhex(DIGEST)),
        ApiKey("prometheus", bytes.fromhex(DIGEST), scope="metrics"),
        ApiKey("b.o-b_2", bytes.fromhex(DIGEST), "ask", 2.5, 10, 4),
        ApiKey("slow", bytes.fromhex(DIGEST), "ask", 0.1, None, None),
    ],
    ids=lambda key: key.name,
)
def test_line_and_key_are_one(key: ApiKey):
    """What is printed for the file is read as what was asked for."""
    assert parse_key_file(key.format_line().encode(), "keys") == (key,)


def test_comments_blank_lines_and_windows_line_ends_do_not_count():
    """An operator may explain the lines."""
    text = f"# team A\r\n\r\n  alice   sha256:{DIGEST}  rate=2 \r\nbob sha256:{OTHER}"
    keys = parse_key_file(text.encode(), "keys")
    assert [(key.name, key.rate_per_s) for key in keys] == [("alice", 2), ("bob", None)]


GOOD = f"alice sha256:{DIGEST}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bob", "sha256: and 64 hexadecimal"),
        (f"bob {DIGEST}", "sha256: and 64 hexadecimal"),
        (f"bob sha256:{OTHER[:-1]}", "sha256: and 64 hexadecimal"),
        (f"bob sha256:{OTHER.upper()}", "sha256: and 64 hexadecimal"),
        (f"Bob sha256:{OTHER}", "a key's name has"),
        (f"- sha256:{OTHER}", "a key's name has"),
        (f"{'b' * 65} sha256:{OTHER}", "a key's name has"),
        (f"alice sha256:{OTHER}", "this name is that of line 2"),
        (f"bob sha256:{DIGEST}", "this hash is that of line 2"),
        (f"bob sha256:{OTHER} rate=0", "rate= must be above 0"),
        (f"bob sha256:{OTHER} rate=nan", "rate= must be a decimal"),
        (f"bob sha256:{OTHER} rate=-1", "rate= must be a decimal"),
        (f"bob sha256:{OTHER} rate=1e3", "rate= must be a decimal"),
        (f"bob sha256:{OTHER} rate=9999999", "rate= must be above 0 and at most"),
        (f"bob sha256:{OTHER} rate=1 burst=1.5", "burst= must be a whole number"),
        (f"bob sha256:{OTHER} burst=5", "burst= means nothing without rate="),
        (f"bob sha256:{OTHER} concurrent=0", "concurrent= must be above 0"),
        (f"bob sha256:{OTHER} scope=root", "scope= must be one of ask, metrics"),
        (f"bob sha256:{OTHER} rate=1 rate=2", "each once"),
        (f"bob sha256:{OTHER} speed=2", "may come scope="),
        (f"bob sha256:{OTHER} rate", "rate= must be a decimal"),
    ],
)  # fmt: skip
def test_broken_line_is_named_by_its_number(line: str, message: str):
    """Each mistake says which line, and what would be right."""
    with pytest.raises(ConfigurationError, match=re.escape(message)) as raised:
        parse_key_file(f"# ours\n{GOOD}\n\n{line}\n".encode(), "keys.txt")
    assert str(raised.value).startswith("keys.txt:4: ")


def test_key_itself_in_the_file_is_refused_and_not_repeated():
    """Whoever pastes the key instead of its hash is told, and the message hides it."""
    key = generate_key()
    for line in (key, f"bob {key}", f"bob sha256:{key}"):
        with pytest.raises(ConfigurationError, match="there is a key itself") as raised:
            parse_key_file(line.encode(), "keys")
        assert key not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\n# nobody\n"])
def test_file_without_keys_is_refused(content: bytes):
    """Nobody could ask; an editor may just have emptied it to write it anew."""
    with pytest.raises(ConfigurationError, match="holds no key"):
        parse_key_file(content, "keys")


def test_files_beyond_the_bounds_are_refused():
    """Too many keys, too many bytes, and what is no text."""
    many = b"".join(
        ApiKey(f"k{n}", hashlib.sha256(b"%d" % n).digest()).format_line().encode()
        + b"\n"
        for n in range(MAX_KEYS + 1)
    )
    assert len(parse_key_file(many[: many.rindex(b"k")], "keys")) == MAX_KEYS
    with pytest.raises(ConfigurationError, match=f"{MAX_KEYS + 1} keys"):
        parse_key_file(many, "keys")
    with pytest.raises(ConfigurationError, match="no file of API keys"):
        parse_key_file(b"#" * (MAX_FILE_BYTES + 1), "keys")
    with pytest.raises(ConfigurationError, match="keys:2: not UTF-8"):
        parse_key_file(GOOD.encode() + b"\n\xff\xfe", "keys")
