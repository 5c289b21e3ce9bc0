"""The file Triton runs, outside Triton: merged requests, odd rows, the same logits."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format

import int8qa.build.engines
from int8qa.build.engines.openvino import OpenVinoEngine, save_ir, write_cpu
from int8qa.build.triton_config import openvino_model_config, parse_config
from int8qa.contract import ALONE_PARAMETER, Precision
from tests.build.tiny import Graphs, make_reader, random_feed

SOURCE = Path(int8qa.build.engines.__file__).parent / "triton_openvino_model.py"
BATCH_SIZES = (1, 2, 4)


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


class Request(dict[str, np.ndarray]):
    """Triton's request: tensors by name, and what else its sender says."""

    alone = False

    def parameters(self) -> str:
        return json.dumps({ALONE_PARAMETER: True} if self.alone else {})


@pytest.fixture(scope="module")
def backend() -> Iterator[ModuleType]:
    """The model file, imported as Triton's stub does, with a stand-in for Triton."""
    name = "triton_python_backend_utils"
    stand_in: Any = ModuleType(name)
    stand_in.Tensor = Tensor
    stand_in.InferenceResponse = InferenceResponse
    stand_in.get_input_tensor_by_name = lambda request, name: Tensor(
        name, request[name]
    )
    sys.modules[name] = stand_in
    spec = importlib.util.spec_from_file_location("triton_model_under_test", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def repository(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one model, version 1, in FP32."""
    root = tmp_path_factory.mktemp("qa_fp32")
    (root / "1").mkdir()
    save_ir(onnx.load_from_string(graphs.float_clean), root / "1", Precision.FP32)
    return root


def start_model(backend: ModuleType, repository: Path, inputs: Any) -> Any:
    """``initialize`` with the arguments Triton gives, the config through its JSON."""
    config = openvino_model_config(
        Precision.FP32,
        inputs=inputs,
        sequence_buckets=(16, 32, 48, 64, 80),
        batch_sizes=BATCH_SIZES,
        max_batch_tokens=160,
    )
    model = backend.TritonPythonModel()
    model.initialize(
        {
            "model_config": json_format.MessageToJson(
                parse_config(config), preserving_proto_field_name=True
            ),
            "model_repository": str(repository),
            "model_version": "1",
        }
    )
    return model


@pytest.fixture(scope="module")
def model(backend: ModuleType, repository: Path, graphs: Graphs) -> Any:
    return start_model(backend, repository, graphs.inputs)


@pytest.fixture(scope="module")
def engine(repository: Path) -> OpenVinoEngine:
    """The same IR in the build's own engine: the oracle."""
    return OpenVinoEngine(repository / "1" / "model.xml")


@pytest.fixture
def batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that reach the engine."""
    sizes: list[int] = []
    infer = model._infer

    def record(chosen: Any, feed: Any) -> Any:
        sizes.append(len(feed["input_ids"]))
        return infer(chosen, feed)

    monkeypatch.setattr(model, "_infer", record)
    return sizes


def check_responses(responses: list[Any], requests: list[Any], engine: Any) -> None:
    assert len(responses) == len(requests)
    for response, request in zip(responses, requests, strict=True):
        names = [tensor.name for tensor in response.output_tensors]
        assert names == ["start_logits", "end_logits"]
        expected = engine.infer(request)
        for tensor, logits in zip(response.output_tensors, expected, strict=True):
            assert tensor.array.dtype == np.float32
            np.testing.assert_allclose(tensor.array, logits, atol=1e-4, rtol=0)


def make_requests(*shapes: tuple[int, int]) -> list[Any]:
    """Requests of the given rows and length, every row of its own length."""
    reader = make_reader("bert")
    return [
        Request(
            random_feed(
                reader, [length - i for i in range(rows)], length, seed=10 * rows + n
            )
        )
        for n, (rows, length) in enumerate(shapes)
    ]


def test_single_request(model: Any, engine: Any, batches: list[int]) -> None:
    """A batch of a known size goes through as it is."""
    requests = make_requests((2, 16))
    check_responses(model.execute(requests), requests, engine)
    assert batches == [2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [((3,), [2, 1]), ((1, 1), [2]), ((2, 3, 6), [4, 4, 2, 1]), ((1, 2), [2, 1])],
    ids=str,
)
def test_odd_rows(
    model: Any, engine: Any, batches: list[int], rows: Any, expected: list[int]
) -> None:
    """Merged rows run in sizes the engine knows, and come back to their requests."""
    requests = make_requests(*((n, 16) for n in rows))
    check_responses(model.execute(requests), requests, engine)
    assert batches == expected


def test_requests_of_other_lengths(model: Any, engine: Any) -> None:
    """Requests that cannot be merged are answered one by one, in order."""
    requests = make_requests((1, 16), (2, 32))
    check_responses(model.execute(requests), requests, engine)


def test_responses_are_copies(model: Any) -> None:
    """The next batch does not overwrite logits that Triton has not sent yet."""
    first = model.execute(make_requests((1, 16)))[0].output_tensors[0].array
    kept = first.copy()
    model.execute(make_requests((1, 16), (1, 16)))
    np.testing.assert_array_equal(first, kept)


def test_threads(
    backend: ModuleType,
    repository: Path,
    graphs: Graphs,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of threads comes from the environment and changes no answer."""
    monkeypatch.setenv("INT8QA_EMBEDDED__ENGINE_THREADS", "1")
    model = start_model(backend, repository, graphs.inputs)
    assert count_threads(model._alone) == 1
    assert model._beside is model._alone
    requests = make_requests((1, 16))
    check_responses(model.execute(requests), requests, engine)


def count_threads(request: Any) -> int:
    return int(request.get_compiled_model().get_property("INFERENCE_NUM_THREADS"))


@pytest.mark.parametrize("alone", [True, False])
def test_alone_on_all_cores_else_on_a_share(
    backend: ModuleType,
    repository: Path,
    graphs: Graphs,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    alone: bool,
) -> None:
    """A batch that its sender calls alone has all threads, another half of them."""
    monkeypatch.setenv("INT8QA_EMBEDDED__ENGINE_THREADS", "2")
    model = start_model(backend, repository, graphs.inputs)
    assert (count_threads(model._alone), count_threads(model._beside)) == (2, 1)
    chosen = []
    infer = model._infer

    def record(request: Any, feed: Any) -> Any:
        chosen.append(request)
        return infer(request, feed)

    monkeypatch.setattr(model, "_infer", record)
    requests = make_requests((1, 16))
    requests[0].alone = alone
    check_responses(model.execute(requests), requests, engine)
    assert chosen == [model._alone if alone else model._beside]


def test_merged_requests_are_not_alone(
    model: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two gateways may think so."""
    chosen = []
    infer = model._infer

    def record(request: Any, feed: Any) -> Any:
        chosen.append(request)
        return infer(request, feed)

    monkeypatch.setattr(model, "_infer", record)
    requests = make_requests((1, 16), (1, 16))
    for request in requests:
        request.alone = True
    check_responses(model.execute(requests), requests, engine)
    assert chosen == [model._beside]


def test_cpu_that_would_overflow(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with what to do; any one of what is wanted will do, and no file, too."""
    refusal = type("TritonModelException", (Exception,), {})
    monkeypatch.setattr(
        backend.pb_utils, "TritonModelException", refusal, raising=False
    )
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t\t: fpu avx2 avx_vnni\n")
    backend.check_cpu(tmp_path / "cpu.json", info)
    write_cpu(tmp_path, {"avx512_vnni", "avx_vnni"})
    backend.check_cpu(tmp_path / "cpu.json", info)
    backend.check_cpu(tmp_path / "cpu.json", tmp_path / "nowhere")
    info.write_text("flags\t\t: fpu avx2 avx512f\n")
    with pytest.raises(
        refusal, match=r"with avx512_vnni or avx_vnni, .* `int8qa build`"
    ):
        backend.check_cpu(tmp_path / "cpu.json", info)


def test_shapes_to_warm(backend: ModuleType) -> None:
    """Each length singly; of batches every fourth length, the longest among them."""
    lengths = list(range(16, 145, 16))
    singles, batches = backend.list_shapes(lengths, [4, 2, 1], 256)
    assert singles == [(1, length) for length in lengths]
    assert batches == [(4, 16), (2, 16), (2, 80)]
    assert backend.list_shapes([32], [1], 64) == ([(1, 32)], [])


def test_engines_are_warm_before_the_first_request(
    backend: ModuleType,
    repository: Path,
    graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Single windows on all cores; side by side also batches."""
    shapes: dict[int, list[tuple[int, ...]]] = {}
    infer = backend.TritonPythonModel._infer

    def record(model: Any, request: Any, feed: dict[str, Any]) -> Any:
        shape = feed["input_ids"].shape
        shapes.setdefault(count_threads(request), []).append(shape)
        return infer(model, request, feed)

    monkeypatch.setenv("INT8QA_EMBEDDED__ENGINE_THREADS", "2")
    monkeypatch.setattr(backend.TritonPythonModel, "_infer", record)
    start_model(backend, repository, graphs.inputs)
    singles = [(1, length) for length in (16, 32, 48, 64, 80)]
    assert {threads: sorted(ran) for threads, ran in shapes.items()} == {
        2: [*singles, (2, 80), (4, 16)],
        1: [*singles, (2, 16), (2, 80), (4, 16)],
    }


def test_it_stands_alone() -> None:
    """Inside Triton neither int8qa nor torch need be installed."""
    text = SOURCE.read_text(encoding="utf-8")
    imports = [
        line for line in text.splitlines() if line.startswith(("import ", "from "))
    ]
    assert sorted(line.split()[1].split(".")[0] for line in imports) == [
        "__future__",
        "itertools",
        "json",
        "math",
        "numpy",
        "openvino",
        "os",
        "pathlib",
        "triton_python_backend_utils",
        "typing",
    ]


def test_config_travels_as_json(graphs: Graphs) -> None:
    """Lists in parameters are JSON, since Triton's parameters are strings."""
    config = parse_config(
        openvino_model_config(
            Precision.INT8,
            inputs=graphs.inputs,
            sequence_buckets=(32,),
            batch_sizes=BATCH_SIZES,
            max_batch_tokens=64,
        )
    )
    assert json.loads(config.parameters["batch_sizes"].string_value) == [1, 2, 4]
