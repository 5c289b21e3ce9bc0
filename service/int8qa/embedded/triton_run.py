"""One life of Triton: a guarded process group, its readiness, its output, its end.

In: what to start and how long to wait. Out: readiness, why it failed, Triton's log in
ours. Knows nothing of the lives before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import grpc

from int8qa.embedded import guard
from int8qa.embedded.locate import STUB_NAME
from int8qa.embedded.log_lines import LogLine, find_failure, parse_log_line
from int8qa.errors import EmbeddedTritonError

TRITON_LOG = logging.getLogger("int8qa.triton")

_READY_POLL_S = 0.1
_WATCH_POLL_S = 0.5
_KILL_MARGIN_S = 5.0
_LAST_OUTPUT_S = 1.0
_MAX_LINE_BYTES = 16_384
_STUB_PROCESS_NAME = STUB_NAME[:15]  # as the kernel shortens it


async def check_grpc_health(url: str) -> bool:
    """Ask Triton's standard gRPC health service whether it serves.

    Source: grpc.health.v1, Health/Check; field 1 of the answer is the status and
    1 is SERVING. The empty request asks for the whole server.
    """
    return await _call(url, "/grpc.health.v1.Health/Check", b"") == b"\x08\x01"


async def check_model_ready(url: str, name: str) -> bool:
    """Ask Triton whether a model is loaded; False also where it does not answer.

    Source: KServe's inference protocol, ModelReady; field 1 of the request is the name,
    field 1 of the answer is true.
    """
    request = b"\x0a" + bytes([len(name)]) + name.encode()
    method = "/inference.GRPCInferenceService/ModelReady"
    return await _call(url, method, request) == b"\x08\x01"


async def _call(url: str, method: str, request: bytes) -> bytes | None:
    options = [
        # A channel of its own: the shared pool would remember the refused
        # connections of the start-up and wait ever longer between attempts.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    async with grpc.aio.insecure_channel(url, options=options) as channel:
        call = channel.unary_unary(method)
        try:
            answer: bytes = await call(request, timeout=1.0)
        except grpc.aio.AioRpcError:
            return None
    return answer


class TritonRun(asyncio.SubprocessProtocol):
    """One life of Triton: the guard process and everything below it.

    A protocol rather than asyncio's Process, whose wait() also waits for the end
    of the output; a stub that hangs while its Triton is dead would hold that back.
    """

    def __init__(self, *, shm_prefix: str, stop_timeout_s: float) -> None:
        self._shm_prefix = shm_prefix
        self._stop_timeout_s = stop_timeout_s
        self._stubs: dict[int, str] = {}
        self._models_changed = False
        self._lines: deque[LogLine] = deque(maxlen=200)
        self._rest = b""
        self._exited = asyncio.Event()
        self._output_ended = asyncio.Event()
        self._transport: asyncio.SubprocessTransport

    @classmethod
    async def spawn(
        cls,
        *,
        arguments: list[str],
        environment: dict[str, str],
        shm_prefix: str,
        directory: Path,
        stop_timeout_s: float,
    ) -> TritonRun:
        """Start the guard, which starts Triton, in a session of their own.

        A session of their own keeps Ctrl-C away from Triton: it is to stop after
        the gateway has drained, not with it.
        """
        transport, run = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(shm_prefix=shm_prefix, stop_timeout_s=stop_timeout_s),
            sys.executable,
            "-I",
            "-S",
            guard.__file__,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        run._transport = transport  # noqa: SLF001 - our own
        specification = {
            "arguments": arguments,
            "shm_prefix": shm_prefix,
            "directory": str(directory),
            "stop_timeout_s": stop_timeout_s,
        }
        run._input().write(json.dumps(specification).encode() + b"\n")  # noqa: SLF001
        return run

    @property
    def group(self) -> int:
        """Process group of the guard and of all it started."""
        return self._transport.get_pid()

    async def wait_ready(
        self, check: Callable[[], Awaitable[bool]], *, timeout_s: float
    ) -> None:
        """Wait until Triton serves all models, then note their stub processes."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._exited.is_set():
                await _wait_for(self._output_ended, _LAST_OUTPUT_S)
                raise EmbeddedTritonError(
                    f"Triton ended before it was ready ({self._describe_exit()}): "
                    f"{find_failure(self._lines)}"
                )
            if await check():
                break
            if time.monotonic() >= deadline_s:
                told = [line.message for line in self._lines if not line.is_banner]
                raise EmbeddedTritonError(
                    f"Triton was not ready within {timeout_s:g} s "
                    "(embedded.start_timeout_s); its last lines: "
                    f"{' | '.join(told[-5:]) or 'none'}"
                )
            await _wait_for(self._exited, _READY_POLL_S)
        self._note_stubs()

    def _note_stubs(self) -> None:
        self._models_changed = False
        self._stubs |= {
            process.pid: _read_stub_model(process.pid)
            for process in guard.iter_group(self.group)
            if process.name == _STUB_PROCESS_NAME
        }

    async def wait_failed(self, url: str) -> str:
        """Return, with the reason, once Triton or one of its stubs is gone.

        A stub whose model Triton has unloaded may go.
        """
        while not await _wait_for(self._exited, _WATCH_POLL_S):
            if self._models_changed:
                self._note_stubs()
            # Triton 2.51 never starts a dead stub again: it answers every request
            # with an error and still calls the model ready.
            for pid, model_name in list(self._stubs.items()):
                try:
                    stub = guard.read_process(pid)
                except OSError:  # it cannot be told now: no reason to end a Triton
                    continue
                if stub is None or stub.group != self.group or not stub.is_alive:
                    if await check_model_ready(url, model_name):
                        return f"the process of {model_name} ended (pid {pid})"
                    del self._stubs[pid]
        return f"tritonserver ended ({self._describe_exit()})"

    async def stop(self) -> None:
        """Let Triton exit in order; what has not gone in time is killed."""
        self._input().close()
        await _wait_for(self._exited, self._stop_timeout_s + _KILL_MARGIN_S)
        await self.kill()

    async def kill(self) -> None:
        """End every process of the group at once and remove their shared memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        await self._exited.wait()
        # Bounded: what left the group on purpose may hold the output open for ever.
        await _wait_for(self._output_ended, _LAST_OUTPUT_S)
        self._transport.close()
        guard.remove_shared_memory(self._shm_prefix)

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002
        """Take in a piece of Triton's output."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._log_line(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        """Note the end of Triton's output."""
        if fd == 1:
            if self._rest:
                self._log_line(self._rest)
            self._output_ended.set()

    def process_exited(self) -> None:
        """Note the guard's end."""
        self._exited.set()

    def _log_line(self, raw: bytes) -> None:
        line = parse_log_line(raw[:_MAX_LINE_BYTES].decode("utf-8", "replace"))
        self._lines.append(line)
        if line.message.startswith("successfully loaded"):
            self._models_changed = True
        if line.message:
            TRITON_LOG.log(line.level, "%s", line.message)

    def _input(self) -> asyncio.WriteTransport:
        # A cast, not a check: uvloop's transports do not inherit from asyncio's.
        return cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))

    def _describe_exit(self) -> str:
        code = self._transport.get_returncode()
        assert code is not None
        number = -code if code < 0 else code - 128
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            return f"exit status {code}"


def _read_stub_model(pid: int) -> str:
    """The model that a stub runs, from its command line: …/NAME/VERSION/model.py."""
    try:
        arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    paths = (Path(os.fsdecode(argument)) for argument in arguments[1:])
    return next((p.parts[-3] for p in paths if p.name == "model.py"), "")


async def _wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for the event within a limit; tell whether it came."""
    # Not asyncio.wait_for: before Python 3.12 it may swallow a cancellation.
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiting], timeout=timeout_s)
    finally:
        waiting.cancel()
    return event.is_set()
