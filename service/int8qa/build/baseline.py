"""FP32 and FP16: what every INT8 variant of one reader is held against.

In: a loaded subject, a way to compile, shapes. Out: both engines with their answers,
accuracies, sizes and latencies, and these as JSON. Knows no quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from int8qa.build.accuracy import Accuracy, Answers, Infer, compare_answers
from int8qa.build.engines.openvino import OpenVinoEngine, check_execution
from int8qa.build.export import export_onnx, wrap_model
from int8qa.build.graph import clean_graph
from int8qa.build.latency import Latency, Shape, mean_gain, time_engines
from int8qa.build.parity import HALF, check_parity
from int8qa.build.subject import Subject
from int8qa.contract import Precision

if TYPE_CHECKING:
    import onnx

Compile = Callable[["onnx.ModelProto", Precision], tuple[OpenVinoEngine, int]]
"""A graph to its engine and the bytes of its files."""


@dataclass(frozen=True, slots=True)
class FloatModel:
    """A reader in one float precision."""

    engine: OpenVinoEngine
    size_bytes: int
    answers: Answers
    """To the evaluation questions."""
    accuracy: Accuracy


@dataclass(frozen=True, slots=True)
class Baseline:
    """Both floats of one reader."""

    models: dict[Precision, FloatModel]
    latency: dict[str, dict[str, Latency]]
    """By shape: ``fp32`` and ``fp16``, in turns."""

    @property
    def fp32(self) -> FloatModel:
        """What accuracies are shares of."""
        return self.models[Precision.FP32]

    @property
    def fp16(self) -> FloatModel:
        """What speeds are multiples of."""
        return self.models[Precision.FP16]

    @property
    def device(self) -> str:
        """The CPU, as the engine calls it."""
        return self.fp32.engine.execution.device

    @property
    def infers(self) -> dict[str, Infer]:
        """Both engines by name."""
        return {str(name): model.engine.infer for name, model in self.models.items()}

    @property
    def points(self) -> list[tuple[float, float]]:
        """Speed against FP16 and share of FP32's F1 of both."""
        return [
            (mean_gain(self.latency, str(name)), model.accuracy.f1_ratio)
            for name, model in self.models.items()
        ]

    def scale_fp32(self, shape: str, fp16_ms: float) -> float:
        """FP32's milliseconds where FP16 took ``fp16_ms``: they were timed in turns."""
        by_name = self.latency[shape]
        return fp16_ms * by_name["fp32"].p50_ms / by_name["fp16"].p50_ms

    def describe(self) -> dict[str, Any]:
        """Both by precision, of JSON types only."""
        return {
            str(name): {
                "f1": model.accuracy.f1,
                "exact_match": model.accuracy.exact_match,
                "f1_ratio": model.accuracy.f1_ratio,
                "agreement_fp32": model.accuracy.agreement,
                "rms_logit_error": model.accuracy.rms_logit_error,
                "size_bytes": model.size_bytes,
                "execution": model.engine.execution.summary,
                "latency_ms": {
                    shape: _describe_latency(by_name[str(name)])
                    for shape, by_name in self.latency.items()
                },
            }
            for name, model in self.models.items()
        }


def measure_baseline(
    subject: Subject,
    compile_graph: Compile,
    shapes: Sequence[Shape],
    *,
    budget_s: float,
    on_question: Callable[[], None],
) -> Baseline:
    """Export the reader as it was loaded, compile it twice, ask and time both.

    Args:
        subject: its model is not changed.
        compile_graph: see :data:`Compile`.
        shapes: what is timed.
        budget_s: time to spend on a shape.
        on_question: called after each question, twice for each.

    Raises:
        ExportError: the reader cannot be exported or converted.
        ParityError: FP16 does not answer as FP32 does.
        EnginePrecisionError: FP16 does not run in half precision where it could.
    """
    reader = wrap_model(subject.checkpoint.model)
    graph = clean_graph(export_onnx(reader, subject.inputs))
    models: dict[Precision, FloatModel] = {}
    for precision in (Precision.FP32, Precision.FP16):
        engine, size_bytes = compile_graph(graph, precision)
        check_execution(engine.execution, precision, quantized_gemms=0)
        answers = subject.answer(engine.infer, on_question=on_question)
        reference = models[Precision.FP32].answers if models else answers
        models[precision] = FloatModel(
            engine,
            size_bytes,
            answers,
            compare_answers(reference, answers, subject.questions),
        )
    fp32, fp16 = (model.answers for model in models.values())
    check_parity(HALF, fp32, fp16, subject.questions)
    latency = time_engines(
        {str(name): model.engine.infer for name, model in models.items()},
        shapes,
        subject.inputs,
        budget_s=budget_s,
    )
    return Baseline(models, latency)


def _describe_latency(latency: Latency) -> dict[str, float]:
    return {"p50": latency.p50_ms, "p99": latency.p99_ms, "runs": latency.runs}
