from __future__ import annotations

import hashlib
import json
import threading
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from tokenizers import Tokenizer

from int8qa.errors import CheckpointError, InvalidInputError
from int8qa.reader.tokenizer import NO_WORD, ReaderTokenizer, TextTokens, _to_arrays
from tests.golden.pipeline_golden import CHECKPOINT, load_tokenizer
from tests.reader.strategies import texts

TOKENIZER_JSON = CHECKPOINT / "tokenizer.json"
SPECIAL_TOKENS = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_bert_template_is_read_off_the_post_processor(
    tokenizer: ReaderTokenizer,
) -> None:
    """[CLS] q [SEP] c [SEP] with types 0 and 1, padded with 0."""
    template = tokenizer.template
    assert template.before_ids.tolist() == [101]
    assert template.between_ids.tolist() == [102]
    assert template.after_ids.tolist() == [102]
    assert template.between_types.tolist() == [0]
    assert template.after_types.tolist() == [1]
    assert (template.question_type, template.context_type) == (0, 1)
    assert template.special_tokens == 3
    assert tokenizer.pad_id == 0


def test_roberta_template_is_read_off_the_post_processor(roberta_json: Path) -> None:
    """<s> q </s></s> c </s> with type 0 everywhere, padded with <pad>."""
    tokenizer = ReaderTokenizer.from_file(roberta_json)
    template = tokenizer.template
    assert template.before_ids.tolist() == [0]
    assert template.between_ids.tolist() == [2, 2]
    assert template.after_ids.tolist() == [2]
    assert (template.question_type, template.context_type) == (0, 0)
    assert template.special_tokens == 4
    assert tokenizer.pad_id == 1


