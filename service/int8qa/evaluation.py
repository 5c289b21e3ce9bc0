"""EM and F1 by precision, measured through a running service.

In: a SQuAD file and a gateway's address. Out: one row per precision and the share of
answers on which each pair agrees. The same questions go to every precision, taking
turns, so that scores are paired and the machine's moods hit all alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from int8qa.client import GatewayClient
from int8qa.contract import Precision
from int8qa.reader.squad import (
    ANSWER_TOKENS,
    Scores,
    SquadQuestion,
    score_predictions,
)


@dataclass(frozen=True, slots=True)
class PrecisionResult:
    """One precision over the whole question set."""

    scores: Scores
    inference_ms_p50: float
    """Median engine time of a question, milliseconds, as the gateway reports it."""
    total_ms_p50: float
    total_ms_p99: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All precisions, side by side."""

    checkpoint: str
    questions: int
    seconds: float
    results: dict[str, PrecisionResult]
    agreement: dict[str, float]
    """Share of equal answer texts, 0-1, by pair: ``int8/fp16``."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


async def evaluate_service(
    url: str,
    questions: Sequence[SquadQuestion],
    precisions: Sequence[Precision],
    *,
    concurrency: int = 8,
    allow_no_answer: bool | None = None,
    null_score_diff_threshold: float = 0.0,
    on_answer: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Ask every question in every precision.

    Args:
        url: base URL of the gateway.
        questions: the data set.
        precisions: which to measure; each must be served.
        concurrency: requests under way at once.
        allow_no_answer: let the reader abstain; by default where the data holds
            unanswerable questions (SQuAD v2.0).
        null_score_diff_threshold: as in the request.
        on_answer: called after each answer.

    Raises:
        GatewayRequestError: the gateway is not there or refuses.
    """
    if allow_no_answer is None:
        allow_no_answer = any(question.is_impossible for question in questions)
    begin = time.monotonic()
    texts: dict[Precision, dict[str, str]] = {name: {} for name in precisions}
    timings: dict[Precision, list[tuple[float, float]]] = {
        name: [] for name in precisions
    }
    jobs = ((question, name) for question in questions for name in precisions)

    async with GatewayClient(url) as client:
        checkpoint = str((await client.list_models()).get("checkpoint", "unknown"))

        async def work() -> None:
            # `jobs` is shared: each worker takes the next one.
            for question, name in jobs:
                response = await client.answer(
                    {
                        "question": question.question,
                        "context": question.context,
                        "precision": str(name),
                        "max_answer_tokens": ANSWER_TOKENS,
                        "allow_no_answer": allow_no_answer,
                        "null_score_diff_threshold": null_score_diff_threshold,
                    }
                )
                answer = response["answer"]
                texts[name][question.id] = answer["text"] if answer else ""
                timing = response["timing_ms"]
                timings[name].append((timing["inference"], timing["total"]))
                on_answer()

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    return Evaluation(
        checkpoint=checkpoint,
        questions=len(questions),
        seconds=round(time.monotonic() - begin, 1),
        results={
            str(name): _summarize(questions, texts[name], timings[name])
            for name in precisions
        },
        agreement={
            f"{left}/{right}": sum(
                texts[left][question.id] == texts[right][question.id]
                for question in questions
            )
            / len(questions)
            for left, right in combinations(precisions, 2)
        },
    )


def _summarize(
    questions: Sequence[SquadQuestion],
    texts: dict[str, str],
    timings: list[tuple[float, float]],
) -> PrecisionResult:
    inference, total = np.array(timings).T
    return PrecisionResult(
        scores=score_predictions(questions, texts),
        inference_ms_p50=round(float(np.percentile(inference, 50)), 3),
        total_ms_p50=round(float(np.percentile(total, 50)), 3),
        total_ms_p99=round(float(np.percentile(total, 99)), 3),
    )
