"""Who runs against whom: the engine alone, int8qa, and its peers.

In: nothing. Out: the contestants: how each is served, loaded, and what it may be tuned
by. Starts nothing. A peer's programs and pinned packages lie in the checkout under
``bench/peers``; how its documentation wants it configured is told there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from int8qa.contract import Precision
from int8qa.reader.squad import ANSWER_TOKENS

REFERENCE = "int8qa-int8"
"""All others are held against it."""
CEILING = "engine-int8"
STOCK = "stock"
_CONCURRENCIES = (4, 8, 16, 32)
_BATCH_TOKENS = (512, 1024)
_STOCK_BATCHES = (1, 4, 8)
_STREAMS = {1: "", 2: ", two at a time"}
"""Engines side by side, each with its share of the cores; what to call that."""
_SERVE_READER = "--tokenizer {repository}/tokenizer.json --port {port}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration; the tuning takes the fastest of a contestant's."""

    name: str
    serve: tuple[str, ...] = ()
    """More arguments for the server."""
    options: dict[str, Any] = field(default_factory=dict)
    """For the loading program."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table.

    In commands and URLs ``{python}`` stands for int8qa's interpreter,
    ``{peer_python}`` for the one of the peer's environment, ``{peers}`` for
    ``bench/peers``, and ``{port}``, ``{health_port}``, ``{repository}``,
    ``{checkpoint}``, ``{onnx}``, ``{stock}`` and ``{work}`` for what they say.
    """

    name: str
    group: str
    """What ``--peer`` calls it."""
    title: str
    precision: str
    load: tuple[str, ...]
    """Reads a ``PeerSpec``, writes an ``Outcome``."""
    serve: tuple[str, ...] = ()
    """Empty: there is no server."""
    settings: dict[str, str] = field(default_factory=dict)
    """Environment variables of the server."""
    ready: str = ""
    """URL that answers 200 once questions may be asked."""
    environment: str = ""
    """Folder under ``bench/peers`` whose ``requirements.txt`` it needs."""
    variants: tuple[Variant, ...] = (Variant("as it comes"),)
    concurrencies: tuple[int, ...] = _CONCURRENCIES
    path: str = "/answer"
    fields: dict[str, Any] = field(default_factory=dict)


def list_contestants(precisions: Sequence[Precision], cores: int) -> list[Contestant]:
    """Everybody, the ceiling first.

    Args:
        precisions: that were built.
        cores: that the services have.
    """
    names = [str(precision) for precision in precisions]
    return [
        *(_make_engine(name) for name in names),
        _make_stock(),
        *(_make_int8qa(name, cores) for name in names),
        Contestant(
            name="triton",
            group="triton",
            title="Triton alone, dynamic batching; the client tokenizes and decodes",
            precision="int8",
            environment="triton",
            serve=_split(
                "{python} {peers}/triton/serve.py --built {repository} "
                "--work {work} --port {port} --health-port {health_port}"
            ),
            ready="http://127.0.0.1:{health_port}/v2/health/ready",
            load=_split("{peer_python} {peers}/triton/client.py"),
            variants=(
                Variant("padded to the longest of the batch", ("--ragged",)),
                Variant(
                    f"padded to the longest of the batch, {cores} instances",
                    ("--ragged", "--instances", str(cores)),
                ),
                Variant("padded to 384 by the client", (), {"pad": 384}),
            ),
        ),
        Contestant(
            name="litserve",
            group="litserve",
            title="LitServe, batching over ONNX Runtime",
            precision="fp32",
            environment="litserve",
            serve=_split(
                "{peer_python} {peers}/litserve/server.py --model {onnx} "
                + _SERVE_READER
            ),
            ready="http://127.0.0.1:{port}/health",
            load=_split("{python} -m int8qa.bench.peer_load"),
            variants=(
                Variant(f"{cores} workers", ("--workers", str(cores))),
                Variant("1 worker"),
            ),
        ),
        Contestant(
            name="transformers",
            group="transformers",
            title="transformers 5.2 pipeline behind FastAPI",
            precision="fp32",
            environment="transformers",
            serve=_split(
                "{peer_python} {peers}/transformers/server.py "
                "--checkpoint {checkpoint} --port {port}"
            ),
            ready="http://127.0.0.1:{port}/ready",
            load=_split("{python} -m int8qa.bench.peer_load"),
            variants=(
                Variant("one by one"),
                Variant("batches of up to 8", ("--batch", "8")),
            ),
        ),
    ]


def _make_engine(precision: str) -> Contestant:
    return Contestant(
        name=f"engine-{precision}",
        group="engine",
        title="The engine alone, full batches from memory",
        precision=precision,
        load=_split("{python} -m int8qa.bench.ceiling"),
        variants=tuple(
            Variant(
                f"batches of {tokens} tokens{_STREAMS[streams]}",
                options={"tokens": tokens, "streams": streams},
            )
            for tokens in _BATCH_TOKENS
            for streams in _STREAMS
        ),
        concurrencies=(1,),
        fields={"precision": precision},
    )


def _make_stock() -> Contestant:
    return Contestant(
        name=STOCK,
        group=STOCK,
        title="The stock graph alone, sorted by length, padded to the longest",
        precision="int8",
        load=_split("{python} -m int8qa.bench.stock {stock}"),
        variants=tuple(
            Variant(
                f"batches of {size}{_STREAMS[streams]}",
                options={"batch": size, "streams": streams},
            )
            for size in _STOCK_BATCHES
            for streams in _STREAMS
        ),
        concurrencies=(1,),
    )


def _make_int8qa(precision: str, cores: int) -> Contestant:
    return Contestant(
        name=f"int8qa-{precision}",
        group="int8qa",
        title="int8qa",
        precision=precision,
        serve=_split(
            "{python} -m int8qa.cli up --no-build --model-repository {repository}"
        ),
        # The live comparison would ask questions of its own.
        settings={"INT8QA_PORT": "{port}", "INT8QA_COMPARISON__FRACTION": "0"},
        ready="http://127.0.0.1:{port}/ready",
        load=_split("{python} -m int8qa.bench.peer_load"),
        variants=(
            Variant("1 gateway worker"),
            *([Variant("2 gateway workers", ("--workers", "2"))] if cores > 1 else []),
        ),
        path="/v1/answer",
        fields={"precision": precision, "max_answer_tokens": ANSWER_TOKENS},
    )


def _split(command: str) -> tuple[str, ...]:
    return tuple(command.split())
