from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from int8qa.errors import InputTooLargeError, InvalidInputError
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import Window, split_tokens, split_windows
from tests.golden.pipeline_golden import CHECKPOINT, load_tokenizer
from tests.reader.strategies import texts

QUESTION = "Who built the mill?"
QUESTION_TOKENS = 5
RUST = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
RUST.no_padding()


def split_by_rust(
    rust: Tokenizer, question: str, context: str, max_window_tokens: int, stride: int
) -> list[tuple[list[int], list[int], list[tuple[int, int]]]]:
    """The Rust library's own truncation with overflow: ids, types, context offsets."""
    rust.enable_truncation(max_window_tokens, stride=stride, strategy="only_second")
    whole = rust.encode(question, context)
    return [
        (
            part.ids,
            part.type_ids,
            [
                offset
                for offset, sequence in zip(
                    part.offsets, part.sequence_ids, strict=True
                )
                if sequence == 1
            ],
        )
        for part in [whole, *whole.overflowing]
    ]


def as_rust(
    windows: list[Window],
) -> list[tuple[list[int], list[int], list[tuple[int, int]]]]:
    return [
        (
            window.input_ids.tolist(),
            window.token_type_ids.tolist(),
            [tuple(offset) for offset in window.offsets.tolist()],
        )
        for window in windows
    ]


@given(
    context=texts(max_words=60),
    room=st.integers(2, 40),
    stride=st.integers(0, 39),
)
def test_windows_are_those_of_the_rust_library(
    context: str, room: int, stride: int
) -> None:
    """Tokenizing once and slicing equals the library's truncation with stride."""
    assume(stride < room)
    tokenizer = load_tokenizer()
    assume(len(tokenizer.encode(context)))
    size = room + QUESTION_TOKENS + 3
    windows = split_windows(
        tokenizer, QUESTION, context, max_window_tokens=size, doc_stride=stride
    )
    assert as_rust(windows) == split_by_rust(RUST, QUESTION, context, size, stride)


@given(text=texts(max_words=40), room=st.integers(8, 40), stride=st.integers(0, 7))
def test_byte_level_windows_are_those_of_the_rust_library(
    roberta_json: Path, text: str, room: int, stride: int
) -> None:
    """The same for RoBERTa's template, where one emoji is several tokens."""
    context = "mill" + text
    tokenizer = ReaderTokenizer.from_file(roberta_json)
    rust = Tokenizer.from_file(str(roberta_json))
    size = room + len(tokenizer.encode(QUESTION)) + 4
    windows = split_windows(
        tokenizer, QUESTION, context, max_window_tokens=size, doc_stride=stride
    )
    assert as_rust(windows) == split_by_rust(rust, QUESTION, context, size, stride)


