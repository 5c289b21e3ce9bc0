"""The stock graph, alone and in the stock way: what the ceiling is held against.

In: a ``PeerSpec`` on standard input, the model's path as argument. Out: an
``Outcome``. The same clock and the same questions as ``ceiling.py``, but the graph of
``stock_model.py``, compiled as it comes, and the usual way to feed an engine: windows
sorted by length, so many at a time, padded to the longest of them, rounded up as ours.
Without that rounding OpenVINO compiles for nearly every batch anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from int8qa.bench.ceiling import Batch, count_threads, run_engine
from int8qa.bench.peer_load import read_spec
from int8qa.build.engines.openvino import StockOpenVinoEngine
from int8qa.contract import load_contract


def sort_batches(lengths: Sequence[int], size: int) -> list[Batch]:
    """Windows in order of length, ``size`` at a time.

    Args:
        lengths: of each window, padded, in tokens.
        size: windows of a batch; the last may have fewer.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [
        (lengths[members[-1]], members)
        for members in (order[low : low + size] for low in range(0, len(order), size))
    ]


def main() -> None:
    """Read the line, run, write the outcome."""
    spec = read_spec()
    size, streams = int(spec.options["batch"]), int(spec.options["streams"])
    path, threads = Path(sys.argv[1]), count_threads(streams)
    run_engine(
        spec,
        load_contract(Path(spec.repository)),
        [StockOpenVinoEngine(path, threads=threads).infer for _ in range(streams)],
        lambda lengths: sort_batches(lengths, size),
    ).write(spec.outcome)


if __name__ == "__main__":
    main()