def test_long_text_lets_other_threads_run(
    tokenizer: ReaderTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GIL is free while a text of the largest size is tokenized."""
    ticks = 0
    counted: list[int] = []
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    def count(encoding: Any) -> TextTokens:
        counted.append(ticks)
        return _to_arrays(encoding)

    monkeypatch.setattr("int8qa.reader.tokenizer._to_arrays", count)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        tokens = tokenizer.encode("a lighthouse keeper, " * 24_000)
    finally:
        stop.set()
        thread.join()
    assert len(tokens) == 96_000
    assert counted[0] > 10  # holding it, the other thread gets one turn at most


def test_fingerprint_is_the_sha256_of_the_file(tokenizer: ReaderTokenizer) -> None:
    """Build and gateway compare this hash; it must be the file's."""
    expected = hashlib.sha256(TOKENIZER_JSON.read_bytes()).hexdigest()
    assert tokenizer.fingerprint == expected


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    """A file that truncates to 256 and pads to 300 loses and adds no token here."""
    spec = json.loads(TOKENIZER_JSON.read_text(encoding="utf-8"))
    assert spec["truncation"]["max_length"] == 256
    rust = Tokenizer.from_str(json.dumps(spec))
    rust.enable_padding(length=300, pad_id=7, pad_token="[unused6]")
    path = tmp_path / "tokenizer.json"
    rust.save(str(path))
    tokenizer = ReaderTokenizer.from_file(path)
    assert len(tokenizer.encode("mill " * 1000)) == 1000
    assert len(tokenizer.encode("mill")) == 1
    assert tokenizer.pad_id == 7


def test_arrays_have_the_promised_types(tokenizer: ReaderTokenizer) -> None:
    """int32 ids [N], offsets [N, 2] and word ids [N]."""
    tokens = tokenizer.encode("An unaffable miller.")
    assert tokens.ids.dtype == tokens.offsets.dtype == tokens.word_ids.dtype == np.int32
    assert tokens.offsets.shape == (len(tokens), 2)
    assert tokens.word_ids.tolist() == [0, 1, 1, 1, 2, 3]


def test_empty_text_has_no_tokens(tokenizer: ReaderTokenizer) -> None:
    """Nothing in, arrays of length 0 out."""
    assert tokenizer.encode("").offsets.shape == (0, 2)


@given(text=texts(max_words=12))
def test_offsets_are_code_points_of_the_text(text: str) -> None:
    """Spans ascend inside the text, and each known token reads like its span."""
    tokenizer = load_tokenizer()
    tokens = tokenizer.encode(text)
    starts, ends = tokens.offsets[:, 0], tokens.offsets[:, 1]
    assert (starts >= 0).all()
    assert (ends <= len(text)).all()
    assert (starts < ends).all()
    assert (np.diff(starts) >= 0).all()
    for token_id, (start, end) in zip(tokens.ids, tokens.offsets, strict=True):
        token = tokenizer._tokenizer.id_to_token(int(token_id)).removeprefix("##")
        if token not in SPECIAL_TOKENS:
            assert token in fold_as_bert(text[start:end])


def fold_as_bert(text: str) -> str:
    """BERT's uncased normalisation, in Python: no controls, no accents, lower case."""
    kept = "".join(
        char
        for char in text
        # Its cleaning drops U+FFFD too, and of the controls that are blank keeps three.
        if char in "\t\n\r"
        or not (char == "\ufffd" or unicodedata.category(char).startswith("C"))
    )
    decomposed = unicodedata.normalize("NFD", kept)
    bare = "".join(char for char in decomposed if unicodedata.category(char) != "Mn")
    return bare.lower()


@given(text=texts(max_words=8))
def test_batch_encodes_as_one_by_one(text: str) -> None:
    """The batched variant differs in speed only."""
    tokenizer = load_tokenizer()
    batch = tokenizer.encode_batch([text, "mill", text])
    for tokens, single in zip(batch, [text, "mill", text], strict=True):
        alone = tokenizer.encode(single)
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.offsets.tolist() == alone.offsets.tolist()


@pytest.mark.parametrize("text", ["\ud800", "mill \udfff secretword", "\udcff" * 3])
def test_lone_surrogates_are_refused_by_field(
    tokenizer: ReaderTokenizer, text: str
) -> None:
    """The error names the field and the place, and repeats nothing of the text."""
    for encode in (
        lambda: tokenizer.encode(text, field="context"),
        lambda: tokenizer.encode_batch(["fine", text], field="context"),
    ):
        with pytest.raises(InvalidInputError, match="lone surrogate") as caught:
            encode()
        assert caught.value.field == "context"
        assert "secretword" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_tokens_without_a_word_are_marked() -> None:
    """A tokenizer that knows no words yields NO_WORD, not an error."""

    class Encoding:
        ids = (5, 6)
        offsets = ((0, 1), (1, 2))
        word_ids = (0, None)

    assert _to_arrays(Encoding()).word_ids.tolist() == [0, NO_WORD]


def test_threads_share_one_tokenizer(tokenizer: ReaderTokenizer) -> None:
    """Eight threads get what one alone gets."""
    samples = [f"mill number {number} " * (number + 1) for number in range(8)]
    expected = [tokenizer.encode(sample).ids.tolist() for sample in samples]
    results: list[list[list[int]]] = [[] for _ in samples]

    def work(slot: int) -> None:
        for _ in range(20):
            results[slot].append(tokenizer.encode(samples[slot]).ids.tolist())

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot, wanted in enumerate(expected):
        assert results[slot] == [wanted] * 20


def test_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    """The message names the file that is not there."""
    with pytest.raises(CheckpointError, match=r"nowhere\.json"):
        ReaderTokenizer.from_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_foreign_file_is_a_checkpoint_error(tmp_path: Path, data: bytes) -> None:
    """Whatever the Rust library says of a file, one class comes out."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ReaderTokenizer.from_file(path)


def test_tokenizer_without_pair_template_is_refused(tmp_path: Path) -> None:
    """Without special tokens there is no null position and no separation."""
    rust = Tokenizer.from_file(str(TOKENIZER_JSON))
    spec = json.loads(rust.to_str())
    spec["post_processor"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(CheckpointError, match="post-processor"):
        ReaderTokenizer.from_file(path)


def test_padding_token_may_be_named_and_must_exist() -> None:
    """pad_token wins over the search; an unknown one is refused."""
    assert ReaderTokenizer.from_file(TOKENIZER_JSON, pad_token="[MASK]").pad_id == 103
    with pytest.raises(CheckpointError, match="<nopad>"):
        ReaderTokenizer.from_file(TOKENIZER_JSON, pad_token="<nopad>")
