"""INT8 graphs as this CPU runs them best.

In: an INT8 graph. Out: its engine, GEMM inputs on the grid that the CPU multiplies,
and float parts (softmax, sums, LayerNorm) in the fastest of the types that it has; and
what each took. Which one wins is no matter of the instruction set alone: OpenVINO runs
attention in float32 as fast as in bfloat16 where the latter has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from int8qa.build.cpu import VNNI, has_vnni
from int8qa.build.engines.openvino import (
    PRECISION_HINTS,
    OpenVinoEngine,
    compile_graph,
    list_int8_hints,
    save_ir,
    write_cpu,
    write_properties,
)
from int8qa.build.latency import fit_shapes, geometric_mean, medians, time_engines
from int8qa.build.unsigned_inputs import shift_inputs
from int8qa.contract import Precision

if TYPE_CHECKING:
    import onnx

WORTH = 1.03
"""How many times as fast a coarser type must be: repeated timings differ by as much."""


@dataclass(frozen=True, slots=True)
class FloatParts:
    """The type chosen, and the medians it was chosen by."""

    hint: str
    ms: Mapping[str, Mapping[str, float]]
    """By shape and type; empty where there was no choice."""


class Int8Compiler:
    """Compiles INT8 graphs of one reader; the type is chosen with the first of them."""

    def __init__(self, inputs: Sequence[str], max_window_tokens: int) -> None:
        self._inputs = inputs
        self._shapes = fit_shapes(max_window_tokens)
        self.parts: FloatParts | None = None

    @property
    def hint(self) -> str:
        """The type chosen, or what runs everywhere."""
        return (
            PRECISION_HINTS[Precision.INT8] if self.parts is None else self.parts.hint
        )

    def compile(
        self, graph: onnx.ModelProto, directory: Path
    ) -> tuple[OpenVinoEngine, int]:
        """The engine of ``graph``, and the bytes of its IR in ``directory``.

        Args:
            graph: with signed GEMM inputs; it stays as it is.
            directory: where the IR goes.

        Raises:
            ExportError: OpenVINO cannot convert the graph.
        """
        if has_vnni():
            graph = shift_inputs(graph)
            write_cpu(directory, VNNI)
        if self.parts is not None:
            return compile_graph(graph, directory, Precision.INT8, hint=self.hint)
        path, size_bytes = save_ir(graph, directory, Precision.INT8)
        finest = OpenVinoEngine(path)
        engines = {finest.hint: finest} | {
            hint: OpenVinoEngine(path, hint=hint)
            for hint in list_int8_hints(finest.execution.capabilities)
            if hint != finest.hint
        }
        # In reference kernels an engine would take minutes to lose.
        sound = {
            hint: engine
            for hint, engine in engines.items()
            if not engine.execution.reference_gemms
        }
        self.parts = self._choose(sound or {finest.hint: finest})
        write_properties(directory, self.hint)
        return engines[self.hint], size_bytes

    def _choose(self, engines: Mapping[str, OpenVinoEngine]) -> FloatParts:
        if len(engines) == 1:
            (hint,) = engines
            return FloatParts(hint, {})
        infers = {hint: engine.infer for hint, engine in engines.items()}
        ms = medians(time_engines(infers, self._shapes, self._inputs))
        return FloatParts(choose_hint(ms), ms)


def choose_hint(ms: Mapping[str, Mapping[str, float]]) -> str:
    """The type to run in, by milliseconds by shape and type, the finest type first."""
    finest, *others = next(iter(ms.values()))
    gains = {
        hint: geometric_mean([by[finest] / by[hint] for by in ms.values()])
        for hint in others
    }
    best = max(gains, key=lambda hint: gains[hint])
    return best if gains[best] >= WORTH else finest
