"""The engines of a model repository over batch × length, taking turns.

In: a repository of OpenVINO engines. Out: one JSON-ready result. The timing is the
build's own (``build/latency.py``); no HTTP, no Triton, no queue: the ceiling of what
a service over these engines can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8qa.bench.provenance import describe_run, remark_load
from int8qa.build.accuracy import Infer
from int8qa.build.latency import (
    Latency,
    mean_gain,
    medians,
    name_shape,
    time_engines,
)
from int8qa.build.repository import MODEL_VERSION
from int8qa.contract import Contract, Precision, load_contract
from int8qa.errors import ContractError, MissingDependencyError

FORMAT_VERSION = 1
PACKAGES = ("openvino", "numpy")


def bench_engines(
    repository: Path,
    *,
    precisions: Sequence[Precision] = (),
    lengths: Sequence[int] = (),
    repeats: int = 7,
    on_shape: Callable[[str, int], None] = lambda _shape, _count: None,
) -> dict[str, Any]:
    """Time the engines over the batches and lengths that the contract serves.

    Args:
        repository: with OpenVINO engines.
        precisions: which; empty: all that were built.
        lengths: padded tokens, rounded up to what is served; empty: all buckets.
        repeats: timed turns at each shape.
        on_shape: called with each shape's name before it is timed, and how many
            there are.

    Raises:
        ContractError: there is no repository, or a precision was not built.
        MissingDependencyError: the engines cannot be run in this process.
    """
    contract = load_contract(repository)
    chosen = list(dict.fromkeys(precisions)) or list(contract.models)
    infers, execution = load_engines(repository, contract, chosen)
    buckets = sorted(
        {contract.bucket_for(min(n, contract.max_window_tokens)) for n in lengths}
        or contract.sequence_buckets
    )
    shapes = [
        (batch, length)
        for length in buckets
        for batch in contract.batch_sizes
        if batch * length <= contract.max_batch_tokens
    ]
    provenance = describe_run(PACKAGES)
    latency: dict[str, dict[str, Latency]] = {}
    for shape in shapes:
        on_shape(name_shape(shape), len(shapes))
        latency |= time_engines(infers, [shape], contract.inputs, repeats=repeats)
    table = medians(latency)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "engine",
        "provenance": provenance,
        "checkpoint": contract.checkpoint,
        "build_id": contract.build_id,
        "precisions": list(infers),
        "execution": execution,
        "repeats": repeats,
        "latency": {
            shape: {name: asdict(one) for name, one in by_name.items()}
            for shape, by_name in latency.items()
        },
        "int8_gain": {
            rival: round(mean_gain(latency, "int8", rival), 3)
            for rival in infers
            if rival != "int8" and "int8" in infers
        },
        "grid": {
            "batches": list(contract.batch_sizes),
            "lengths": buckets,
            "ms": {
                name: [
                    [table.get(name_shape((b, n)), {}).get(name) for n in buckets]
                    for b in contract.batch_sizes
                ]
                for name in infers
            },
        },
        "remarks": remark_load(provenance),
    }


def load_engines(
    repository: Path,
    contract: Contract,
    precisions: Sequence[Precision],
    *,
    threads: int | None = None,
) -> tuple[dict[str, Infer], dict[str, str]]:
    """The engines by precision, and what each runs in; ``threads`` as of the engine.

    Raises:
        ContractError: a precision was not built.
        MissingDependencyError: they cannot be run in this process.
    """
    from int8qa.build.engines.openvino import MODEL_FILENAME, OpenVinoEngine

    infers: dict[str, Infer] = {}
    execution = {}
    for precision in precisions:
        model = contract.models.get(precision)
        if model is None:
            raise ContractError(
                f"{repository} has no {precision}: it was built with "
                f"{', '.join(map(str, contract.models))}"
            )
        if model.engine != "openvino":
            raise MissingDependencyError(
                f"{repository} holds {model.engine} engines, which run in Triton only: "
                f"`int8qa gpu-check` times them there"
            )
        path = (
            repository
            / contract.triton_name(precision)
            / MODEL_VERSION
            / MODEL_FILENAME
        )
        engine = OpenVinoEngine(path, threads=threads)
        infers[str(precision)] = engine.infer
        execution[str(precision)] = engine.execution.summary
    return infers, execution
