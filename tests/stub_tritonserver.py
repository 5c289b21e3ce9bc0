"""A stand-in for NVIDIA's tritonserver whose "plans" are ONNX graphs.

It takes the arguments that the real one gets, loads every ``model.plan`` into ONNX
Runtime and answers gRPC. A plan that is no graph makes it end, as the real one does.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from tritonclient.grpc import service_pb2, service_pb2_grpc


class Models(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Every model of a repository."""

    def __init__(self, repository: Path) -> None:
        self._sessions: dict[str, Any] = {}
        for path in sorted(repository.glob("*/1/model.plan")):
            name = path.parent.parent.name
            try:
                self._sessions[name] = onnxruntime.InferenceSession(
                    path.read_bytes(), providers=["CPUExecutionProvider"]
                )
            except Exception:  # noqa: BLE001 - whatever ONNX Runtime makes of it
                print(f"E0101 00:00:00.0 1 stub.py:1] failed to load '{name}'")
                sys.exit(1)
            print(f"I0101 00:00:00.0 1 stub.py:1] successfully loaded '{name}'")
        sys.stdout.flush()

    async def ModelReady(self, request, context):  # noqa: N802 - gRPC's name
        return service_pb2.ModelReadyResponse(ready=request.name in self._sessions)

    async def ModelMetadata(self, request, context):  # noqa: N802 - gRPC's name
        session = self._sessions[request.name]

        def describe(ports: Any, datatype: str) -> list[Any]:
            return [
                service_pb2.ModelMetadataResponse.TensorMetadata(
                    name=port.name, datatype=datatype, shape=[-1, -1]
                )
                for port in ports
            ]

        return service_pb2.ModelMetadataResponse(
            name=request.name,
            inputs=describe(session.get_inputs(), "INT32"),
            outputs=describe(session.get_outputs(), "FP32"),
        )

    async def ModelConfig(self, request, context):  # noqa: N802 - gRPC's name
        return service_pb2.ModelConfigResponse()

    async def ModelInfer(self, request, context):  # noqa: N802 - gRPC's name
        feed = {
            tensor.name: np.frombuffer(raw, np.int32).reshape(tensor.shape)
            for tensor, raw in zip(
                request.inputs, request.raw_input_contents, strict=True
            )
        }
        names = ["start_logits", "end_logits"]
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        found = self._sessions[request.model_name].run(names, feed)
        for name, array in zip(names, found, strict=True):
            tensor = response.outputs.add()
            tensor.name, tensor.datatype = name, "FP32"
            tensor.shape.extend(array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


async def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-repository", type=Path, required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server()
    models = Models(arguments.model_repository)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(models, server)
    server.add_insecure_port(f"127.0.0.1:{arguments.grpc_port}")
    await server.start()
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
