"""Triton's gRPC edge, against a small real gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from int8qa.contract import ALONE_PARAMETER, Precision
from int8qa.errors import (
    ContractError,
    DeadlineExceededError,
    EngineError,
    EngineOutputError,
    EngineUnavailableError,
    ModelLoadError,
)
from int8qa.gateway.tensors import PaddedBatch
from int8qa.gateway.triton import ERROR_BY_CODE, TritonEngine, map_triton_errors
from tests.gateway.fakes import build_contract

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers start logits = input ids, end logits = their negative."""

    ready: bool = True
    failure: tuple[grpc.StatusCode, str] | None = None
    datatype: str = "INT32"
    output_datatype: str = "FP32"
    stall: bool = False
    build_id: str = ""
    controlled: list[tuple[str, str, str | None]] = field(default_factory=list)
    seen: list[service_pb2.ModelInferRequest] = field(default_factory=list)

    async def ModelReady(self, request, context):  # noqa: N802 - gRPC's name
        return service_pb2.ModelReadyResponse(ready=self.ready)

    async def ModelMetadata(self, request, context):  # noqa: N802 - gRPC's name
        def describe(name: str, datatype: str) -> object:
            return service_pb2.ModelMetadataResponse.TensorMetadata(
                name=name, datatype=datatype, shape=[-1, -1]
            )

        return service_pb2.ModelMetadataResponse(
            name=request.name,
            inputs=[describe(name, self.datatype) for name in INPUTS],
            outputs=[describe(f"{side}_logits", "FP32") for side in ("start", "end")],
        )

    async def ModelConfig(self, request, context):  # noqa: N802 - gRPC's name
        config = model_config_pb2.ModelConfig(name=request.name)
        config.parameters["build_id"].string_value = self.build_id
        return service_pb2.ModelConfigResponse(config=config)

    async def RepositoryModelLoad(self, request, context):  # noqa: N802 - gRPC's name
        return await self._control(
            "load", request, context, service_pb2.RepositoryModelLoadResponse()
        )

    async def RepositoryModelUnload(self, request, context):  # noqa: N802
        return await self._control(
            "unload", request, context, service_pb2.RepositoryModelUnloadResponse()
        )

    async def _control(self, action, request, context, response):
        key = dict(context.invocation_metadata()).get(
            "triton-grpc-protocol-int8qa-control"
        )
        self.controlled.append((action, request.model_name, key))
        if self.failure is not None:
            await context.abort(*self.failure)
        return response

    async def ModelInfer(self, request, context):  # noqa: N802 - gRPC's name
        self.seen.append(request)
        if self.stall:
            await asyncio.sleep(30)
        if self.failure is not None:
            await context.abort(*self.failure)
        ids = np.frombuffer(request.raw_input_contents[0], dtype=np.int32)
        dtype = np.float32 if self.output_datatype == "FP32" else np.float64
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, sign in (("start_logits", 1), ("end_logits", -1)):
            tensor = response.outputs.add()
            tensor.name, tensor.datatype = name, self.output_datatype
            tensor.shape.extend(request.inputs[0].shape)
            response.raw_output_contents.append((sign * ids).astype(dtype).tobytes())
        return response


