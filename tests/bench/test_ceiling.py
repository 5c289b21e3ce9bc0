"""The engine alone: full batches, every answer, nothing but the engine on the clock."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.bench.ceiling import fill_batches, run_engine
from int8qa.bench.peer_load import PeerSpec
from int8qa.bench.stock import sort_batches
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKENIZER_FILENAME
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import CONTEXT, KEEPER, TOKENIZER_JSON, build_contract


@given(
    st.lists(st.sampled_from([32, 64, 128, 384]), max_size=60),
    st.integers(min_value=1, max_value=2048),
)
def test_batches_hold_every_window_once(lengths: list[int], tokens: int) -> None:
    """Of one length each, within the budget, and full but for the last of a length."""
    batches = fill_batches(lengths, tokens)
    members = [number for _, numbers in batches for number in numbers]
    assert sorted(members) == list(range(len(lengths)))
    full: Counter[int] = Counter()
    for length, numbers in batches:
        assert {lengths[number] for number in numbers} == {length}
        size = len(numbers)
        assert size & (size - 1) == 0
        assert size == 1 or size * length <= tokens
        most = max(1, tokens // length)
        full[length] += 2 * size > most
    for length, count in Counter(lengths).items():
        most = 1 << (max(1, tokens // length).bit_length() - 1)
        assert full[length] >= count // most


@pytest.mark.parametrize(("tokens", "streams"), [(64, 1), (4096, 1), (64, 3)])
def test_answers_are_those_of_the_engine(
    tokens: int, streams: int, tmp_path: Path
) -> None:
    """A long document of several windows among short ones; shapes are warmed."""
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    (tmp_path / TOKENIZER_FILENAME).write_bytes(TOKENIZER_JSON.read_bytes())
    contract = build_contract(tokenizer)
    wanted = tokenizer.encode(KEEPER, field="context").ids.tolist()
    shapes: list[tuple[int, ...]] = []

    def infer(feed: Any) -> Any:
        ids = feed[INPUT_IDS]
        shapes.append(ids.shape)
        assert ids.shape == feed[ATTENTION_MASK].shape
        start = np.zeros(ids.shape, np.float32)
        end = np.zeros(ids.shape, np.float32)
        for row, line in enumerate(ids.tolist()):
            for place in range(len(line)):
                if line[place : place + len(wanted)] == wanted:
                    start[row, place] = end[row, place + len(wanted) - 1] = 20.0
        return start, end

    filler = "Snow fell on the quay. " * 200
    items = [
        {"id": f"q{i}", "question": "Who kept it?", "context": context}
        for i, context in enumerate([CONTEXT, filler + CONTEXT, CONTEXT])
    ]
    questions = tmp_path / "items.json"
    questions.write_text(json.dumps(items))
    spec = PeerSpec(
        url="",
        questions=str(questions),
        outcome=str(tmp_path / "outcome.json"),
        repository=str(tmp_path),
        concurrency=1,
        warm_up=0,
    )
    outcome = run_engine(
        spec,
        contract,
        [infer] * streams,
        lambda lengths: fill_batches(lengths, tokens),
    )
    assert outcome.answers == dict.fromkeys(("q0", "q1", "q2"), KEEPER)
    assert len(outcome.latency_ms) == 3
    assert min(outcome.latency_ms) > 0
    warmed = [shape for shape in dict.fromkeys(shapes) for _ in range(streams)]
    assert shapes[: len(warmed)] == warmed
    assert {length for _, length in shapes} <= set(contract.sequence_buckets)


@given(
    st.lists(st.sampled_from([32, 64, 128, 384]), max_size=60),
    st.integers(min_value=1, max_value=16),
)
def test_stock_batches_are_sorted_and_padded_to_the_longest(
    lengths: list[int], size: int
) -> None:
    """Every window once, shortest first, each batch full but the last."""
    batches = sort_batches(lengths, size)
    members = [number for _, numbers in batches for number in numbers]
    assert sorted(members) == list(range(len(lengths)))
    assert [lengths[number] for number in members] == sorted(lengths)
    assert all(len(numbers) == size for _, numbers in batches[:-1])
    for length, numbers in batches:
        assert length == max(lengths[number] for number in numbers)
