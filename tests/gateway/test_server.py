"""The process: ports, signals, readiness, draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from int8qa.contract import TOKENIZER_FILENAME
from int8qa.errors import ConfigurationError, ContractError
from int8qa.gateway.app import serve
from int8qa.gateway.process import bind_socket
from tests.gateway.fakes import TOKENIZER_JSON, build_contract, build_settings

ROOT = Path(__file__).parents[2]

SCRIPT = """
import asyncio, sys
from int8qa.gateway.app import create_app
from int8qa.gateway.process import bind_socket, run_event_loop
from int8qa.gateway.server import run_server
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    TOKENIZER_JSON, FakeEngine, build_contract, build_settings,
)

class SlowEngine(FakeEngine):
    async def infer(self, precision, batch, timeout_s):
        print("working", flush=True)
        await asyncio.sleep(float(sys.argv[1]))
        return await super().infer(precision, batch, timeout_s)

async def main():
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    settings = build_settings(limits={"shutdown_timeout_s": float(sys.argv[2])})
    app = create_app(
        settings, build_contract(tokenizer), tokenizer, SlowEngine(tokenizer)
    )
    listener = bind_socket("127.0.0.1", 0)
    await run_server(app, listener, on_ready=lambda url: print(url, flush=True))
    print("closed", flush=True)

run_event_loop(main())
"""


async def wait_until_refused(url: str) -> None:
    """Return once the gateway takes no connection any more: it has begun to drain."""
    address = httpx.URL(url)
    while True:
        try:
            _, writer = await asyncio.open_connection(address.host, address.port)
        except ConnectionError:
            return
        writer.close()
        await asyncio.sleep(0.05)


async def begin_upload(url: str) -> asyncio.StreamWriter:
    """Send half a request."""
    address = httpx.URL(url)
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(
        b"POST /v1/answer HTTP/1.1\r\nHost: gateway\r\nContent-Length: 99\r\n\r\n{"
    )
    await writer.drain()
    return writer


async def run_and_terminate(
    work_s: float,
    limit_s: float,
    *numbers: signal.Signals,
    uploads: int = 0,
    others: int = 0,
) -> tuple[httpx.Response, str, int]:
    """Start a gateway, ask one question, signal while it works; return all it said.

    Each further signal is sent when the one before has taken effect. So many uploads
    begin and never end; so many other requests wait as well, and must be answered alike.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(work_s), str(limit_s),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'service'}{os.pathsep}{ROOT}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None

        async def read_until(prefix: str) -> str:
            while line := (await process.stdout.readline()).decode():
                if line.startswith(prefix):
                    return line.strip()
            raise AssertionError((await process.stderr.read()).decode())

        url = await asyncio.wait_for(read_until("http://"), 60)
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"question": "Who kept it?", "context": "Solveig Bråten kept it."}
            request = asyncio.create_task(client.post(f"{url}/v1/answer", json=body))
            await asyncio.wait_for(read_until("working"), 30)
            waiting = [
                asyncio.create_task(client.post(f"{url}/v1/answer", json=body))
                for _ in range(others)
            ]
            while others:
                metrics = (await client.get(f"{url}/metrics")).text
                if f"\nint8qa_inflight_requests {others + 1}.0\n" in metrics:
                    break
                await asyncio.sleep(0.02)
            writers = [await begin_upload(url) for _ in range(uploads)]
            for number in numbers:
                process.send_signal(number)
                await asyncio.wait_for(wait_until_refused(url), 30)
            response = await asyncio.wait_for(request, 30)
            for answered in await asyncio.wait_for(asyncio.gather(*waiting), 30):
                assert answered.status_code == response.status_code
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        for writer in writers:
            writer.close()
        assert process.returncode is not None
        return response, out.decode(), process.returncode
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_finishes_accepted_requests(number: signal.Signals):
    """SIGTERM and Ctrl-C let an accepted request finish, close all, and exit with 0."""
    response, out, code = await run_and_terminate(0.5, 20, number)
    assert response.status_code == 200
    assert response.json()["answer"]["text"] == "Solveig Bråten"
    assert "closed" in out
    assert code == 0


async def test_signal_under_load_loses_nobody():
    """All that were accepted are answered; the port is closed while they are."""
    response, out, code = await run_and_terminate(1.0, 20, signal.SIGTERM, others=40)
    assert response.status_code == 200
    assert "closed" in out
    assert code == 0


async def test_signal_under_load_refuses_what_it_cannot_finish():
    """The limit holds for all of them: each gets its refusal, and the process ends."""
    response, out, code = await run_and_terminate(600, 0.3, signal.SIGTERM, others=40)
    assert response.status_code == 503
    assert "closed" in out
    assert code == 0


async def test_signal_does_not_wait_for_ever():
    """What exceeds the limit is answered with 503, and the process ends."""
    response, out, code = await run_and_terminate(600, 0.3, signal.SIGTERM)
    assert response.status_code == 503
    assert json.loads(response.text)["type"].endswith("shutting-down")
    assert "closed" in out
    assert code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_does_not_wait(number: signal.Signals):
    """The second refuses what the first let finish, cuts uploads, and the process ends.

    The drain and the request would take ten minutes; the test gives up far earlier.
    """
    response, out, code = await run_and_terminate(600, 600, number, number, uploads=1)
    assert response.status_code == 503
    assert json.loads(response.text)["type"].endswith("shutting-down")
    assert "closed" in out
    assert code == 0


def test_taken_port_is_one_clear_line():
    """A second server on one port names address and setting."""
    with bind_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*INT8QA_PORT"):
            bind_socket("127.0.0.1", port)


def test_serve_needs_a_model_repository(tmp_path, restored_logging):
    """Without a complete repository nothing is bound and the error says what to do."""
    with pytest.raises(ContractError, match="int8qa build"):
        serve(build_settings(model_repository=tmp_path))


def test_serve_binds_before_it_runs(tmp_path, tokenizer, restored_logging):
    """A repository that is complete gets as far as the port."""
    build_contract(tokenizer).save(tmp_path)
    (tmp_path / TOKENIZER_FILENAME).write_bytes(TOKENIZER_JSON.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="cannot listen"):
            serve(build_settings(model_repository=tmp_path, port=port))
