"""Triton's Python backend running a TensorRT-RTX plan, for workstations with RTX GPUs.

In: int32 tensors [B, S] as the contract names them. Out: float32 start and end logits
[B, S]. It stands alone: numpy, tensorrt_rtx and cuda-python are all it imports. Copied
into the model repository beside ``model.plan``. Kernels are compiled on first use; the
cache beside the plan keeps them for the next start.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx
import triton_python_backend_utils as pb_utils
from cuda.bindings import runtime as cuda

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("start_logits", "end_logits")
PLAN_FILENAME = "model.plan"
CACHE_FILENAME = "runtime.cache"


def _call(result: Any) -> Any:
    """The value of a CUDA call.

    Raises:
        RuntimeError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {getattr(status, 'name', status)}")
    return values[0] if values else None


class TritonPythonModel:
    """One instance of one precision on one GPU."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {
            name: value["string_value"] for name, value in config["parameters"].items()
        }
        names = {entry["name"] for entry in config["input"]}
        self._inputs = tuple(name for name in INPUTS if name in names)
        self._batch_sizes = sorted(json.loads(parameters["batch_sizes"]), reverse=True)
        buckets = json.loads(parameters["sequence_buckets"])
        directory = Path(args["model_repository"]) / args["model_version"]
        self._cache_path = directory / CACHE_FILENAME
        _call(cuda.cudaSetDevice(int(args.get("model_instance_device_id", "0"))))
        self._open(directory / PLAN_FILENAME)
        self._stream = _call(cuda.cudaStreamCreate())
        size = self._batch_sizes[0] * max(buckets) * 4  # int32 and float32 alike
        self._memory = {
            name: _call(cuda.cudaMalloc(size)) for name in (*self._inputs, *OUTPUTS)
        }
        for name, address in self._memory.items():
            self._context.set_tensor_address(name, int(address))
        # A shape's kernels are compiled when it first comes; no caller should wait.
        for length in buckets:
            for batch in {1, self._batch_sizes[0]}:
                ones = np.ones((batch, length), np.int32)
                self._infer(dict.fromkeys(self._inputs, ones))
        self._save_cache()

    def _open(self, path: Path) -> None:
        """Runtime, engine and context, with the kernels of earlier starts.

        Raises:
            RuntimeError: this TensorRT-RTX or this GPU cannot run the plan.
        """
        logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.WARNING)
        self._runtime = tensorrt_rtx.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise RuntimeError(
                f"TensorRT-RTX {tensorrt_rtx.__version__} on this GPU cannot load "
                f"{path}: rebuild with `int8qa build --target tensorrt-rtx`, by the "
                f"same version and for this GPU's compute capability"
            )
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            self._cache.deserialize(self._cache_path.read_bytes())
        config.set_runtime_cache(self._cache)
        self._context = self._engine.create_execution_context(config)

    def _save_cache(self) -> None:
        """Keep compiled kernels; a read-only repository just compiles again."""
        scratch = self._cache_path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            scratch.write_bytes(bytes(self._cache.serialize()))
            scratch.replace(self._cache_path)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests that Triton's dynamic batcher put together.

        Their lengths are equal. Their rows run in batches of the sizes the engine
        knows, so that merging never makes up a new shape.
        """
        feeds = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            for request in requests
        ]
        try:
            merged = {
                name: np.concatenate([feed[name] for feed in feeds])
                for name in self._inputs
            }
        except ValueError:  # lengths differ: a caller without dynamic batching
            return [self._respond(*self._infer_rows(feed)) for feed in feeds]
        start, end = self._infer_rows(merged)
        bounds = np.cumsum([0, *(len(feed[self._inputs[0]]) for feed in feeds)])
        return [
            self._respond(start[low:high], end[low:high])
            for low, high in itertools.pairwise(bounds)
        ]

    def _infer_rows(self, feed: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(feed[self._inputs[0]])
        parts = []
        low = 0
        while low < rows:
            size = next((s for s in self._batch_sizes if s <= rows - low), rows - low)
            parts.append(
                self._infer(
                    {name: array[low : low + size] for name, array in feed.items()}
                )
            )
            low += size
        return tuple(np.concatenate(logits) for logits in zip(*parts, strict=True))

    def _infer(self, feed: dict[str, Any]) -> tuple[Any, Any]:
        kinds = cuda.cudaMemcpyKind
        shape = feed[self._inputs[0]].shape
        for name in self._inputs:
            array = np.ascontiguousarray(feed[name], np.int32)
            if not self._context.set_input_shape(name, shape):
                raise RuntimeError(f"the engine takes no {name} of shape {shape}")
            self._copy(
                self._memory[name],
                array.ctypes.data,
                array.nbytes,
                kinds.cudaMemcpyHostToDevice,
            )
            # Pageable memory: CUDA has copied it when the call returns.
        if not self._context.execute_async_v3(int(self._stream)):
            raise RuntimeError(f"TensorRT-RTX failed on a batch of shape {shape}")
        logits = [np.empty(shape, np.float32) for _ in OUTPUTS]
        for name, result in zip(OUTPUTS, logits, strict=True):
            self._copy(
                result.ctypes.data,
                self._memory[name],
                result.nbytes,
                kinds.cudaMemcpyDeviceToHost,
            )
        _call(cuda.cudaStreamSynchronize(self._stream))
        return logits[0], logits[1]

    def _copy(self, target: Any, source: Any, size: int, kind: Any) -> None:
        _call(cuda.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def _respond(self, start: Any, end: Any) -> Any:
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(OUTPUTS[0], start),
                pb_utils.Tensor(OUTPUTS[1], end),
            ]
        )

    def finalize(self) -> None:
        """Save the cache and free the GPU."""
        self._save_cache()
        for address in self._memory.values():
            _call(cuda.cudaFree(address))
        _call(cuda.cudaStreamDestroy(self._stream))
