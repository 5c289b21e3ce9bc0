"""``int8qa keys``: API keys made and listed.

In: a name and limits; or a key file. Out: on standard output what belongs into the
file, or what it holds; on standard error, once, the key itself, which is kept nowhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int8qa.errors import ConfigurationError
from int8qa.gateway.key_file import (
    Scope,
    build_key,
    generate_key,
    hash_key,
    parse_key_file,
)
from int8qa.settings import load_settings

_keys = typer.Typer(
    help="API keys: make one, list those of a file.", no_args_is_help=True
)


def add_key_commands(app: typer.Typer) -> None:
    """Add the group ``keys`` to the command line."""
    app.add_typer(_keys, name="keys")


@_keys.command("new")
def make_key(
    name: Annotated[
        str, typer.Argument(help="Shown in metrics and logs: a-z 0-9 . _ -")
    ],
    scope: Annotated[
        Scope, typer.Option(help="ask: all but /metrics; metrics: that alone.")
    ] = "ask",
    rate: Annotated[
        float | None, typer.Option(help="Questions a second on average.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Questions at once; needs --rate.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Requests under way at once.")
    ] = None,
) -> None:
    """Make a key: `int8qa keys new NAME >> FILE` shows it once, and keeps its hash."""
    secret = generate_key()
    digest = hash_key(secret)
    assert digest is not None
    try:
        key = build_key(
            name,
            digest,
            scope=scope,
            rate_per_s=rate,
            burst=burst,
            concurrent=concurrent,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    typer.echo("the key, shown this once; give it to the client:", err=True)
    typer.echo(secret, err=True)
    typer.echo("the line for INT8QA_ACCESS__KEYS_FILE:", err=True)
    typer.echo(key.format_line())


@_keys.command("list")
def list_keys(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="The key file.  [default: INT8QA_ACCESS__KEYS_FILE]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check a key file, and list its keys' names, scopes and limits."""
    path = file or Path(load_settings().access.keys_file)
    if path == Path():
        raise ConfigurationError("no key file: name one, or INT8QA_ACCESS__KEYS_FILE")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    for key in parse_key_file(content, str(path)):
        rate = "any rate"
        if key.rate_per_s is not None:
            rate = f"{key.rate_per_s:g}/s, {key.capacity} at once"
        under_way = "any number" if key.concurrent is None else key.concurrent
        typer.echo(f"{key.name}  {key.scope}  {rate}  {under_way} under way")
