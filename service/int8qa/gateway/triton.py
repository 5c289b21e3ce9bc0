"""Triton over gRPC; the only module that imports tritonclient.

In: padded batches. Out: logits, or one of int8qa's errors; none of tritonclient's
or gRPC's leaves this file. Knows nothing of batching, windows or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import aio as triton_grpc
from tritonclient.utils import InferenceServerException

from int8qa.contract import (
    ALONE_PARAMETER,
    BUILD_ID_PARAMETER,
    CONTROL_HEADER,
    END_LOGITS,
    INPUT_DATATYPE,
    START_LOGITS,
    Contract,
    Precision,
    check_model_tensors,
)
from int8qa.errors import (
    ContractError,
    DeadlineExceededError,
    EngineOutputError,
    EngineUnavailableError,
    Int8qaError,
    ModelLoadError,
)
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.gateway.tracing import NO_TRACING, Tracing

PROBE_TIMEOUT_S = 2.0
"""How long a probe may take before Triton counts as hung."""

_CONTROL_TIMEOUT_S = 600.0
"""For loading a model: plans of large readers take minutes to warm up."""

_GRPC_CONTROL_HEADER = f"triton-grpc-protocol-{CONTROL_HEADER}"
"""Source: Triton's --grpc-restricted-protocol, which prefixes the key's name."""

_MAX_MESSAGE_BYTES = 256 * 2**20
_MAX_DETAIL_CHARS = 300

CHANNEL_ARGUMENTS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A peer that vanished without closing is noticed within about 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own back-off grows to 2 minutes; a restarted Triton is wanted within 1 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    # Triton is on loopback or next door, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
)

ERROR_BY_CODE: dict[str, type[Int8qaError]] = {
    "OK": EngineOutputError,  # a failure that calls itself a success
    "CANCELLED": EngineUnavailableError,  # by Triton, while it shuts down
    "UNKNOWN": EngineOutputError,
    "INVALID_ARGUMENT": EngineOutputError,  # the model refuses our tensors
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "NOT_FOUND": EngineUnavailableError,  # the model is not loaded
    "ALREADY_EXISTS": EngineOutputError,
    "PERMISSION_DENIED": EngineUnavailableError,
    "UNAUTHENTICATED": EngineUnavailableError,
    "RESOURCE_EXHAUSTED": EngineUnavailableError,
    "FAILED_PRECONDITION": EngineUnavailableError,
    "ABORTED": EngineUnavailableError,
    "OUT_OF_RANGE": EngineOutputError,
    "UNIMPLEMENTED": EngineUnavailableError,  # something listens, but no Triton
    "INTERNAL": EngineOutputError,  # the backend raised
    "UNAVAILABLE": EngineUnavailableError,
    "DATA_LOSS": EngineOutputError,
}
"""Every gRPC status code and what it means to a request; a test counts them."""

_TORN_CONNECTION = ("rst_stream", "stream removed", "connection reset", "broken pipe",
                    "socket closed", "goaway")  # fmt: skip
"""What gRPC says, under INTERNAL or UNKNOWN, when the server died mid-call."""

_EXPIRED_IN_QUEUE = "request timeout expired"
"""What Triton says, under UNAVAILABLE, of a request that its queue rejected because
the request's own timeout passed. Source: triton-inference-server/core,
dynamic_batch_scheduler.cc."""


class TritonEngine:
    """The models of one Triton, reached through one gRPC channel."""

    def __init__(
        self,
        url: str,
        contract: Contract,
        *,
        control_key: str = "",
        tracing: Tracing = NO_TRACING,
        target: str | None = None,
        channel_arguments: Sequence[tuple[str, int | str]] = CHANNEL_ARGUMENTS,
        servers: int = 1,
    ) -> None:
        """Prepare; ``connect`` opens the channel.

        Args:
            url: host:port, and what errors and traces call this Triton.
            contract: of the models to ask for.
            control_key: without it no model can be loaded.
            tracing: of the process.
            target: what gRPC is to connect to, where that is not ``url``.
            channel_arguments: gRPC's.
            servers: Tritons that the channel leads to. With a batch for each, none has
                more than one, which then may use all of its cores.
        """
        self._url = url
        self._target = target or url
        self._channel_arguments = list(channel_arguments)
        self._servers = servers
        self._contract = contract
        self._control_headers = (
            {_GRPC_CONTROL_HEADER: control_key} if control_key else None
        )
        self._tracing = tracing
        self._client: Any = None

    async def connect(self) -> None:
        """Open the channel; gRPC connects, and reconnects, by itself."""
        if self._client is None:
            self._client = triton_grpc.InferenceServerClient(
                url=self._target, channel_args=self._channel_arguments
            )

    async def close(self) -> None:
        """Close the channel."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def ready(self, precision: Precision) -> bool:
        """Whether Triton has the model of a precision loaded.

        Raises:
            EngineUnavailableError: Triton is not reachable, or hangs.
        """
        with self._map_probe_errors():
            return bool(
                await self._require_client().is_model_ready(
                    self._contract.triton_name(precision),
                    client_timeout=PROBE_TIMEOUT_S,
                )
            )

    async def check_contract(self, precision: Precision) -> None:
        """Hold Triton's metadata of a model to the contract.

        Raises:
            ContractError: the build, or names or types of tensors differ.
            EngineUnavailableError: Triton is not reachable, or hangs.
        """
        name = self._contract.triton_name(precision)
        with self._map_probe_errors():
            client = self._require_client()
            metadata = await client.get_model_metadata(
                name, client_timeout=PROBE_TIMEOUT_S
            )
            answer = await client.get_model_config(name, client_timeout=PROBE_TIMEOUT_S)
        check_model_tensors(
            self._contract,
            precision,
            inputs=[(tensor.name, tensor.datatype) for tensor in metadata.inputs],
            outputs=[(tensor.name, tensor.datatype) for tensor in metadata.outputs],
            build_id=answer.config.parameters[BUILD_ID_PARAMETER].string_value,
        )

    async def holds(self, precision: Precision) -> bool:
        """Whether Triton has the model of the contract loaded, and no other.

        Raises:
            EngineUnavailableError: Triton is not reachable, or hangs.
        """
        with contextlib.suppress(ContractError):
            if await self.ready(precision):
                await self.check_contract(precision)
                return True
        return False

    async def load(self, precision: Precision) -> None:
        """Have Triton load a model, beside those it serves; returns once it is ready.

        Raises:
            ModelLoadError: Triton refused or failed; says why.
        """
        await self._control(precision, "load")

    async def unload(self, precision: Precision) -> None:
        """Have Triton give a model up once its last batch is answered.

        Raises:
            ModelLoadError: Triton refused or failed; says why.
        """
        await self._control(precision, "unload")

    async def _control(self, precision: Precision, action: str) -> None:
        name = self._contract.triton_name(precision)
        client = self._require_client()
        act = client.load_model if action == "load" else client.unload_model
        try:
            await act(
                name, headers=self._control_headers, client_timeout=_CONTROL_TIMEOUT_S
            )
        except (InferenceServerException, grpc.RpcError, grpc.aio.UsageError) as error:
            detail = " ".join(str(error).split())[:_MAX_DETAIL_CHARS]
            raise ModelLoadError(
                f"Triton at {self._url} did not {action} {name}: {detail}. Its log "
                f"says more; a Triton that runs on its own must have been started with "
                f"this gateway's INT8QA_TRITON__CONTROL_KEY"
            ) from error

    async def infer(
        self, precision: Precision, batch: PaddedBatch, timeout_s: float | None
    ) -> BatchLogits:
        """Run one batch, int32 [B, S], to logits, float32 [B, S].

        Raises:
            DeadlineExceededError: Triton did not answer within ``timeout_s``.
            EngineUnavailableError: Triton or the model is not there.
            EngineOutputError: Triton refused the batch or answered nonsense.
        """
        client = self._require_client()
        model_name = self._contract.triton_name(precision)
        with (
            self._tracing.trace_triton(self._url, model_name) as metadata,
            map_triton_errors(self._url),
        ):
            inputs = []
            for name in self._contract.inputs:
                array = getattr(batch, name)
                tensor = triton_grpc.InferInput(name, list(array.shape), INPUT_DATATYPE)
                tensor.set_data_from_numpy(array)
                inputs.append(tensor)
            result = await client.infer(
                model_name,
                inputs,
                outputs=[
                    triton_grpc.InferRequestedOutput(START_LOGITS),
                    triton_grpc.InferRequestedOutput(END_LOGITS),
                ],
                # For a queue with a policy of the operator's; ours has none, and drops
                # what gRPC's deadline cancels. 0 would mean its default.
                timeout=None if timeout_s is None else max(1, int(timeout_s * 1e6)),
                client_timeout=timeout_s,
                headers=metadata,
                parameters=(
                    {ALONE_PARAMETER: True} if batch.beside < self._servers else None
                ),
            )
            start = result.as_numpy(START_LOGITS)
            end = result.as_numpy(END_LOGITS)
        for name, array in ((START_LOGITS, start), (END_LOGITS, end)):
            if array is None or array.dtype != np.float32:
                found = "nothing" if array is None else array.dtype.name
                raise EngineOutputError(
                    f"Triton returned {found} for {name} of {model_name}; "
                    f"expected float32. Rebuild the model repository"
                )
        return BatchLogits(start=start, end=end)

    def _require_client(self) -> Any:
        if self._client is None:
            raise EngineUnavailableError(
                f"the channel to Triton at {self._url} is closed"
            )
        return self._client

    @contextlib.contextmanager
    def _map_probe_errors(self) -> Iterator[None]:
        try:
            with map_triton_errors(self._url):
                yield
        except (DeadlineExceededError, EngineOutputError) as error:
            # A probe has no deadline of a user, and asks for no logits.
            raise EngineUnavailableError(str(error)) from error


