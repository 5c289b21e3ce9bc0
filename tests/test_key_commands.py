"""``int8qa keys``: what it prints where, and that it fits the gateway."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from int8qa.errors import ConfigurationError
from int8qa.gateway.key_file import hash_key, parse_key_file
from int8qa.key_commands import add_key_commands

APP = typer.Typer()
add_key_commands(APP)


def run(*arguments: str) -> tuple[str, str]:
    """Standard output and standard error; errors of ours are raised."""
    result = CliRunner().invoke(APP, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_new_key_fits_its_line():
    """The line for the file goes to standard output alone, the key to standard error."""
    out, err = run(
        "new", "alice", "--rate", "2.5", "--burst", "10", "--concurrent", "4"
    )
    (secret,) = re.findall(r"^int8qa_\S+$", err, re.MULTILINE)
    (key,) = parse_key_file(out.encode(), "keys")
    assert hash_key(secret) == key.digest
    assert secret not in out
    assert (key.name, key.scope) == ("alice", "ask")
    assert (key.rate_per_s, key.burst, key.concurrent) == (2.5, 10, 4)


def test_lines_appended_to_a_file_are_listed(tmp_path: Path, monkeypatch):
    """`>> FILE`, then `keys list`: names, scopes and limits, no hash."""
    path = tmp_path / "keys"
    for arguments in (
        ["alice", "--rate", "0.5"],
        ["prometheus", "--scope", "metrics", "--concurrent", "2"],
    ):
        out, _ = run("new", *arguments)
        with path.open("a", encoding="utf-8") as file:
            file.write(out)
    expected = (
        "alice  ask  0.5/s, 1 at once  any number under way\n"
        "prometheus  metrics  any rate  2 under way\n"
    )
    assert run("list", str(path))[0] == expected
    monkeypatch.setenv("INT8QA_ACCESS__KEYS_FILE", str(path))
    assert run("list")[0] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "Alice"], "a key's name has"),
        (["new", "alice", "--burst", "2"], "without rate="),
        (["new", "alice", "--rate", "nan"], "rate= must be above 0"),
        (["list"], "no key file"),
        (["list", "/nowhere/keys"], "cannot read /nowhere/keys: No such file"),
    ],
)
def test_mistakes_are_configuration_errors(
    arguments: list[str], message: str, monkeypatch
):
    """One line that says what is wrong; no key is made."""
    monkeypatch.delenv("INT8QA_ACCESS__KEYS_FILE", raising=False)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        run(*arguments)
