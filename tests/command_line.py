"""``int8qa`` with arguments, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Finished(NamedTuple):
    """What a shell would see."""

    code: int
    out: str
    err: str


Run = Callable[..., Finished]


def check_one_line(finished: Finished, code: int, *parts: str) -> None:
    """An error: its code, nothing on standard output, one line on standard error."""
    assert (finished.code, finished.out) == (code, ""), finished.err
    lines = finished.err.strip().splitlines()
    assert len(lines) == 1, finished.err
    assert lines[0].startswith("int8qa: ")
    assert "Traceback" not in finished.err
    for part in parts:
        assert part in lines[0]
