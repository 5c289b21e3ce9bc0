"""Structured logs on standard error, one line per event.

In: events of structlog and of the standard library's loggers (uvicorn's too). Out:
console lines or JSON. Exceptions are written as class names and frames, without
their messages: a library's message may quote a user's text.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO

import orjson
import structlog

from int8qa.errors import Int8qaError
from int8qa.settings import Settings

_UVICORN_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The gateway's logger."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(
        "int8qa.gateway"
    )
    return logger


def configure_logging(
    settings: Settings, *, stream: TextIO | None = None, worker: int | None = None
) -> None:
    """Give every logger of the process one format; call once, at start.

    Args:
        settings: ``log_level`` and ``log_format``.
        stream: where lines go; standard error by default.
        worker: number of this process among several, for each line.
    """

    def name_worker(
        _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        return {**event, "worker": worker}

    target = sys.stderr if stream is None else stream
    before: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _strip_exceptions,
    ]
    if worker is not None:
        before.insert(0, name_worker)
    renderer: structlog.typing.Processor
    as_json = settings.log_format == "json"
    if settings.log_format == "auto":
        as_json = not target.isatty()
    if as_json:
        renderer = structlog.processors.JSONRenderer(serializer=_dump_line)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=target.isatty(), pad_event_to=0, sort_keys=False
        )
    level = settings.log_level.upper()
    # Ours go straight to the stream: through the standard library's loggers, which
    # are for those of others, a line costs several times as much.
    lines = _Lines(target)
    structlog.configure(
        processors=[*before, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=lambda *_names: lines,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _UVICORN_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # Ours is the one line per request.
    logging.getLogger("uvicorn.access").disabled = True


class _Lines:
    """Where finished lines go, whole and at once; a stream that is gone loses them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = write


def describe_exception(error: BaseException) -> list[str]:
    """Class names and frames of an exception and its causes, innermost cause last.

    Messages are kept only of our own errors, which hold no text of a user.
    """
    lines: list[str] = []
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        name = f"{type(current).__module__}.{type(current).__qualname__}"
        own = isinstance(current, Int8qaError)
        lines.append(f"{name}: {current}" if own else name)
        lines.extend(
            f"  {frame.filename}:{frame.lineno} in {frame.name}"
            for frame in traceback.extract_tb(current.__traceback__)
        )
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return lines


def _strip_exceptions(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    info = event.pop("exc_info", None)
    event.pop("exception", None)
    error = _find_exception(info)
    if error is not None:
        event["failure"] = describe_exception(error)
    return event


def _find_exception(
    info: BaseException
    | tuple[type[BaseException], BaseException, TracebackType | None]
    | bool
    | None,
) -> BaseException | None:
    if isinstance(info, BaseException):
        return info
    if isinstance(info, tuple):
        return info[1]
    return sys.exc_info()[1] if info else None


def _dump_line(event: Any, **_options: Any) -> str:
    return orjson.dumps(event, default=repr).decode()
