"""ONNX to OpenVINO: the CPU engine.

In: a cleaned ONNX graph and a precision. Out: an IR (``model.xml``/``model.bin``),
compiled for a check of what it really runs in, and a way to run it in this process
for the build's own measurements. The serving side is ``triton_openvino_model.py``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from int8qa.build.cpu import cpu_features
from int8qa.build.engines.signal_stack import keep_signal_stack
from int8qa.contract import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_IDS,
    START_LOGITS,
    TOKEN_TYPE_IDS,
    Precision,
)
from int8qa.errors import EnginePrecisionError, ExportError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

MODEL_FILENAME = "model.xml"
PROPERTIES_FILENAME = "properties.json"
"""Beside the model: what to compile it with, on whatever machine."""
CPU_FILENAME = "cpu.json"
"""Beside a model that not every CPU runs rightly: instruction sets, one of which it
must have, as ``/proc/cpuinfo`` names them."""

_INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)

PRECISION_HINTS: dict[Precision, str] = {
    Precision.INT8: "f32",
    Precision.FP16: "f16",
    Precision.FP32: "f32",
}
"""What float operations run in; of INT8 unless :func:`list_int8_hints` has better."""

_REFERENCE = "ref"
"""How OpenVINO names kernels that are there for correctness alone."""

_GEMM_LAYERS = frozenset({"FullyConnected", "MatMul", "FullyConnectedCompressed"})


@dataclass(frozen=True, slots=True)
class Execution:
    """What the compiled model runs in, read from its runtime graph."""

    gemms: dict[str, int]
    """GEMMs by execution type, such as ``{"u8": 36, "bf16": 1}``."""
    attentions: dict[str, int]
    """Fused attentions by execution type: their GEMMs are not among ``gemms``."""
    device: str
    capabilities: tuple[str, ...]
    """What OpenVINO says the CPU computes natively: INT8, FP16, BF16, FP32."""
    reference_gemms: int = 0
    """GEMMs with no kernel but OpenVINO's reference, which is a thousandfold slower."""

    @property
    def summary(self) -> str:
        """Execution types in order of frequency: ``u8`` or ``i8+bf16``."""
        return "+".join(name for name, _ in Counter(self.gemms).most_common())


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            "the OpenVINO engine is not installed: run `make install` in the checkout, "
            "or pip install -e '.[build,cpu]'"
        ) from error
    return openvino


def list_int8_hints(capabilities: Sequence[str]) -> tuple[str, ...]:
    """What the float parts of an INT8 graph may run in on a CPU, the finest first.

    Not float16: OpenVINO 2026.4 has no kernel for an INT8 GEMM that writes it, and runs
    its reference instead (``tests/build/test_openvino.py`` tells when that changes).
    """
    return ("f32", "bf16") if "BF16" in capabilities else ("f32",)


def compile_graph(
    model: onnx.ModelProto,
    directory: Path,
    precision: Precision,
    *,
    hint: str | None = None,
) -> tuple[OpenVinoEngine, int]:
    """Convert and compile ``model``: the engine and the bytes of its IR.

    Raises:
        ExportError: OpenVINO cannot convert the graph.
    """
    path, size_bytes = save_ir(model, directory, precision, hint=hint)
    return OpenVinoEngine(path), size_bytes


def save_ir(
    model: onnx.ModelProto,
    directory: Path,
    precision: Precision,
    *,
    hint: str | None = None,
) -> tuple[Path, int]:
    """Convert ``model`` to an IR in ``directory``, with what to compile it with.

    FP16 stores its weights as float16; INT8 keeps its scales in float32, because a
    scale rounded to float16 moves every value it multiplies.

    Returns:
        The path of ``model.xml`` and the bytes of the model's two files.

    Raises:
        ExportError: OpenVINO cannot convert the graph.
    """
    openvino = _import_openvino()
    frontend = openvino.frontend
    source = directory / "source.onnx"
    source.write_bytes(model.SerializeToString())
    try:
        # Not `openvino.convert_model`: it reports its use to Google Analytics.
        converted = openvino.Core().read_model(source)
        path = directory / MODEL_FILENAME
        openvino.save_model(
            converted, path, compress_to_fp16=precision is Precision.FP16
        )
    except (
        RuntimeError,
        frontend.GeneralFailure,
        frontend.NotImplementedFailure,
        frontend.OpConversionFailure,
        frontend.OpValidationFailure,
    ) as error:
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"OpenVINO cannot convert the {precision} graph: "
            f"{reason[-1] if reason else error!r}"
        ) from error
    finally:
        source.unlink(missing_ok=True)
    write_properties(directory, hint or PRECISION_HINTS[precision])
    return path, sum(p.stat().st_size for p in (path, path.with_suffix(".bin")))


