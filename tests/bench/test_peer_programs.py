"""The peers' own programs, with small fakes for the frameworks that CI does not have."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.bench.peer_fakes import write_items
from tests.gateway.fakes import CONTEXT, KEEPER, QUESTION, TOKENIZER_JSON

PEERS = Path(__file__).parents[2] / "bench" / "peers"
LONG = "Snow fell on the quay. " * 150 + CONTEXT


def load_program(
    path: str, monkeypatch: pytest.MonkeyPatch, **fakes: Any
) -> ModuleType:
    """A peer's program as a module, ``fakes`` in place of what it imports."""
    monkeypatch.setattr(sys, "path", [str(PEERS), *sys.path])
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    spec = importlib.util.spec_from_file_location(
        f"peer_{path.replace('/', '_')}", PEERS / f"{path}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_program("reading", monkeypatch)
    monkeypatch.setitem(sys.modules, "reading", module)
    return module


def point_at(reader: Any, ids: Any, phrase: str = KEEPER) -> tuple[Any, Any]:
    """Logits [B, S] that are highest where the phrase stands."""
    wanted = reader._tokenizer.encode(phrase, add_special_tokens=False).ids
    start, end = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.float32)
    for row, line in enumerate(ids.tolist()):
        for place in range(len(line)):
            if line[place : place + len(wanted)] == wanted:
                start[row, place] = end[row, place + len(wanted) - 1] = 20.0
    return start, end


def test_reading_finds_the_answer(reading: ModuleType) -> None:
    """In one window and in the last of many; offsets count code points."""
    reader = reading.Reading(TOKENIZER_JSON)
    for context, more in ((CONTEXT, False), (LONG, True)):
        windows = reader.split(QUESTION, context)
        assert (len(windows) > 1) is more
        arrays = reading.pad_windows(windows)
        assert arrays["input_ids"].shape[1] == max(map(len, windows)) <= 384
        logits = point_at(reader, arrays["input_ids"])
        assert reading.find_answer(context, windows, *logits) == KEEPER


def test_reading_never_answers_with_the_question(reading: ModuleType) -> None:
    """Nor with an end before its start, nor with more than 30 tokens."""
    reader = reading.Reading(TOKENIZER_JSON)
    windows = reader.split(QUESTION, LONG)
    shape = reading.pad_windows(windows)["input_ids"].shape
    generator = np.random.default_rng(5)
    for _ in range(20):
        logits = generator.normal(size=(2, *shape)).astype(np.float32)
        answer = reading.find_answer(LONG, windows, *logits)
        assert answer
        assert answer in LONG
        tokens = reader._tokenizer.encode(answer, add_special_tokens=False)
        assert len(tokens) <= reading.ANSWER_TOKENS


def test_padding(reading: ModuleType) -> None:
    """To the longest window, or to what is asked for."""
    reader = reading.Reading(TOKENIZER_JSON)
    short, long = (reader.split(QUESTION, c)[0] for c in ("Ana.", CONTEXT))
    arrays = reading.pad_windows([short, long])
    assert arrays["input_ids"].shape == (2, len(long))
    assert arrays["attention_mask"].sum(axis=1).tolist() == [len(short), len(long)]
    assert arrays["token_type_ids"][0, len(short) - 1] == 1
    assert reading.pad_windows([short], 384)["input_ids"].shape == (1, 384)