@contextlib.asynccontextmanager
async def run_triton(triton: FakeTriton, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def connect(
    port: int, tokenizer, servers: int = 1
) -> AsyncIterator[TritonEngine]:
    contract = build_contract(tokenizer)
    engine = TritonEngine(f"127.0.0.1:{port}", contract, servers=servers)
    await engine.connect()
    try:
        yield engine
    finally:
        await engine.close()


def build_batch() -> PaddedBatch:
    ids = np.arange(64, dtype=np.int32).reshape(2, 32)
    return PaddedBatch(ids, np.ones_like(ids), np.zeros_like(ids))


async def test_batch_goes_there_and_back(tokenizer):
    """INT32 [B, S] under the contract's names goes out, float32 [B, S] comes back."""
    triton = FakeTriton()
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        batch = build_batch()
        logits = await engine.infer(Precision.FP16, batch, 5.0)
    assert logits.start.dtype == np.float32
    np.testing.assert_array_equal(logits.start, batch.input_ids)
    np.testing.assert_array_equal(logits.end, -batch.input_ids)
    (request,) = triton.seen
    assert request.model_name == "qa_fp16"
    assert [tensor.name for tensor in request.inputs] == list(INPUTS)
    assert {tensor.datatype for tensor in request.inputs} == {"INT32"}
    assert {tuple(tensor.shape) for tensor in request.inputs} == {(2, 32)}


@pytest.mark.parametrize("servers", [1, 3])
async def test_triton_knows_who_is_alone(tokenizer, servers: int):
    """A batch that may have all of its Triton's cores says so, others say nothing."""
    triton = FakeTriton()
    async with run_triton(triton) as port, connect(port, tokenizer, servers) as engine:
        for beside in range(4):
            batch = dataclasses.replace(build_batch(), beside=beside)
            await engine.infer(Precision.INT8, batch, None)
    alone = [request.parameters.get(ALONE_PARAMETER) for request in triton.seen]
    assert all(parameter.bool_param for parameter in alone[:servers])
    assert alone[servers:] == [None] * (4 - servers)


async def test_metadata_is_held_to_the_contract(tokenizer):
    """A model with other types is a contract error; one that is loading is not ready."""
    triton = FakeTriton()
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        assert await engine.ready(Precision.INT8)
        await engine.check_contract(Precision.INT8)
        triton.build_id = "other"
        with pytest.raises(ContractError, match=r"qa_int8 of build other.*of test"):
            await engine.check_contract(Precision.INT8)
        triton.build_id = ""
        triton.datatype = "INT64"
        with pytest.raises(ContractError, match="INT64"):
            await engine.check_contract(Precision.INT8)
        triton.ready = False
        assert not await engine.ready(Precision.INT8)


async def test_control_names_the_build_and_the_key(tokenizer):
    """Loading asks for this build's model with the key; a refusal keeps its reason."""
    triton = FakeTriton()
    contract = build_contract(tokenizer).model_copy(update={"generation": 3})
    async with run_triton(triton) as port:
        engine = TritonEngine(f"127.0.0.1:{port}", contract, control_key="k")
        await engine.connect()
        await engine.load(Precision.INT8)
        await engine.unload(Precision.FP16)
        triton.failure = (grpc.StatusCode.INVALID_ARGUMENT, "no such plan")
        with pytest.raises(ModelLoadError, match=r"load qa_int8_3: .*no such plan"):
            await engine.load(Precision.INT8)
        await engine.close()
    assert triton.controlled[:2] == [
        ("load", "qa_int8_3", "k"),
        ("unload", "qa_fp16_3", "k"),
    ]


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c.name != "OK"])
async def test_every_status_becomes_an_error_of_ours(tokenizer, code: grpc.StatusCode):
    """Whatever status Triton fails with, the caller sees the class of the table."""
    triton = FakeTriton(failure=(code, "something about tensors"))
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        with pytest.raises(ERROR_BY_CODE[code.name]) as caught:
            await engine.infer(Precision.INT8, build_batch(), 5.0)
    assert type(caught.value) is ERROR_BY_CODE[code.name]
    assert isinstance(caught.value.__cause__, InferenceServerException)