def write_properties(directory: Path, hint: str) -> None:
    """Say what a model's float operations run in, to whoever compiles it."""
    properties = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    text = json.dumps(properties, indent=2) + "\n"
    (directory / PROPERTIES_FILENAME).write_text(text, encoding="utf-8")


def write_cpu(directory: Path, any_of: Iterable[str]) -> None:
    """Say what instruction sets a model needs one of, to whoever serves it."""
    text = json.dumps({"any_of": sorted(any_of)}) + "\n"
    (directory / CPU_FILENAME).write_text(text, encoding="utf-8")


def _check_cpu(path: Path) -> None:
    """Refuse a model whose INT8 sums would overflow on this CPU."""
    cpu = path.with_name(CPU_FILENAME)
    if cpu.exists():
        wanted = json.loads(cpu.read_text(encoding="utf-8"))["any_of"]
        if set(wanted).isdisjoint(cpu_features()):
            raise EnginePrecisionError(
                f"{path.parent.parent.name} was built for CPUs with "
                f"{' or '.join(wanted)}, and this CPU has none of them: its INT8 sums "
                f"would overflow. Run `int8qa build` here"
            )


def _read_properties(path: Path) -> dict[str, Any]:
    text = path.with_name(PROPERTIES_FILENAME).read_text(encoding="utf-8")
    properties: dict[str, Any] = json.loads(text)
    return properties