def test_litserve(reading: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps in LitServe's order, over two requests of unequal length."""

    class LitApi:
        def __init__(self, **given: Any) -> None:
            self.given = given

    class Session:
        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            assert path == "reader.onnx"
            assert options.intra_op_num_threads == 2
            assert providers == ["CPUExecutionProvider"]

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name=n) for n in ("input_ids", "attention_mask")]

        def run(self, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
            assert outputs == ["start_logits", "end_logits"]
            assert feed.keys() == {"input_ids", "attention_mask"}
            return list(point_at(api.reading, feed["input_ids"]))

    litserve = SimpleNamespace(LitAPI=LitApi)
    runtime = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=Session)
    server = load_program(
        "litserve/server", monkeypatch, litserve=litserve, onnxruntime=runtime
    )
    api = server.ReaderApi(Path("reader.onnx"), TOKENIZER_JSON, 2, 8)
    assert api.given == {
        "max_batch_size": 8,
        "batch_timeout": 0.01,
        "api_path": "/answer",
    }
    api.setup("cpu")
    requests = [{"question": QUESTION, "context": c} for c in (CONTEXT, LONG)]
    inputs = api.batch([api.decode_request(request) for request in requests])
    outputs = api.unbatch(api.predict(inputs))
    assert [api.encode_response(o) for o in outputs] == [{"answer": KEEPER}] * 2


async def ask_app(app: Any, *questions: str) -> list[httpx.Response]:
    import asyncio

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://peer") as client,
    ):
        assert (await client.get("/ready")).status_code == 200
        return list(
            await asyncio.gather(
                *(
                    client.post("/answer", json={"question": q, "context": CONTEXT})
                    for q in questions
                )
            )
        )


@pytest.mark.parametrize("batch", [1, 8])
async def test_transformers_server(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread asks; what waits goes in together up to the batch; errors are 500."""
    server = load_program("transformers/server", monkeypatch)
    sizes: list[int] = []
    threads = set()

    def ask(texts: list[dict[str, str]]) -> list[str]:
        sizes.append(len(texts))
        threads.add(threading.get_ident())
        if any(item["question"] == "broken" for item in texts):
            raise RuntimeError("no answer")
        return [item["question"].upper() for item in texts]

    app = server.make_app(ask, batch)
    replies = await ask_app(app, *"abcdef")
    assert [reply.json()["answer"] for reply in replies] == list("ABCDEF")
    assert sum(sizes) == 6
    assert max(sizes) <= batch
    assert len(threads) == 1
    (broken,) = await ask_app(server.make_app(ask, batch), "broken")
    assert broken.status_code == 500


def test_transformers_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as documented; a list of one comes back without its list."""
    server = load_program("transformers/server", monkeypatch)
    asked: list[Any] = []

    def pipe(*, question: list[str], context: list[str], **options: Any) -> Any:
        assert context == ["c"] * len(question)
        asked.append(options)
        found = [{"answer": one.upper()} for one in question]
        return found if len(found) > 1 else found[0]

    def pipeline(task: str, **options: Any) -> Any:
        assert task == "question-answering"
        assert options == {"model": "dir", "dtype": "float32", "device": "cpu"}
        return pipe

    transformers = SimpleNamespace(pipeline=pipeline)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "float32", "float32")
    ask = server.load_pipeline("dir", 8)
    texts = [{"question": q, "context": "c"} for q in "ab"]
    assert ask(texts) == ["A", "B"]
    assert ask(texts[:1]) == ["A"]
    assert asked[0] == {
        "batch_size": 8,
        "max_seq_len": 384,
        "doc_stride": 128,
        "max_answer_len": 30,
    }