def test_table_knows_every_grpc_status():
    """A status that a new gRPC brings fails here until it is decided on."""
    assert ERROR_BY_CODE.keys() == {code.name for code in grpc.StatusCode}
    for kind in ERROR_BY_CODE.values():
        assert issubclass(kind, (EngineError, DeadlineExceededError))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (InferenceServerException("client side"), EngineOutputError),
        (
            InferenceServerException("Socket closed", status="StatusCode.UNAVAILABLE"),
            EngineUnavailableError,
        ),
        (
            InferenceServerException(
                "Received RST_STREAM with error code 2", status="StatusCode.INTERNAL"
            ),
            EngineUnavailableError,
        ),
        (
            InferenceServerException("Stream removed", status="StatusCode.UNKNOWN"),
            EngineUnavailableError,
        ),
        (
            InferenceServerException("new", status="StatusCode.FROM_THE_FUTURE"),
            EngineOutputError,
        ),
        (grpc.RpcError(), EngineOutputError),
        (grpc.aio.UsageError("Channel is closed."), EngineUnavailableError),
        (asyncio.InvalidStateError(), EngineUnavailableError),
        (ValueError("buffer size must be a multiple"), EngineOutputError),
    ],
)
def test_constructed_errors(raised: Exception, expected: type[Exception]):
    """Errors that are hard to provoke map as well, and keep their cause."""
    with pytest.raises(expected) as caught, map_triton_errors("host:1"):
        raise raised
    assert caught.value.__cause__ is raised


async def test_nobody_there_is_unavailable(tokenizer):
    """A refused connection is EngineUnavailableError, for probes and batches."""
    async with run_triton(FakeTriton()) as port:
        pass
    async with connect(port, tokenizer) as engine:
        for call in (
            engine.ready(Precision.INT8),
            engine.check_contract(Precision.INT8),
            engine.infer(Precision.INT8, build_batch(), 5.0),
        ):
            with pytest.raises(EngineUnavailableError):
                await call


async def test_restarted_triton_is_found_again(tokenizer):
    """The channel reconnects by itself, on the same port, without a new engine."""
    async with run_triton(FakeTriton()) as port:
        engine = TritonEngine(f"127.0.0.1:{port}", build_contract(tokenizer))
        await engine.connect()
        await engine.infer(Precision.INT8, build_batch(), 5.0)
    try:
        with pytest.raises(EngineUnavailableError):
            await engine.infer(Precision.INT8, build_batch(), 5.0)
        async with run_triton(FakeTriton(), port):
            for _ in range(100):
                try:
                    await engine.infer(Precision.INT8, build_batch(), 5.0)
                    break
                except EngineUnavailableError:
                    await asyncio.sleep(0.1)
            else:
                pytest.fail("the channel did not reconnect")
    finally:
        await engine.close()


async def test_slow_triton_is_a_deadline(tokenizer):
    """A batch that outlives its timeout is DeadlineExceededError."""
    triton = FakeTriton(stall=True)
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        with pytest.raises(DeadlineExceededError):
            await engine.infer(Precision.INT8, build_batch(), 0.1)


async def test_triton_knows_the_deadline(tokenizer):
    """Each request carries its time left in microseconds, so for a model whose queue has a policy."""
    triton = FakeTriton()
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        for timeout_s in (2.5, 1.0, None):
            await engine.infer(Precision.INT8, build_batch(), timeout_s)
    sent = [request.parameters["timeout"].int64_param for request in triton.seen[:2]]
    assert sent == [2_500_000, 1_000_000]
    assert "timeout" not in triton.seen[2].parameters


async def test_timeout_in_tritons_queue_is_a_deadline(tokenizer):
    """Triton calls it UNAVAILABLE, but Triton is there: the watch must not hear of it."""
    triton = FakeTriton(
        failure=(grpc.StatusCode.UNAVAILABLE, "[request id: 1] Request timeout expired")
    )
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        with pytest.raises(DeadlineExceededError):
            await engine.infer(Precision.INT8, build_batch(), 5.0)


async def test_wrong_output_type_is_named(tokenizer):
    """Logits of another type are EngineOutputError and the message says which."""
    triton = FakeTriton(output_datatype="FP64")
    async with run_triton(triton) as port, connect(port, tokenizer) as engine:
        with pytest.raises(EngineOutputError, match="float64"):
            await engine.infer(Precision.INT8, build_batch(), 5.0)


async def test_closed_engine_is_unavailable(tokenizer):
    """After close every call is refused in our terms."""
    async with run_triton(FakeTriton()) as port:
        async with connect(port, tokenizer) as engine:
            pass
        with pytest.raises(EngineUnavailableError):
            await engine.ready(Precision.INT8)