@contextlib.contextmanager
def map_triton_errors(url: str) -> Iterator[None]:
    """Turn every error of tritonclient and gRPC into one of int8qa's.

    Raises:
        DeadlineExceededError: the call's timeout passed.
        EngineUnavailableError: Triton or the model is not there.
        EngineOutputError: everything else that went wrong between us.
    """
    try:
        yield
    except InferenceServerException as error:
        # status() is "StatusCode.UNAVAILABLE" from gRPC, None from the client itself.
        code = (error.status() or "").rpartition(".")[2]
        raise _build_error(url, code, error.message() or "") from error
    except grpc.RpcError as error:
        status = error.code() if hasattr(error, "code") else None
        details = error.details() if hasattr(error, "details") else ""
        raise _build_error(
            url, status.name if status is not None else "", details or ""
        ) from error
    except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        # What grpc.aio raises for a channel that was closed under a call.
        raise EngineUnavailableError(
            f"the channel to Triton at {url} was closed during a call"
        ) from error
    except (AttributeError, KeyError, ValueError, TypeError, struct.error) as error:
        # tritonclient unpacks responses unchecked.
        raise EngineOutputError(
            f"the answer of Triton at {url} could not be read ({type(error).__name__})"
        ) from error


def _build_error(url: str, code: str, details: str) -> Int8qaError:
    kind = ERROR_BY_CODE.get(code, EngineOutputError)
    if code == "UNAVAILABLE" and _EXPIRED_IN_QUEUE in details.lower():
        kind = DeadlineExceededError
    torn = any(sign in details.lower() for sign in _TORN_CONNECTION)
    if kind is EngineOutputError and torn:
        kind = EngineUnavailableError
    detail = " ".join(details.split())[:_MAX_DETAIL_CHARS]
    if kind is DeadlineExceededError:
        return DeadlineExceededError(
            f"Triton at {url} did not answer in time; ask for less at once, or raise "
            f"INT8QA_LIMITS__REQUEST_TIMEOUT_S"
        )
    if kind is EngineUnavailableError:
        return EngineUnavailableError(
            f"Triton at {url} is not available ({code}: {detail}); try again shortly"
        )
    return EngineOutputError(
        f"Triton at {url} failed the batch ({code or 'client error'}: {detail}); see "
        f"its log"
    )
