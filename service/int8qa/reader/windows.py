"""A question and a context of any length to model inputs.

In: the tokens of both texts. Out: windows, each the question beside one stretch of
the context, overlapping their neighbours by ``doc_stride`` tokens. Windows are not
padded and not batched here, and no model limit is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from int8qa.errors import InputTooLargeError, InvalidInputError
from int8qa.reader.tokenizer import (
    Int32Array,
    PairTemplate,
    ReaderTokenizer,
    TextTokens,
)

MAX_WINDOW_TOKENS = 384
"""Source: transformers 5.2 ``QuestionAnsweringPipeline``, ``max_seq_len``."""
DOC_STRIDE_TOKENS = 128
"""Source: transformers 5.2 ``QuestionAnsweringPipeline``, ``doc_stride``."""


@dataclass(frozen=True, slots=True)
class Window:
    """One input of the model, S tokens long; the arrays are read-only.

    ``offsets`` and ``word_ids`` cover the context tokens alone: row ``i`` speaks of
    token ``context_start + i``. They are views of the whole document's arrays.
    """

    index: int
    """Position of the window in its document, from 0."""
    input_ids: Int32Array
    """[S]"""
    token_type_ids: Int32Array
    """[S]"""
    context_start: int
    """First context token; answers lie in [context_start, context_end)."""
    context_end: int
    offsets: Int32Array
    """[context_end - context_start, 2] half-open character spans in the context."""
    word_ids: Int32Array
    """[context_end - context_start]"""

    def __len__(self) -> int:
        return len(self.input_ids)


def split_windows(
    tokenizer: ReaderTokenizer,
    question: str,
    context: str,
    *,
    max_window_tokens: int = MAX_WINDOW_TOKENS,
    doc_stride: int = DOC_STRIDE_TOKENS,
    max_question_tokens: int | None = None,
) -> list[Window]:
    """Tokenize a question and a context and split them into windows.

    Args:
        tokenizer: the checkpoint's tokenizer.
        question: repeated at the head of each window.
        context: the document, of any length; the cost is linear in it.
        max_window_tokens: longest window S, special tokens included.
        doc_stride: context tokens that two neighbouring windows share.
        max_question_tokens: longer questions are cut to this; None never cuts, as
            the former pipeline did with every Rust tokenizer.

    Returns:
        At least one window; windows in document order, all but the last of
        ``max_window_tokens`` tokens when there are several.

    Raises:
        InvalidInputError: a text is blank, has no tokens or is no Unicode; the
            question leaves no room, or ``doc_stride`` does not fit into it.
    """
    for field, text in (("question", question), ("context", context)):
        if not text or text.isspace():
            raise InvalidInputError(
                field, f"{field} is empty; send at least one word of text"
            )
    return split_tokens(
        tokenizer.template,
        tokenizer.encode(question, field="question"),
        tokenizer.encode(context, field="context"),
        max_window_tokens=max_window_tokens,
        doc_stride=doc_stride,
        max_question_tokens=max_question_tokens,
    )


def split_tokens(
    template: PairTemplate,
    question: TextTokens,
    context: TextTokens,
    *,
    max_window_tokens: int = MAX_WINDOW_TOKENS,
    doc_stride: int = DOC_STRIDE_TOKENS,
    max_question_tokens: int | None = None,
) -> list[Window]:
    """Split tokens already at hand: many questions on one context encode it once.

    Arguments, result and errors as ``split_windows``.
    """
    for field, tokens in (("question", question), ("context", context)):
        if not len(tokens):
            raise InvalidInputError(
                field,
                f"{field} has no token the model can read (only control or blank "
                f"characters); send at least one word of text",
            )
    if max_question_tokens is not None and max_question_tokens < 1:
        raise InvalidInputError(
            "max_question_tokens",
            f"max_question_tokens is {max_question_tokens}; allowed: 1 or more",
        )
    question_ids = question.ids[:max_question_tokens]
    room = max_window_tokens - template.special_tokens - len(question_ids)
    _check_room(
        room,
        template=template,
        question_tokens=len(question_ids),
        context_tokens=len(context),
        max_window_tokens=max_window_tokens,
        doc_stride=doc_stride,
    )

    head = np.concatenate((template.before_ids, question_ids, template.between_ids))
    context_start = len(head)
    longest = min(room, len(context))
    types = _token_types(template, len(question_ids), longest)
    windows: list[Window] = []
    start = 0
    while True:
        end = min(start + room, len(context))
        ids = np.concatenate((head, context.ids[start:end], template.after_ids))
        ids.setflags(write=False)
        windows.append(
            Window(
                index=len(windows),
                input_ids=ids,
                token_type_ids=(
                    types
                    if end - start == longest
                    else _token_types(template, len(question_ids), end - start)
                ),
                context_start=context_start,
                context_end=context_start + end - start,
                offsets=_read_only(context.offsets[start:end]),
                word_ids=_read_only(context.word_ids[start:end]),
            )
        )
        if end == len(context):
            return windows
        start += room - doc_stride


def _check_room(
    room: int,
    *,
    template: PairTemplate,
    question_tokens: int,
    context_tokens: int,
    max_window_tokens: int,
    doc_stride: int,
) -> None:
    smallest = template.special_tokens + 2
    if max_window_tokens < smallest:
        raise InvalidInputError(
            "max_window_tokens",
            f"max_window_tokens is {max_window_tokens}; allowed: {smallest} or more, "
            f"for {template.special_tokens} special tokens and one token each of "
            f"question and context",
        )
    if room < 1:
        limit = max_window_tokens - template.special_tokens - 1
        raise InputTooLargeError(
            "question",
            f"question has {question_tokens} tokens; allowed: {limit} in windows of "
            f"{max_window_tokens} tokens. Shorten the question",
        )
    if doc_stride < 0:
        raise InvalidInputError(
            "doc_stride", f"doc_stride is {doc_stride}; allowed: 0 or more tokens"
        )
    # A context that fits into one window needs no overlap, so any stride will do.
    if context_tokens > room and doc_stride >= room:
        raise InvalidInputError(
            "doc_stride",
            f"doc_stride is {doc_stride} tokens; allowed: less than {room}, the room "
            f"that {question_tokens} question tokens leave in windows of "
            f"{max_window_tokens}. Lower doc_stride or shorten the question",
        )


def _token_types(
    template: PairTemplate, question_tokens: int, context_tokens: int
) -> Int32Array:
    return _read_only(
        np.concatenate(
            (
                template.before_types,
                np.full(question_tokens, template.question_type, dtype=np.int32),
                template.between_types,
                np.full(context_tokens, template.context_type, dtype=np.int32),
                template.after_types,
            )
        )
    )


def _read_only(array: Int32Array) -> Int32Array:
    array.setflags(write=False)
    return array
