"""ONNX to OpenVINO: the CPU engine.

In: a cleaned ONNX graph and a precision. Out: an IR (``model.xml``/``model.bin``),
compiled for a check of what it really runs in, and a way to run it in this process
for the build's own measurements. The serving side is ``triton_openvino_model.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
_INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)

PRECISION_HINTS: dict[Precision, str] = {
    # Float parts of the INT8 graph run in half precision too, as on a GPU.
    Precision.INT8: "f16",
    Precision.FP16: "f16",
    Precision.FP32: "f32",
}

_GEMM_LAYERS = frozenset({"FullyConnected", "MatMul", "FullyConnectedCompressed"})


@dataclass(frozen=True, slots=True)
class Execution:
    """What the compiled model runs in, read from its runtime graph."""

    gemms: dict[str, int]
    """GEMMs by execution type, such as ``{"i8": 36, "bf16": 1}``."""
    attentions: dict[str, int]
    """Fused attentions by execution type: their GEMMs are not among ``gemms``."""
    device: str
    capabilities: tuple[str, ...]
    """What OpenVINO says the CPU computes natively: INT8, FP16, BF16, FP32."""

    @property
    def summary(self) -> str:
        """Execution types in order of frequency: ``i8`` or ``i8+bf16``."""
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


def compile_graph(
    model: onnx.ModelProto, directory: Path, precision: Precision
) -> tuple[OpenVinoEngine, int]:
    """Convert and compile ``model``: the engine and the bytes of its IR.

    Raises:
        ExportError: OpenVINO cannot convert the graph.
    """
    path, size_bytes = save_ir(model, directory, precision)
    return OpenVinoEngine(path, precision), size_bytes


def save_ir(
    model: onnx.ModelProto, directory: Path, precision: Precision
) -> tuple[Path, int]:
    """Convert ``model`` to an IR in ``directory``.

    FP16 stores its weights as float16; INT8 keeps its scales in float32, because a
    scale rounded to float16 moves every value it multiplies.

    Returns:
        The path of ``model.xml`` and the bytes of both files.

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
    return path, sum(p.stat().st_size for p in (path, path.with_suffix(".bin")))


class OpenVinoEngine:
    """A compiled IR in this process, by default with the properties the server uses.

    Another ``hint`` (``f32``) computes the float parts of an INT8 graph more finely, so
    that its quantization can be compared apart from them. With ``threads`` it is one of
    several that share the cores.
    """

    def __init__(
        self,
        path: Path,
        precision: Precision,
        *,
        hint: str | None = None,
        threads: int | None = None,
    ) -> None:
        openvino = _import_openvino()
        core = openvino.Core()
        with keep_signal_stack():
            self._compiled = core.compile_model(
                core.read_model(path),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": hint or PRECISION_HINTS[precision],
                    "PERFORMANCE_HINT": "LATENCY",
                    **_share_cores(threads),
                },
            )
        self._request = self._compiled.create_infer_request()
        # A port keeps the names of idle operators behind it as well (RoBERTa's cast
        # of its token ids), and `any_name` may be one of these.
        names = {name for port in self._compiled.inputs for name in port.names}
        self._inputs = tuple(name for name in _INPUTS if name in names)
        self.execution = Execution(
            gemms=_count_layers(self._compiled, _is_gemm),
            attentions=_count_layers(self._compiled, _is_attention),
            device=str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            capabilities=tuple(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
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


def _count_layers(compiled: Any, wanted: Callable[[Any], bool]) -> dict[str, int]:
    """Layers of the runtime graph by the type they compute in."""
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        if "layerType" in info and wanted(info):
            counts[info["runtimePrecision"].astype(str)] += 1
    return dict(counts)


def _is_gemm(info: Any) -> bool:
    return info["layerType"].astype(str) in _GEMM_LAYERS


def _is_attention(info: Any) -> bool:
    """A fused attention: scores, softmax and context in one subgraph."""
    return info["layerType"].astype(str) == "Subgraph" and "Softmax" in info[
        "originalLayersNames"
    ].astype(str)


def check_execution(
    execution: Execution, precision: Precision, *, quantized_gemms: int
) -> list[str]:
    """Hold what runs to what was asked for.

    Args:
        execution: of the compiled model.
        precision: asked for.
        quantized_gemms: GEMMs with a quantized weight and a quantized input.
            Attention's own GEMMs run inside OpenVINO's fused attention and are not
            counted by it.

    Returns:
        Remarks for the report: what this CPU cannot do and what ran instead.

    Raises:
        EnginePrecisionError: INT8 GEMMs run in float, or a CPU with float16 kernels
            does not use them.
    """
    gemms = execution.gemms
    int8_gemms = gemms.get("i8", 0) + gemms.get("u8", 0)
    if precision is Precision.INT8 and int8_gemms < quantized_gemms:
        raise EnginePrecisionError(
            f"OpenVINO runs {int8_gemms} of {quantized_gemms} quantized GEMMs in INT8 "
            f"on {execution.device} ({gemms}); the Q/DQ graph does not fuse there"
        )
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
