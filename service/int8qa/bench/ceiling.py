"""The ceiling: the engine alone in one process, fed from memory with full batches.

In: a ``PeerSpec`` on standard input. Out: an ``Outcome``. Every window is tokenized
beforehand, windows of one padded length go together, batches are as full as they can
be, and answers are decoded afterwards: the clock sees the engine alone. No service over
this engine, answering these questions, can be faster.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from int8qa.bench.engine_grid import load_engines
from int8qa.bench.load import read_cpu_s
from int8qa.bench.peer_load import Outcome, PeerSpec, read_questions, read_spec
from int8qa.bench.provenance import list_cores
from int8qa.build.accuracy import Infer, encode_questions
from int8qa.build.feed import window_feed
from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision, load_contract
from int8qa.reader.spans import decode_spans
from int8qa.reader.squad import ANSWER_TOKENS, SquadQuestion
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import DOC_STRIDE_TOKENS, Window

Batch = tuple[int, list[int]]
"""Padded tokens, and the numbers of the windows in it."""


def fill_batches(lengths: Sequence[int], tokens: int) -> list[Batch]:
    """Windows into batches of equal length.

    Args:
        lengths: of each window, padded, in tokens.
        tokens: of a batch at most, unless a window alone has more.

    Returns:
        Batches by length; their sizes are powers of two, the largest that fit, so that
        few shapes occur.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        by_length[length].append(number)
    batches: list[Batch] = []
    for length, members in sorted(by_length.items()):
        low = 0
        while low < len(members):
            most = min(max(1, tokens // length), len(members) - low)
            size = 1 << (most.bit_length() - 1)
            batches.append((length, members[low : low + size]))
            low += size
    return batches


def count_threads(streams: int) -> int | None:
    """Threads of each engine of so many side by side; None, all of them, for one."""
    return None if streams == 1 else math.ceil(len(list_cores()) / streams)


def run_engine(
    spec: PeerSpec,
    contract: Contract,
    infers: Sequence[Infer],
    fill: Callable[[Sequence[int]], list[Batch]],
) -> Outcome:
    """Answer every question; the shapes that occur are warmed first.

    Args:
        spec: whose questions.
        contract: of the repository.
        infers: the engine, or several of it that work side by side.
        fill: makes batches of the windows' padded lengths.
    """
    repository = Path(spec.repository)
    items = [
        SquadQuestion(item["id"], item["question"], item["context"], (), ())
        for item in read_questions(spec)
    ]
    longest = contract.max_window_tokens
    encoded = encode_questions(
        ReaderTokenizer.from_file(repository / TOKENIZER_FILENAME),
        items,
        max_window_tokens=longest,
        doc_stride=min(DOC_STRIDE_TOKENS, longest // 2),
    )
    windows = [window for item in encoded for window in item.windows]
    owners = [i for i, item in enumerate(encoded) for _ in item.windows]
    batches = fill([contract.bucket_for(len(window)) for window in windows])
    feeds = [_make_feed(contract, windows, batch) for batch in batches]
    warmed = set()
    for (length, members), feed in zip(batches, feeds, strict=True):
        if (length, len(members)) not in warmed:
            warmed.add((length, len(members)))
            for infer in infers:
                infer(feed)
    logits: list[Any] = [None] * len(windows)
    latency_ms = [0.0] * len(items)
    work = iter(zip(batches, feeds, strict=True))
    turn = threading.Lock()

    def drain(infer: Infer) -> None:
        while True:
            with turn:
                item = next(work, None)
            if item is None:
                return
            (_, members), feed = item
            started = time.perf_counter()
            start, end = infer(feed)
            spent_ms = 1e3 * (time.perf_counter() - started)
            for row, number in enumerate(members):
                logits[number] = (start[row], end[row])
                latency_ms[owners[number]] = max(latency_ms[owners[number]], spent_ms)

    with ThreadPoolExecutor(len(infers)) as threads:
        cpu_s = read_cpu_s()
        begin = time.perf_counter()
        for done in [threads.submit(drain, infer) for infer in infers]:
            done.result()
        seconds = time.perf_counter() - begin
    cpu_s = read_cpu_s() - cpu_s
    answers = {}
    low = 0
    for item in encoded:
        high = low + len(item.windows)
        sizes = [len(window) for window in item.windows]
        spans = decode_spans(
            item.question.context,
            item.windows,
            [logits[n][0][:s] for n, s in zip(range(low, high), sizes, strict=True)],
            [logits[n][1][:s] for n, s in zip(range(low, high), sizes, strict=True)],
            max_answer_tokens=ANSWER_TOKENS,
        )
        answers[item.question.id] = spans[0].text
        low = high
    return Outcome(seconds, [round(ms, 3) for ms in latency_ms], answers, cpu_s=cpu_s)


def _make_feed(
    contract: Contract, windows: Sequence[Window], batch: Batch
) -> dict[str, Any]:
    length, members = batch
    rows = [
        window_feed(
            windows[number],
            contract.inputs,
            length=length,
            pad_token_id=contract.pad_token_id,
        )
        for number in members
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def main() -> None:
    """Read the line, run, write the outcome."""
    spec = read_spec()
    precision = Precision(spec.fields["precision"])
    contract = load_contract(Path(spec.repository))
    tokens, streams = int(spec.options["tokens"]), int(spec.options["streams"])
    threads = count_threads(streams)
    engines = [
        load_engines(Path(spec.repository), contract, [precision], threads=threads)
        for _ in range(streams)
    ]
    run_engine(
        spec,
        contract,
        [infers[str(precision)] for infers, _ in engines],
        lambda lengths: fill_batches(lengths, tokens),
    ).write(spec.outcome)


if __name__ == "__main__":
    main()
