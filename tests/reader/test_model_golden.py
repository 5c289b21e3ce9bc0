"""The whole reader on the shipped checkpoint against the former pipeline."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from int8qa.reader.spans import Span, decode_spans
from tests.golden.pipeline_golden import (
    CHECKPOINT,
    GoldenCase,
    load_golden,
    load_tokenizer,
)

pytestmark = pytest.mark.model

EVERY = 6
CASES = load_golden()[1::EVERY]
"""Every sixth case, all kinds among them, so that two cores need a minute."""


@lru_cache(maxsize=1)
def load_model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertForQuestionAnswering.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    )
    return model.eval()


def answer_case(case: GoldenCase) -> list[Span]:
    torch = pytest.importorskip("torch")

    windows = case.split(load_tokenizer())
    starts, ends = [], []
    with torch.inference_mode():
        for window in windows:
            boost = case.case.null_boost if window.index % 2 == 0 else 0.0
            output = load_model()(
                input_ids=torch.tensor(window.input_ids)[None].long(),
                token_type_ids=torch.tensor(window.token_type_ids)[None].long(),
            )
            for vectors, logits in (
                (starts, output.start_logits[0].numpy()),
                (ends, output.end_logits[0].numpy()),
            ):
                logits[0] += boost
                vectors.append(logits)
    return decode_spans(case.context, windows, starts, ends, **case.decode_params)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_answers_are_the_pipelines(case: GoldenCase) -> None:
    """Text, start and end are equal, scores within 1e-3 (processors round apart)."""
    case.assert_answers(answer_case(case), rel=1e-3, abs_=1e-6)