@pytest.mark.parametrize("pad", [0, 384])
async def test_triton_client(
    pad: int, reading: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every question once, all its windows in one request; errors are counted."""
    client_module = load_program("triton/client", monkeypatch)
    reader = reading.Reading(TOKENIZER_JSON)
    questions = json.loads(write_items(tmp_path, 5).read_text())
    for item in questions:
        item["context"] = LONG if item["id"] == "q2" else CONTEXT
    shapes: list[tuple[int, ...]] = []

    class Client:
        async def infer(self, model: str, inputs: Any, client_timeout: float) -> Any:
            assert model == "reader"
            assert client_timeout > 0
            assert [one.name() for one in inputs] == ["input_ids", "attention_mask"]
            raw = inputs[0]._raw_content
            ids = np.frombuffer(raw, np.int32).reshape(inputs[0].shape())
            shapes.append(ids.shape)
            if len(shapes) == 2 + 4:
                raise client_module.InferenceServerException("full", status="429")
            logits = dict(
                zip(("start_logits", "end_logits"), point_at(reader, ids), strict=True)
            )
            return SimpleNamespace(as_numpy=logits.get)

    spec = {"concurrency": 1, "warm_up": 2, "options": {"pad": pad}}
    names = ["input_ids", "attention_mask"]
    outcome = await client_module.load(Client(), reader, names, questions, spec)
    assert len(shapes) == 2 + 5
    assert outcome["failures"] == {"Triton 429": 1}
    assert outcome["answers"] == dict.fromkeys(("q0", "q1", "q2", "q4"), KEEPER)
    assert len(outcome["latency_ms"]) == 4
    lengths = {shape[1] for shape in shapes}
    assert lengths == {384} if pad else len(lengths) > 1
    assert max(shape[0] for shape in shapes) > 1


def test_triton_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unequal length are padded together, run once, and cut apart."""

    class Request(dict[str, Any]):
        pass

    backend = SimpleNamespace(
        Tensor=lambda name, array: (name, array),
        InferenceResponse=dict,
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(
            as_numpy=lambda: request[name]
        ),
    )
    fed: list[Any] = []

    class Infer:
        def infer(self, feed: Any) -> None:
            fed.append(feed)

        def get_tensor(self, name: str) -> Any:
            sign = 1 if name == "start_logits" else -1
            return SimpleNamespace(data=sign * fed[-1]["input_ids"].astype(np.float32))

    module = load_program(
        "triton/model",
        monkeypatch,
        openvino=SimpleNamespace(),
        triton_python_backend_utils=backend,
    )
    model = module.TritonPythonModel()
    model._inputs = ["input_ids", "attention_mask"]
    model._request = Infer()
    requests = []
    for value, (rows, length) in enumerate([(1, 20), (3, 33), (1, 32)], start=1):
        ids = np.full((rows, length), value, np.int32)
        requests.append(Request(input_ids=ids, attention_mask=np.ones_like(ids)))
    responses = model.execute(requests)
    (feed,) = fed
    assert feed["input_ids"].shape == (5, 48)
    assert feed["attention_mask"].sum(axis=1).tolist() == [20, 33, 33, 33, 32]
    for value, (request, response) in enumerate(
        zip(requests, responses, strict=True), start=1
    ):
        assert response["start_logits"].shape == request["input_ids"].shape
        assert (response["start_logits"] == value).all()
        assert (response["end_logits"] == -value).all()


@pytest.mark.parametrize(("ragged", "generation"), [(True, 0), (False, 3)])
def test_triton_repository(
    ragged: bool, generation: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's protobuf takes the configuration; the engine is int8qa's, linked."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    serve = load_program("triton/serve", monkeypatch)
    built = tmp_path / "built"
    name = "qa_int8_3" if generation else "qa_int8"
    (built / name / "1").mkdir(parents=True)
    (built / name / "1" / "model.xml").write_text("<net/>")
    (built / name / "1" / "model.bin").write_bytes(b"1")
    contract = {"generation": generation, "inputs": ["input_ids", "attention_mask"]}
    (built / "contract.json").write_text(json.dumps(contract))
    target = tmp_path / "repository"
    for _ in range(2):  # what lay there before is replaced
        serve.write_repository(built, target, ragged=ragged, instances=2, threads=1)
    reader = target / "reader"
    assert (reader / "1" / "model.xml").read_text() == "<net/>"
    assert (reader / "1" / "model.py").read_text() == (
        PEERS / "triton" / "model.py"
    ).read_text()
    config = text_format.Parse(
        (reader / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.preferred_batch_size
    assert [one.allow_ragged_batch for one in config.input] == [ragged] * 2
    assert config.instance_group[0].count == 2
    assert config.parameters["threads"].string_value == "1"
