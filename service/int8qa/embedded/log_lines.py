"""Triton's output, line by line, as log records.

In: one line as `tritonserver` or a Python stub wrote it. Out: its level, its
source and its message without the timestamp; and, of many lines, the reason why
Triton did not start. Knows no process.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

_LEVELS = {
    "I": logging.INFO,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "F": logging.CRITICAL,
}
_GLOG = re.compile(
    r"^(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?P<source>[^\s\]]+:\d+)\] *"
    r"(?P<message>.*)$"
)
_LOAD_FAILURE = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)", re.DOTALL
)
_TABLE = re.compile(r"^(\+[-+]+\+|\|.*\|)$")
_HARMLESS = (
    # Triton 2.51 says this as an error on every machine without a GPU.
    "CudaDriverHelper has not been initialized.",
)


@dataclass(frozen=True)
class LogLine:
    """One line of Triton's output."""

    level: int
    source: str
    """``file:line`` in Triton; empty for what is printed without one."""
    message: str

    @property
    def is_banner(self) -> bool:
        """True for the tables of the start-up banner and for empty lines."""
        return self.level <= logging.DEBUG


def parse_log_line(text: str) -> LogLine:
    """Split a raw line into level, source and message (one line, not quoted)."""
    text = text.rstrip()
    match = _GLOG.match(text)
    if match is None:
        if not text or _TABLE.match(text):
            return LogLine(logging.DEBUG, "", text)
        is_error = text.startswith(("error:", "Error:"))
        return LogLine(logging.ERROR if is_error else logging.INFO, "", text)
    message = _unquote(match["message"])
    level = _LEVELS[match["level"]]
    if not message or message in _HARMLESS:
        level = logging.DEBUG
    return LogLine(level, match["source"], message)


def find_failure(lines: Iterable[LogLine]) -> str:
    """Say in one line why Triton ended, in its own words.

    Models that did not load come first; else the last errors; else the last lines.
    """
    told = [line for line in lines if not line.is_banner]
    by_model = {
        match["model"]: match["reason"]
        for match in (_LOAD_FAILURE.search(line.message) for line in told)
        if match
    }
    if by_model:
        return "; ".join(f"model {m} does not load: {r}" for m, r in by_model.items())
    errors = [line.message for line in told if line.level >= logging.ERROR]
    last = errors[-3:] or [line.message for line in told[-5:]]
    return "; ".join(dict.fromkeys(last)) or "it wrote nothing"


def _unquote(message: str) -> str:
    """Undo Triton's JSON quoting and fold the message into one line."""
    if message.startswith('"') and message.rstrip().endswith('"'):
        try:
            message = json.loads(message)
        except ValueError:
            message = message.strip()[1:-1]
    return " ".join(part.strip() for part in message.splitlines() if part.strip())