@given(
    context_tokens=st.integers(1, 400),
    room=st.integers(1, 60),
    stride=st.integers(0, 59),
)
def test_windows_cover_the_context_and_overlap_by_doc_stride(
    context_tokens: int, room: int, stride: int
) -> None:
    """Each token lies in some window; neighbours share exactly doc_stride tokens."""
    assume(stride < room)
    tokenizer = load_tokenizer()
    context = "x " * context_tokens
    windows = split_windows(
        tokenizer,
        QUESTION,
        context,
        max_window_tokens=room + QUESTION_TOKENS + 3,
        doc_stride=stride,
    )
    stretches = [
        range(w.offsets[0, 0] // 2, w.offsets[-1, 1] // 2 + 1) for w in windows
    ]
    assert set().union(*stretches) == set(range(context_tokens))
    for left, right in itertools.pairwise(stretches):
        assert len(set(left) & set(right)) == stride
    assert [window.index for window in windows] == list(range(len(windows)))


def test_window_layout(tokenizer: ReaderTokenizer) -> None:
    """Question, context and special tokens lie where the fields say."""
    (window,) = split_windows(tokenizer, QUESTION, "Orla built it.")
    assert len(window) == 3 + QUESTION_TOKENS + 5
    assert window.input_ids.dtype == window.token_type_ids.dtype == np.int32
    assert window.input_ids[0] == 101
    assert window.input_ids[[window.context_start - 1, window.context_end]].tolist() == [102, 102]  # fmt: skip
    assert window.context_end - window.context_start == len(window.offsets) == 5
    assert window.token_type_ids.tolist() == [0] * 7 + [1] * 6


def test_windows_cannot_be_written_to(tokenizer: ReaderTokenizer) -> None:
    """Windows share arrays, so none may be changed through one."""
    windows = split_windows(tokenizer, QUESTION, "mill " * 900)
    assert len(windows) > 2
    assert windows[0].token_type_ids is windows[1].token_type_ids
    for array in (
        windows[0].input_ids,
        windows[0].token_type_ids,
        windows[0].offsets,
        windows[0].word_ids,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_document_of_five_hundred_windows(tokenizer: ReaderTokenizer) -> None:
    """Length is no limit here; admission is the gateway's."""
    windows = split_windows(tokenizer, QUESTION, "mill " * 124_000)
    assert len(windows) == 500
    assert {len(window) for window in windows[:-1]} == {384}


def test_shared_context_is_encoded_once(tokenizer: ReaderTokenizer) -> None:
    """split_tokens on ready tokens gives what split_windows gives."""
    context = "The mill on the Olsa was built in 1788. " * 40
    tokens = tokenizer.encode(context)
    direct = split_windows(tokenizer, QUESTION, context)
    shared = split_tokens(tokenizer.template, tokenizer.encode(QUESTION), tokens)
    assert as_rust(direct) == as_rust(shared)


def test_long_question_is_kept_unless_a_limit_is_given(
    tokenizer: ReaderTokenizer,
) -> None:
    """As the former pipeline: no cut by itself; with a limit, exactly that many."""
    question = "why " * 100
    (window,) = split_windows(tokenizer, question, "Because.")
    assert window.context_start == 102
    (window,) = split_windows(tokenizer, question, "Because.", max_question_tokens=64)
    assert window.context_start == 66


@pytest.mark.parametrize("blank", ["", " ", "\r\n\t \u00a0", "\x00", "\u200b\u200b"])
@pytest.mark.parametrize("field", ["question", "context"])
def test_blank_text_is_refused_by_field(
    tokenizer: ReaderTokenizer, field: str, blank: str
) -> None:
    """Nothing, white space and invisible characters are no question and no context."""
    parts = {"question": QUESTION, "context": "Orla."} | {field: blank}
    with pytest.raises(InvalidInputError) as caught:
        split_windows(tokenizer, **parts)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("max_window_tokens", {"max_window_tokens": 4}),
        ("doc_stride", {"doc_stride": -1}),
        ("doc_stride", {"max_window_tokens": 20, "doc_stride": 12}),
        ("max_question_tokens", {"max_question_tokens": 0}),
    ],
)
def test_impossible_sizes_are_refused_by_field(
    tokenizer: ReaderTokenizer, field: str, options: dict[str, int]
) -> None:
    """The message names the value and the limit, and nothing of the text."""
    with pytest.raises(InvalidInputError, match="allowed") as caught:
        split_windows(tokenizer, QUESTION, "secretword " * 50, **options)
    assert caught.value.field == field
    assert str(options[field]) in str(caught.value)
    assert "secretword" not in str(caught.value)


def test_largest_allowed_stride_is_accepted(tokenizer: ReaderTokenizer) -> None:
    """A stride of room - 1 moves one token at a time, and ends."""
    windows = split_windows(
        tokenizer, QUESTION, "mill " * 30, max_window_tokens=20, doc_stride=11
    )
    assert len(windows) == 30 - 12 + 1


def test_stride_does_not_matter_for_a_context_that_fits(
    tokenizer: ReaderTokenizer,
) -> None:
    """As the former pipeline: doc_stride is only held to the room when it is used."""
    (window,) = split_windows(
        tokenizer, QUESTION, "mill " * 12, max_window_tokens=20, doc_stride=19
    )
    assert len(window) == 20


def test_question_that_leaves_no_room_is_too_large(tokenizer: ReaderTokenizer) -> None:
    """The message tells the most question tokens that would do."""
    with pytest.raises(InputTooLargeError, match="allowed: 380 ") as caught:
        split_windows(tokenizer, "why " * 381, "Because.")
    assert caught.value.field == "question"
    assert len(split_windows(tokenizer, "why " * 380, "Because.", doc_stride=0)) == 2


def test_lone_surrogates_name_their_field(tokenizer: ReaderTokenizer) -> None:
    """The question's fault is not blamed on the context, nor the reverse."""
    for field in ("question", "context"):
        parts = {"question": QUESTION, "context": "Orla."} | {field: "a\ud800b"}
        with pytest.raises(InvalidInputError) as caught:
            split_windows(tokenizer, **parts)
        assert caught.value.field == field
