"""transformers' question-answering pipeline behind FastAPI.

After "Web server inference" of its documentation: the web server takes the requests,
one queue and one thread run the pipeline. ``--batch 1`` is what the pipelines' page
advises for CPUs ("don't batch"); with more, whatever waits goes in together, as in the
same page's section on dynamic batching. Threads are torch's own default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastapi

Texts = dict[str, str]
Ask = Callable[[Sequence[Texts]], list[str]]
"""Answers to questions, each with ``question`` and ``context``, that go in together."""
Waiting = tuple[Texts, "asyncio.Future[str]"]


async def work_off(queue: asyncio.Queue[Waiting], ask: Ask, batch: int) -> None:
    """Answer what waits, in one thread, at most ``batch`` together."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as thread:
        while True:
            taken = [await queue.get()]
            while len(taken) < batch and not queue.empty():
                taken.append(queue.get_nowait())
            try:
                answers: Sequence[str | Exception] = await loop.run_in_executor(
                    thread, ask, [texts for texts, _ in taken]
                )
            except Exception as error:  # noqa: BLE001 - the callers get it
                answers = [error] * len(taken)
            for (_, waiter), answer in zip(taken, answers, strict=True):
                if waiter.done():  # its client has left
                    continue
                if isinstance(answer, Exception):
                    waiter.set_exception(answer)
                else:
                    waiter.set_result(answer)


def make_app(ask: Ask, batch: int) -> fastapi.FastAPI:
    """``POST /answer`` and ``GET /ready`` around ``ask``."""
    queue: asyncio.Queue[Waiting] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def run(_: fastapi.FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work_off(queue, ask, batch))
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    app = fastapi.FastAPI(lifespan=run)

    @app.post("/answer")
    async def answer(texts: Texts) -> Texts:
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await queue.put((texts, waiter))
        return {"answer": await waiter}

    @app.get("/ready")
    async def ready() -> None:
        return

    return app


def load_pipeline(checkpoint: str, batch: int) -> Ask:
    """The pipeline in float32, with SQuAD's longest answer."""
    import torch
    import transformers

    pipe: Any = transformers.pipeline(
        "question-answering", model=checkpoint, dtype=torch.float32, device="cpu"
    )

    def ask(texts: Sequence[Texts]) -> list[str]:
        with torch.inference_mode():
            found = pipe(
                question=[item["question"] for item in texts],
                context=[item["context"] for item in texts],
                batch_size=batch,
                max_seq_len=384,
                doc_stride=128,
                max_answer_len=30,
            )
        # A list of one comes back as the one.
        return [one["answer"] for one in (found if len(texts) > 1 else [found])]

    return ask


def main() -> None:
    """Serve until stopped."""
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    app = make_app(load_pipeline(given.checkpoint, given.batch), given.batch)
    uvicorn.run(app, host="127.0.0.1", port=given.port, access_log=False)


if __name__ == "__main__":
    main()
