"""Text to token arrays.

In: a ``tokenizer.json`` once, then strings. Out: token ids, character offsets and
word ids of one text without special tokens, and the template that joins a question
and a context for the model. Knows nothing of windows, padding or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from int8qa.errors import CheckpointError, InvalidInputError

Int32Array = npt.NDArray[np.int32]

NO_WORD = -1
"""Word id of a token that belongs to no word."""

PAD_TOKENS = ("[PAD]", "<pad>")
"""Padding tokens looked for when the file itself names none."""

_PROBE = ("a", "b")
_SHORT_CHARS = 4_000
"""Up to so many are encoded in the calling thread with the GIL held, about a
millisecond. Of longer ones that would stop every other thread; ``encode_batch``
releases the GIL, but hands even a single text to a thread pool."""
_PART = 8192
"""Numbers turned into an array at a time."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """One text in tokens, without special tokens; N may be 0."""

    ids: Int32Array
    """[N] vocabulary ids."""
    offsets: Int32Array
    """[N, 2] half-open character spans in the text, in Unicode code points."""
    word_ids: Int32Array
    """[N] number of the word each token belongs to, or ``NO_WORD``."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """How the model wants question and context joined.

    BERT: ``[CLS] q [SEP] c [SEP]``; RoBERTa: ``<s> q </s></s> c </s>``.
    """

    before_ids: Int32Array
    between_ids: Int32Array
    after_ids: Int32Array
    before_types: Int32Array
    between_types: Int32Array
    after_types: Int32Array
    question_type: int
    context_type: int

    @property
    def special_tokens(self) -> int:
        """Tokens that the template adds to a pair."""
        return len(self.before_ids) + len(self.between_ids) + len(self.after_ids)


class ReaderTokenizer:
    """A Rust tokenizer that only ever encodes: safe to share between threads.

    Truncation and padding of the file are switched off; windows and the batcher
    do both.
    """

    __slots__ = ("_tokenizer", "fingerprint", "pad_id", "template")

    def __init__(self, tokenizer: Tokenizer, *, pad_id: int, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self.template = _derive_template(tokenizer)
        self.pad_id = pad_id
        self.fingerprint = fingerprint

    @classmethod
    def from_file(
        cls, tokenizer_json: Path, *, pad_token: str | None = None
    ) -> ReaderTokenizer:
        """Load a ``tokenizer.json``; ``fingerprint`` is the SHA-256 of its bytes.

        Args:
            tokenizer_json: a file written by the ``tokenizers`` library.
            pad_token: the padding token; by default the one the file pads with,
                else the first of ``PAD_TOKENS`` in the vocabulary.

        Raises:
            CheckpointError: the file is missing, is no tokenizer, has no padding
                token, or does not put the question first between special tokens.
        """
        try:
            data = tokenizer_json.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the tokenizer {tokenizer_json}: {error.strerror}. Point "
                f"to a checkpoint directory that holds a tokenizer.json"
            ) from error
        return cls.from_bytes(data, str(tokenizer_json), pad_token=pad_token)

    @classmethod
    def from_bytes(
        cls, data: bytes, source: str, *, pad_token: str | None = None
    ) -> ReaderTokenizer:
        """As ``from_file``, of a file's content; ``source`` is its name in errors."""
        try:
            tokenizer = Tokenizer.from_buffer(data)
        # The Rust library raises bare Exception for every fault of a file.
        except Exception as error:
            raise CheckpointError(
                f"{source} is no tokenizer.json that the tokenizers library "
                f"reads: {error}"
            ) from error
        pad_id = _find_pad_id(tokenizer, pad_token)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(
            tokenizer, pad_id=pad_id, fingerprint=hashlib.sha256(data).hexdigest()
        )

    def encode(self, text: str, *, field: str = "text") -> TextTokens:
        """Tokenize one text without special tokens, at any length.

        Raises:
            InvalidInputError: ``text`` holds lone surrogates; names ``field``.
        """
        _check_encodable(text, field)
        if len(text) <= _SHORT_CHARS:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return _to_arrays(encoding)

    def encode_batch(
        self, texts: Sequence[str], *, field: str = "text"
    ) -> list[TextTokens]:
        """Tokenize many texts, in parallel where the library may; as ``encode``."""
        for text in texts:
            _check_encodable(text, field)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_to_arrays(encoding) for encoding in encodings]


def _check_encodable(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # `from None`: the original error carries the whole text.
        raise InvalidInputError(
            field,
            f"{field} holds a lone surrogate at character {error.start}, which is no "
            f"Unicode text; in JSON escapes, send whole surrogate pairs",
        ) from None


def _to_arrays(encoding: Any) -> TextTokens:
    ids = np.array(encoding.ids, dtype=np.int32)
    # Flattening first is 4 times as fast as an array of tuples; in parts, since other
    # threads get the GIL only in between.
    flat = chain.from_iterable(encoding.offsets)
    offsets = np.empty(2 * len(ids), dtype=np.int32)
    for first in range(0, len(offsets), _PART):
        part = offsets[first : first + _PART]
        part[:] = np.fromiter(flat, dtype=np.int32, count=len(part))
    words = encoding.word_ids
    try:
        word_ids = np.array(words, dtype=np.int32)
    except TypeError:  # some tokens belong to no word
        word_ids = np.array(
            [NO_WORD if word is None else word for word in words], dtype=np.int32
        )
    return TextTokens(ids, offsets.reshape(-1, 2), word_ids)


def _find_pad_id(tokenizer: Tokenizer, pad_token: str | None) -> int:
    if pad_token is None and tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    candidates = PAD_TOKENS if pad_token is None else (pad_token,)
    for candidate in candidates:
        pad_id = tokenizer.token_to_id(candidate)
        if pad_id is not None:
            return int(pad_id)
    raise CheckpointError(
        f"the tokenizer has no padding token: its vocabulary lacks "
        f"{' and '.join(candidates)}. Name the token with pad_token"
    )


def _derive_template(tokenizer: Tokenizer) -> PairTemplate:
    """Read the template off one encoded probe pair, whatever the post-processor is."""
    probe = tokenizer.encode(*_PROBE)
    sequences = [-1 if part is None else part for part in probe.sequence_ids]
    ids = np.array(probe.ids, dtype=np.int32)
    types = np.array(probe.type_ids, dtype=np.int32)
    question = [i for i, part in enumerate(sequences) if part == 0]
    context = [i for i, part in enumerate(sequences) if part == 1]
    if not question or not context or question[-1] > context[0] or question[0] == 0:
        raise CheckpointError(
            "the tokenizer's post-processor does not join a pair as special tokens, "
            "question, special tokens, context; checkpoints for extractive question "
            "answering with such a template (BERT, RoBERTa and their kin) are needed"
        )
    before = slice(0, question[0])
    between = slice(question[-1] + 1, context[0])
    after = slice(context[-1] + 1, len(ids))
    return PairTemplate(
        before_ids=ids[before],
        between_ids=ids[between],
        after_ids=ids[after],
        before_types=types[before],
        between_types=types[between],
        after_types=types[after],
        question_type=int(types[question[0]]),
        context_type=int(types[context[0]]),
    )
