"""Tokenizers for the reader's tests: the shipped one, and a small byte-level one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from int8qa.reader.tokenizer import ReaderTokenizer
from tests.golden.pipeline_golden import CHECKPOINT

TOKENIZER_JSON = CHECKPOINT / "tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer() -> ReaderTokenizer:
    """The shipped checkpoint's tokenizer: WordPiece, ``[CLS] q [SEP] c [SEP]``."""
    return ReaderTokenizer.from_file(TOKENIZER_JSON)


@pytest.fixture(scope="session")
def rust_tokenizer() -> Tokenizer:
    """The same file in the bare Rust library: the oracle for windows."""
    return Tokenizer.from_file(str(TOKENIZER_JSON))


@pytest.fixture(scope="session")
def roberta_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of RoBERTa's build: ``<s> q </s></s> c </s>``, all types 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["the mill on the river was built by the miller", "who built the mill"],
        trainer,
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")),
        ("<s>", tokenizer.token_to_id("<s>")),
        trim_offsets=True,
        add_prefix_space=False,
    )
    path = tmp_path_factory.mktemp("roberta") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
