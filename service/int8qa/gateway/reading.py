"""The reader's work in the gateway: text to windows, logits to answers.

Long texts and many windows in threads, so that nobody else waits for them; short ones
on the event loop, since a thread's turn costs more than they do.

In: questions with their texts; what the batcher gave for their windows. Out: windows,
and spans, or one of int8qa's errors. Knows no engine, no batch and no HTTP.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from int8qa.errors import (
    DeadlineExceededError,
    InputTooLargeError,
    InvalidInputError,
    QueueFullError,
)
from int8qa.gateway.query import Query
from int8qa.gateway.submission import WindowResult
from int8qa.gateway.waiting import finish_within
from int8qa.reader.spans import Span, decode_spans
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_tokens
from int8qa.settings import LimitSettings

_INLINE_WINDOWS = 4
"""Up to so many windows are decoded on the event loop: a thread costs more."""
_INLINE_CHARS = 4_000
"""Up to so many are tokenized on the event loop, about a millisecond. A thread's turn
costs a lone question 0.7 ms where the engine has just left its core
(``docs/performance.md``)."""
_MAX_THREADS = 4
_PENDING_CONTEXTS = 8
"""Longest contexts' worth of characters that may wait for a tokenizing thread."""

T = TypeVar("T")


class Reading:
    """Tokenizes and decodes off the event loop; opened by ``start``.

    Args:
        tokenizer: the one the models were built with.
        limits: what a request may hold.
        clock: what deadlines are on.
    """

    def __init__(
        self,
        tokenizer: ReaderTokenizer,
        limits: LimitSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._clock = clock
        self._threads: ThreadPoolExecutor | None = None
        self._pending_chars = 0

    def start(self) -> None:
        """Have threads; they begin with the first text."""
        self._threads = ThreadPoolExecutor(
            min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="reader"
        )

    def close(self) -> None:
        """Let the threads end; waits for none."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def check_texts(self, query: Query) -> None:
        """Refuse what needs no tokenizer to be refused.

        Raises:
            InvalidInputError: question or context is blank, or longer than allowed.
        """
        limits = self._limits
        for field, text, limit in (
            ("question", query.question, limits.max_question_chars),
            ("context", query.context, limits.max_context_chars),
        ):
            if not text or text.isspace():
                raise InvalidInputError(
                    field, f"{field} is blank; send at least one word of text"
                )
            if len(text) > limit:
                raise InputTooLargeError(
                    field,
                    f"{field} has {len(text)} characters; allowed are {limit}. Send "
                    f"less text, or raise INT8QA_LIMITS__MAX_{field.upper()}_CHARS",
                )

    async def split(self, query: Query, deadline: float) -> list[Window]:
        """Tokenize a question and its context, and cut windows.

        Args:
            query: the question.
            deadline: on ``clock``.

        Raises:
            InvalidInputError: a field cannot be answered as given, or needs more
                windows than are allowed.
            QueueFullError: too much text waits for a thread.
            DeadlineExceededError: no thread had it done in time.
        """
        chars = len(query.question) + len(query.context)
        if chars <= _INLINE_CHARS:
            return self._split_now(query)
        allowed = _PENDING_CONTEXTS * self._limits.max_context_chars
        if self._pending_chars and self._pending_chars + chars > allowed:
            raise QueueFullError(
                f"{self._pending_chars} characters wait to be tokenized; allowed are "
                f"{allowed}. Ask again in a second"
            )
        self._pending_chars += chars
        try:
            return await self._run_in_thread(self._split_now, query, deadline=deadline)
        finally:
            self._pending_chars -= chars

    async def decode(
        self,
        query: Query,
        windows: Sequence[Window],
        results: Sequence[WindowResult],
        deadline: float,
    ) -> list[Span]:
        """The best answers of one precision, best first.

        Args:
            query: the question.
            windows: its windows.
            results: of each window, in order.
            deadline: on ``clock``.

        Raises:
            DeadlineExceededError: no thread had it done in time.
            EngineOutputError: the logits are no answer.
        """

        def decode() -> list[Span]:
            return decode_spans(
                query.context,
                windows,
                [result.start for result in results],
                [result.end for result in results],
                top_k=query.top_k,
                max_answer_tokens=query.max_answer_tokens,
                allow_no_answer=query.allow_no_answer,
                null_score_diff_threshold=query.null_score_diff_threshold,
                align_to_words=query.align_to_words,
            )

        if len(windows) <= _INLINE_WINDOWS:
            return decode()
        return await self._run_in_thread(decode, deadline=deadline)

    def _split_now(self, query: Query) -> list[Window]:
        question = self._tokenizer.encode(query.question, field="question")
        context = self._tokenizer.encode(query.context, field="context")
        question_tokens = len(question)
        if query.max_question_tokens is not None:
            question_tokens = min(question_tokens, query.max_question_tokens)
        room = (
            query.max_window_tokens
            - self._tokenizer.template.special_tokens
            - question_tokens
        )
        # Counted before they are made: a stride just below the room asks for a
        # window per token. What makes no sense at all is the reader's to refuse.
        step = room - query.doc_stride
        limit = self._limits.max_windows
        if step > 0 and len(context) > room:
            windows = 1 + -(-(len(context) - room) // step)
            if windows > limit:
                raise InputTooLargeError(
                    "context",
                    f"context needs {windows} windows of {query.max_window_tokens} "
                    f"tokens that overlap by {query.doc_stride}; allowed are {limit}. "
                    f"Send less text, lower doc_stride, or raise "
                    f"INT8QA_LIMITS__MAX_WINDOWS",
                )
        return split_tokens(
            self._tokenizer.template,
            question,
            context,
            max_window_tokens=query.max_window_tokens,
            doc_stride=query.doc_stride,
            max_question_tokens=query.max_question_tokens,
        )

    async def _run_in_thread(
        self, work: Callable[..., T], *arguments: object, deadline: float
    ) -> T:
        """Run blocking work in a thread; a caller that leaves does not stop it."""
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, work, *arguments
        )
        try:
            return await finish_within(future, deadline - self._clock())
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                "the text was not tokenized or decoded before the deadline; send less "
                "text, or raise INT8QA_LIMITS__REQUEST_TIMEOUT_S"
            ) from None
