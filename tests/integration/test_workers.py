"""``int8qa serve --workers 2`` as an operator meets it: real processes, a stub Triton.

What its parts do is in ``tests/gateway/test_workers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from int8qa.contract import TOKENIZER_FILENAME
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import CONTEXT, QUESTION, TOKENIZER_JSON, build_contract
from tests.gateway.test_triton import FakeTriton, run_triton

ROOT = Path(__file__).parents[2]
ENOUGH_S = 120.0
"""For a start or an end, on however slow a machine."""
ANSWERS = (
    'int8qa_request_seconds_count{outcome="ok",precision="int8",route="/v1/answer"}'
)
SECONDS = "int8qa_request_seconds_sum{outcome="
BODY = {"question": QUESTION, "context": CONTEXT}


@dataclass
class Parent:
    """The command, and what it wrote."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    url: str = ""

    async def read_until(self, pattern: str) -> re.Match[str]:
        """The next line that matches."""

        async def read() -> re.Match[str]:
            assert self.process.stderr is not None
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
            raise AssertionError("".join(self.lines[-30:]))

        return await asyncio.wait_for(read(), ENOUGH_S)

    async def read_metrics(self) -> dict[str, float]:
        async with httpx.AsyncClient(timeout=30, verify=False) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        rows = (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
        return {name: float(value) for name, _, value in rows}

    async def find_who_answered(self, names: set[str]) -> set[str]:
        """Workers with a log line of these requests; reads until there are all."""
        answerers: dict[str, str] = {}
        while names - answerers.keys():
            found = await self.read_until(r"request_id=(\S+) .* worker=(\d)")
            answerers[found[1]] = found[2]
        return {answerers[name] for name in names}


@contextlib.asynccontextmanager
async def run_parent(repository: Path, triton_port: int) -> AsyncIterator[Parent]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("INT8QA_")
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "int8qa.cli", "serve", "--workers", "2"),
        cwd=repository,
        env={
            **environment,
            "PYTHONPATH": str(ROOT / "service"),
            "NO_COLOR": "1",
            "INT8QA_LOG_FORMAT": "console",
            "INT8QA_PORT": "0",
            "INT8QA_MODEL_REPOSITORY": str(repository),
            "INT8QA_TRITON__URL": f"127.0.0.1:{triton_port}",
            "INT8QA_COMPARISON__FRACTION": "0",
        },
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    parent = Parent(process)
    try:
        parent.url = (await parent.read_until(r"ready at (http://\S+)"))[1]
        yield parent
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process is there; one that has ended and waits for its parent is not."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


async def ask(parent: Parent, names: set[str]) -> None:
    """One question for each name, each over a connection of its own, five at once."""
    alone = httpx.Limits(max_connections=5, max_keepalive_connections=0)
    # Certificates would take longer to read than all answers to come.
    async with httpx.AsyncClient(timeout=60, limits=alone, verify=False) as client:
        url = f"{parent.url}/v1/answer"
        answers = await asyncio.gather(
            *(
                client.post(url, json=BODY, headers={"X-Request-Id": name})
                for name in names
            )
        )
    assert {answer.status_code for answer in answers} == {200}


async def ask_both(parent: Parent, start: int) -> int:
    """Ask twenty at a time until both workers have answered; return how many."""
    asked = 0
    for _ in range(20):
        names = {f"q{start + asked + n}" for n in range(20)}
        await ask(parent, names)
        asked += len(names)
        if await parent.find_who_answered(names) == {"0", "1"}:
            return asked
    raise AssertionError(f"one worker answered all of {asked} questions")


async def test_two_workers(tmp_path: Path) -> None:
    """Both answer, metrics add up over a death, and the end leaves nobody behind."""
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    contract = build_contract(tokenizer).model_copy(
        update={"build_id": "here", "generation": 1}
    )
    contract.save(tmp_path)
    shutil.copyfile(TOKENIZER_JSON, tmp_path / TOKENIZER_FILENAME)
    async with (
        run_triton(FakeTriton(build_id="here")) as port,
        run_parent(tmp_path, port) as parent,
    ):
        started = [line for line in parent.lines if "worker_started" in line]
        pids = [int(line.rpartition("pid=")[2]) for line in started]
        assert len(set(pids)) == 2

        asked = await ask_both(parent, 0)
        seen = [await parent.read_metrics() for _ in range(4)]
        assert [metrics[ANSWERS] for metrics in seen] == [asked] * 4
        assert len({sum_up(metrics, SECONDS) for metrics in seen}) == 1

        os.kill(pids[0], signal.SIGKILL)
        ended = await parent.read_until(r"worker_ended .*how='killed by SIGKILL'")
        assert f"pid={pids[0]} " in ended.string
        started_again = await parent.read_until(r"worker_started .*pid=(\d+)")
        await parent.read_until(r"Application startup complete")
        assert (await parent.read_metrics())[ANSWERS] == asked
        asked += await ask_both(parent, asked)
        metrics = await parent.read_metrics()
        assert metrics[ANSWERS] == asked
        assert metrics["int8qa_workers"] == 2
        assert metrics["int8qa_worker_restarts_total"] == 1

        everybody = [*pids, int(started_again[1])]
        parent.process.terminate()
        assert await asyncio.wait_for(parent.process.wait(), ENOUGH_S) == 0
        assert [pid for pid in everybody if is_alive(pid)] == []


async def test_parent_is_killed(tmp_path: Path) -> None:
    """Workers end without it, and give the port free."""
    tokenizer = ReaderTokenizer.from_file(TOKENIZER_JSON)
    build_contract(tokenizer).model_copy(update={"generation": 1}).save(tmp_path)
    shutil.copyfile(TOKENIZER_JSON, tmp_path / TOKENIZER_FILENAME)
    async with (
        run_triton(FakeTriton(build_id="test")) as port,
        run_parent(tmp_path, port) as parent,
    ):
        started = [line for line in parent.lines if "worker_started" in line]
        pids = [int(line.rpartition("pid=")[2]) for line in started]
        parent.process.kill()

        async def watch() -> None:
            while any(map(is_alive, pids)):  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.05)

        await asyncio.wait_for(watch(), ENOUGH_S)


def sum_up(metrics: dict[str, float], prefix: str) -> float:
    """The sum over all series of a name that are of answers."""
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith(prefix) and "/v1/answer" in name
    )
