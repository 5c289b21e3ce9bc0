"""A client of Triton alone: it tokenizes, asks, and decodes.

In: one line of JSON on standard input, as ``int8qa.bench.peer_load`` describes it.
Out: what that module's outcome holds, in the file that the line names. A request is one
question with all its windows, padded to the longest of them, or to ``pad`` tokens, so
that Triton's batcher finds equal shapes. Runs in the peer's own environment.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reading import Reading, find_answer, pad_windows

MODEL = "reader"
OUTPUTS = ("start_logits", "end_logits")
TIMEOUT_S = 75.0


async def ask(
    client: Any, reading: Reading, item: dict[str, str], names: list[str], pad: int
) -> str:
    """One question: tokenize, infer, decode."""
    windows = reading.split(item["question"], item["context"])
    arrays = pad_windows(windows, pad)
    inputs = []
    for name in names:
        array = arrays[name]
        tensor = triton.InferInput(name, list(array.shape), "INT32")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = await client.infer(MODEL, inputs, client_timeout=TIMEOUT_S)
    starts, ends = (np.asarray(result.as_numpy(name)) for name in OUTPUTS)
    return find_answer(item["context"], windows, starts, ends)


async def load(
    client: Any,
    reading: Reading,
    names: list[str],
    questions: list[dict[str, str]],
    spec: dict[str, Any],
) -> dict[str, Any]:
    """Ask all questions, so many at once; ``names`` are the model's inputs."""
    pad = int(spec["options"].get("pad", 0))
    answers: dict[str, str] = {}
    latency_ms: list[float] = []
    failures: Counter[str] = Counter()

    async def work(items: Any) -> None:
        for item in items:
            begin = time.perf_counter()
            try:
                text = await ask(client, reading, item, names, pad)
            except InferenceServerException as error:
                failures[f"Triton {error.status() or 'error'}"] += 1
                continue
            latency_ms.append(1e3 * (time.perf_counter() - begin))
            answers[item["id"]] = text

    async def run(items: list[dict[str, str]]) -> None:
        shared = iter(items)  # each worker takes the next one
        await asyncio.gather(*(work(shared) for _ in range(spec["concurrency"])))

    await run(questions[: spec["warm_up"]])
    for found in (answers, latency_ms, failures):
        found.clear()
    used = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    await run(questions)
    seconds = time.perf_counter() - begin
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "latency_ms": latency_ms,
        "answers": answers,
        "failures": dict(failures),
        "cpu_s": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
    }


async def connect_and_load(
    spec: dict[str, Any], questions: list[dict[str, str]], names: list[str]
) -> dict[str, Any]:
    """Load the Triton that the line names."""
    reading = Reading(Path(spec["repository"]) / "tokenizer.json")
    client = triton.InferenceServerClient(spec["url"].removeprefix("http://"))
    try:
        return await load(client, reading, names, questions, spec)
    finally:
        await client.close()


def main() -> None:
    """Read the line, load, write the outcome."""
    spec = json.loads(sys.stdin.readline())
    contract = Path(spec["repository"]) / "contract.json"
    names = json.loads(contract.read_text(encoding="utf-8"))["inputs"]
    questions = json.loads(Path(spec["questions"]).read_text(encoding="utf-8"))
    outcome = asyncio.run(connect_and_load(spec, questions, names))
    Path(spec["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main()