class OpenVinoEngine:
    """A compiled IR in this process, with the properties the server uses.

    With another ``hint`` (``f32``, ``bf16``) float operations run in another type than
    the server's. With ``threads`` it is one of several that share the cores.
    """

    def __init__(
        self,
        path: Path,
        *,
        hint: str | None = None,
        threads: int | None = None,
    ) -> None:
        openvino = _import_openvino()
        core = openvino.Core()
        _check_cpu(path)
        properties = _read_properties(path) | _share_cores(threads)
        if hint is not None:
            properties["INFERENCE_PRECISION_HINT"] = hint
        self.hint: str = properties["INFERENCE_PRECISION_HINT"]
        with keep_signal_stack():
            self._compiled = core.compile_model(
                core.read_model(path), "CPU", properties
            )
        self._request = self._compiled.create_infer_request()
        # A port keeps the names of idle operators behind it as well (RoBERTa's cast
        # of its token ids), and `any_name` may be one of these.
        names = {name for port in self._compiled.inputs for name in port.names}
        self._inputs = tuple(name for name in _INPUTS if name in names)
        # Kernels are chosen for a shape, so the graph knows none before the first one.
        self._request.infer({name: np.ones((1, 1), np.int32) for name in self._inputs})
        layers = _read_layers(self._compiled)
        gemms = [layer for layer in layers if layer.kind in _GEMM_LAYERS]
        self.execution = Execution(
            gemms=_count_types(gemms),
            attentions=_count_types(filter(_is_attention, layers)),
            device=str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            capabilities=tuple(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
            reference_gemms=sum(one.kernel.startswith(_REFERENCE) for one in gemms),
        )

    def infer(
        self, feed: Mapping[str, npt.NDArray[np.int32]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Start and end logits, float32 [B, S] each, for int32 inputs [B, S]."""
        self._request.infer({name: feed[name] for name in self._inputs})
        return (
            self._request.get_tensor(START_LOGITS).data.copy(),
            self._request.get_tensor(END_LOGITS).data.copy(),
        )


class StockOpenVinoEngine:
    """An ONNX model as OpenVINO takes it by default: what ours is measured against."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        with keep_signal_stack():
            compiled = (
                _import_openvino()
                .Core()
                .compile_model(path, "CPU", _share_cores(threads))
            )
        self._request = compiled.create_infer_request()

    def infer(
        self, feed: Mapping[str, npt.NDArray[np.int32]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Start and end logits, float32 [B, S] each, of a model of int64 [B, S]."""
        self._request.infer(
            {name: array.astype(np.int64) for name, array in feed.items()}
        )
        return (
            self._request.get_tensor(START_LOGITS).data.copy(),
            self._request.get_tensor(END_LOGITS).data.copy(),
        )


def _share_cores(threads: int | None) -> dict[str, Any]:
    """Properties of an engine with so many threads beside others; None: with all."""
    if threads is None:
        return {}
    # Pinned, the engines of one process know of each other, those of several do not.
    return {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}


class _Layer(NamedTuple):
    """One operation of a runtime graph."""

    kind: str
    kernel: str
    """Its implementation and type, such as ``brgemm_avx512_i8`` or ``ref_any_i8``."""
    type: str
    origin: str
    """Names of the operations of the model that it is made of."""


def _read_layers(compiled: Any) -> list[_Layer]:
    names = ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
    infos = [one.get_rt_info() for one in compiled.get_runtime_model().get_ops()]
    return [
        _Layer(*(info[name].astype(str) if name in info else "" for name in names))
        for info in infos
        if "layerType" in info
    ]


def _count_types(layers: Iterable[_Layer]) -> dict[str, int]:
    return dict(Counter(layer.type for layer in layers))


def _is_attention(layer: _Layer) -> bool:
    """A fused attention: scores, softmax and context in one subgraph."""
    return layer.kind == "Subgraph" and "Softmax" in layer.origin


def check_execution(
    execution: Execution,
    precision: Precision,
    *,
    quantized_gemms: int,
    quantized_attentions: int = 0,
) -> list[str]:
    """Hold what runs to what was asked for.

    Args:
        execution: of the compiled model.
        precision: asked for.
        quantized_gemms: GEMMs with a quantized weight and a quantized input.
            Attention's own GEMMs run inside OpenVINO's fused attention and are not
            counted by it.
        quantized_attentions: those whose four operands are quantized.

    Returns:
        Remarks for the report: what this CPU cannot do and what ran instead.

    Raises:
        EnginePrecisionError: INT8 GEMMs run in float, a CPU with float16 kernels does
            not use them, or OpenVINO has only its reference kernel for a GEMM.
    """
    gemms = execution.gemms
    if execution.reference_gemms:
        raise EnginePrecisionError(
            f"OpenVINO has no fast kernel on {execution.device} for "
            f"{execution.reference_gemms} of {sum(gemms.values())} GEMMs of the "
            f"{precision} graph ({gemms}); a question would take minutes"
        )
    int8_gemms = gemms.get("i8", 0) + gemms.get("u8", 0)
    if precision is Precision.INT8 and int8_gemms < quantized_gemms:
        raise EnginePrecisionError(
            f"OpenVINO runs {int8_gemms} of {quantized_gemms} quantized GEMMs in INT8 "
            f"on {execution.device} ({gemms}); the Q/DQ graph does not fuse there"
        )
    if precision is Precision.INT8:
        attentions = execution.attentions
        done = attentions.get("i8", 0) + attentions.get("u8", 0)
        if not attentions:  # not fused: two GEMMs each
            done = max(0, int8_gemms - quantized_gemms) // 2
        if done < quantized_attentions:
            remark = (
                f"OpenVINO runs {done} of {quantized_attentions} quantized attentions "
                f"in INT8 on {execution.device} ({attentions or gemms}); the recipe "
                f"linear may be as fast there"
            )
            return [remark]
    if precision is not Precision.FP16:
        return []
    halves = gemms.get("f16", 0)
    if "FP16" in execution.capabilities:
        if halves != sum(gemms.values()):
            raise EnginePrecisionError(
                f"OpenVINO runs {halves} of {sum(gemms.values())} GEMMs in f16 on "
                f"{execution.device}, which has f16 kernels ({gemms})"
            )
        return []
    ran = execution.summary
    return [
        f"{execution.device} has no f16 kernels; OpenVINO runs the FP16 model in {ran}"
    ]
