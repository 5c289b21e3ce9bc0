"""ONNX to OpenVINO: the CPU engine.

In: a cleaned ONNX graph and a precision. Out: an IR (``model.xml``/``model.bin``),
compiled for a check of what it really runs in, and a way to run it in this process
for the build's own measurements. The serving side is ``triton_openvino_model.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from int8qa.contract import END_LOGITS, START_LOGITS, Precision
from int8qa.errors import EnginePrecisionError, ExportError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

MODEL_FILENAME = "model.xml"

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
    """A compiled IR in this process, with the properties the server uses."""

    def __init__(self, path: Path, precision: Precision) -> None:
        openvino = _import_openvino()
        core = openvino.Core()
        self._compiled = core.compile_model(
            core.read_model(path),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        self._request = self._compiled.create_infer_request()
        self._ports = tuple(port.any_name for port in self._compiled.inputs)
        self.execution = Execution(
            gemms=_count_gemms(self._compiled),
            device=str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            capabilities=tuple(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        )

    def infer(
        self, feed: Mapping[str, npt.NDArray[np.int32]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Start and end logits, float32 [B, S] each, for int32 inputs [B, S]."""
        self._request.infer({name: feed[name] for name in self._ports})
        return (
            self._request.get_tensor(START_LOGITS).data.copy(),
            self._request.get_tensor(END_LOGITS).data.copy(),
        )


def _count_gemms(compiled: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        if "layerType" not in info:
            continue
        if info["layerType"].astype(str) in _GEMM_LAYERS:
            counts[info["runtimePrecision"].astype(str)] += 1
    return dict(counts)


def check_execution(
    execution: Execution, precision: Precision, *, quantized_gemms: int
) -> list[str]:
    """Hold what runs to what was asked for.

    Args:
        execution: of the compiled model.
        precision: asked for.
        quantized_gemms: GEMMs that the Q/DQ graph feeds with INT8 on both sides.

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


def median_latencies(
    engines: Mapping[Precision, OpenVinoEngine],
    shapes: Sequence[tuple[int, int]],
    inputs: Sequence[str],
    *,
    repeats: int = 7,
    warm_ups: int = 2,
) -> dict[str, dict[str, float]]:
    """Median milliseconds by ``"BxS"`` and precision, engines taking turns.

    Turns, not blocks: whatever else the machine does then hits all engines alike.
    """
    import time

    rng = np.random.default_rng(0)
    table: dict[str, dict[str, float]] = {}
    for batch, length in shapes:
        ids = rng.integers(5, 1000, (batch, length), dtype=np.int32)
        feed = {name: np.ones_like(ids) for name in inputs}
        feed["input_ids"] = ids
        if "token_type_ids" in feed:
            feed["token_type_ids"] = np.zeros_like(ids)
        times: dict[Precision, list[float]] = {name: [] for name in engines}
        for turn in range(warm_ups + repeats):
            for name, engine in engines.items():
                begin = time.perf_counter()
                engine.infer(feed)
                if turn >= warm_ups:
                    times[name].append(1e3 * (time.perf_counter() - begin))
        table[f"{batch}x{length}"] = {
            str(name): round(float(np.median(values)), 3)
            for name, values in times.items()
        }
    return table
