"""The file Triton runs for RTX plans, with stand-ins for Triton, CUDA and TensorRT-RTX.

The stand-in engine adds its inputs up, so that every copy and every shape shows.
"""

# ruff: noqa: N802, N815 - the names are those of the libraries stood in for
from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from google.protobuf import json_format

import int8qa.build.engines
from int8qa.build.triton_config import parse_config
from int8qa.build.triton_tensorrt_config import rtx_model_config
from int8qa.contract import Precision

SOURCE = Path(int8qa.build.engines.__file__).parent / "triton_tensorrt_rtx_model.py"
NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Tensor:
    """Triton's tensor, as far as the model uses it."""

    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class InferenceResponse:
    """Triton's response."""

    output_tensors: list[Tensor]


@dataclass
class Cuda:
    """CUDA's run time over host memory; counts what is held."""

    held: dict[int, Any] = field(default_factory=dict)
    streams: int = 0
    fails: bool = False
    cudaMemcpyKind: ClassVar[Any] = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2
    )

    def cudaSetDevice(self, index: int) -> tuple[int]:
        assert index == 0
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams += 1
        return 0, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (700,) if self.fails else (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.held[address]
        return (0,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, *_: Any
    ) -> tuple[int]:
        for block in (target, source):
            if block in self.held:
                assert size <= len(self.held[block]), "beyond what was allocated"
        ctypes.memmove(target, source, size)
        return (0,)


class Context:
    """An engine: start is the sum of all inputs, end its negative."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.shapes: list[tuple[int, ...]] = []

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return name in self.names and shape[0] <= 4 and shape[1] <= 64

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        self.shapes.append(self.shape)
        total = sum(self._view(name, ctypes.c_int32) for name in self.names)
        self._view("start_logits", ctypes.c_float)[:] = total
        self._view("end_logits", ctypes.c_float)[:] = -total
        return True

    def _view(self, name: str, kind: Any) -> Any:
        count = self.shape[0] * self.shape[1]
        return np.ctypeslib.as_array((kind * count).from_address(self.addresses[name]))


class Rtx:
    """TensorRT-RTX: loads plans that say so, keeps a cache of what it was told."""

    __version__ = "1.7.1"
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    class Logger:
        WARNING = 1

        def __init__(self, level: int) -> None: ...

    def __init__(self, names: tuple[str, ...]) -> None:
        self.context = Context(names)
        self.config = SimpleNamespace(
            cuda_graph_strategy=None,
            cache=None,
            create_runtime_cache=lambda: self.cache,
            set_runtime_cache=lambda cache: setattr(self.config, "cache", cache),
        )
        self.loaded: list[bytes] = []
        self.cache = SimpleNamespace(
            deserialize=self.loaded.append, serialize=lambda: b"kernels"
        )

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, plan: bytes) -> Any:
        if plan != b"plan":
            return None
        return SimpleNamespace(
            create_runtime_config=lambda: self.config,
            create_execution_context=lambda config: self.context,
        )


@dataclass
class Bench:
    """The model file and what stands around it."""

    module: ModuleType
    cuda: Cuda
    rtx: Rtx
    directory: Path
    names: tuple[str, ...]

    def start(self) -> Any:
        text = rtx_model_config(
            Precision.INT8,
            inputs=self.names,
            sequence_buckets=(32, 64),
            batch_sizes=(1, 2, 4),
        )
        config = json_format.MessageToJson(
            parse_config(text), preserving_proto_field_name=True
        )
        model = self.module.TritonPythonModel()
        model.initialize(
            {
                "model_config": config,
                "model_repository": str(self.directory),
                "model_version": "1",
                "model_instance_device_id": "0",
            }
        )
        return model

    def feed(self, rows: int, length: int, *, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {n: rng.integers(0, 99, (rows, length), np.int32) for n in self.names}


@pytest.fixture(params=[NAMES, NAMES[:2]], ids=["token types", "none"])
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """The model file, imported as Triton's stub does."""
    names = request.param
    cuda, rtx = Cuda(), Rtx(names)
    triton: Any = ModuleType("triton_python_backend_utils")
    triton.Tensor = Tensor
    triton.InferenceResponse = InferenceResponse
    triton.get_input_tensor_by_name = lambda feed, name: Tensor(name, feed[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(
        sys.modules,
        "cuda.bindings",
        SimpleNamespace(runtime=cuda),  # type: ignore[arg-type]
    )
    spec = importlib.util.spec_from_file_location("rtx_model_under_test", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.plan").write_bytes(b"plan")
    return Bench(module, cuda, rtx, tmp_path, names)


def check(response: InferenceResponse, feed: dict[str, np.ndarray]) -> None:
    """Both logits, by name and in float32."""
    start, end = response.output_tensors
    total = sum(feed.values())
    assert (start.name, end.name) == ("start_logits", "end_logits")
    assert start.array.dtype == end.array.dtype == np.float32
    np.testing.assert_array_equal(start.array, total)
    np.testing.assert_array_equal(end.array, -total)


def test_warm_up_and_cache(bench: Bench) -> None:
    """Every bucket runs once singly and once full; compiled kernels are kept."""
    bench.start()
    assert sorted(bench.rtx.context.shapes) == [(1, 32), (1, 64), (4, 32), (4, 64)]
    assert bench.rtx.config.cuda_graph_strategy == "whole"
    assert bench.rtx.config.cache is bench.rtx.cache
    assert bench.rtx.loaded == []
    assert (bench.directory / "1" / "runtime.cache").read_bytes() == b"kernels"
    bench.start()
    assert bench.rtx.loaded == [b"kernels"]


def test_merged_requests(bench: Bench) -> None:
    """Requests of one length run together, in batches the engine knows."""
    model = bench.start()
    bench.rtx.context.shapes.clear()
    feeds = [bench.feed(rows, 32, seed=rows) for rows in (1, 3, 2)]
    for response, feed in zip(model.execute(feeds), feeds, strict=True):
        check(response, feed)
    assert bench.rtx.context.shapes == [(4, 32), (2, 32)]


def test_unequal_requests(bench: Bench) -> None:
    """Requests of two lengths run one by one, odd batches in parts."""
    model = bench.start()
    bench.rtx.context.shapes.clear()
    feeds = [bench.feed(3, 32), bench.feed(1, 64)]
    for response, feed in zip(model.execute(feeds), feeds, strict=True):
        check(response, feed)
    assert bench.rtx.context.shapes == [(2, 32), (1, 32), (1, 64)]


def test_shape_beyond_the_engine(bench: Bench) -> None:
    """A length the engine has no profile for is an error with that shape."""
    model = bench.start()
    with pytest.raises(RuntimeError, match=r"of shape \(1, 65\)"):
        model.execute([bench.feed(1, 65)])


def test_foreign_plan(bench: Bench) -> None:
    """A plan this library cannot load says how to get one."""
    (bench.directory / "1" / "model.plan").write_bytes(b"other")
    with pytest.raises(
        RuntimeError, match=r"TensorRT-RTX 1\.7\.1 .* --target tensorrt-rtx"
    ):
        bench.start()


def test_cuda_error(bench: Bench) -> None:
    """An error of CUDA reaches Triton, and does not pass for logits."""
    model = bench.start()
    bench.cuda.fails = True
    with pytest.raises(RuntimeError, match="CUDA: 700"):
        model.execute([bench.feed(1, 32)])


def test_all_is_freed(bench: Bench) -> None:
    """Nothing of the GPU stays behind."""
    model = bench.start()
    assert bench.cuda.held
    model.finalize()
    assert not bench.cuda.held
    assert bench.cuda.streams == 0
