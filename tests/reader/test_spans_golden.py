"""The reader against the former pipeline's recorded answers; no model is run."""

from __future__ import annotations

import zlib

import pytest

from int8qa.reader.spans import decode_spans
from tests.golden.pipeline_golden import GoldenCase, load_golden, load_tokenizer

CASES = load_golden()
CASES_WITH_LOGITS = [case for case in CASES if case.logits is not None]


def test_golden_file_is_large_enough_to_mean_something() -> None:
    """At least 300 questions, and every parameter and kind of document occurs."""
    assert len({case.case.question for case in CASES}) >= 300
    assert len(CASES_WITH_LOGITS) >= 250
    names = {name for case in CASES for name in case.params}
    assert names == {
        "top_k",
        "align_to_words",
        "handle_impossible_answer",
        "max_answer_len",
        "max_seq_len",
        "doc_stride",
    }
    assert sum(len(case.context.split()) >= 3000 for case in CASES) >= 10
    # The null answer wins, loses to others in the list, and is not asked for.
    assert sum(case.answers[0].is_null for case in CASES_WITH_LOGITS) >= 5
    assert (
        sum(any(a.is_null for a in case.answers[1:]) for case in CASES_WITH_LOGITS) >= 5
    )
    assert not any(
        answer.is_null
        for case in CASES
        if not case.params.get("handle_impossible_answer")
        for answer in case.answers
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_windows_feed_the_model_what_the_pipeline_fed_it(case: GoldenCase) -> None:
    """Every window's input ids are the pipeline's, to the last token."""
    windows = case.split(load_tokenizer())
    checksum = 0
    for window in windows:
        checksum = zlib.crc32(window.input_ids.astype("<i4").tobytes(), checksum)
    assert len(windows) == case.windows
    assert checksum == case.input_ids_crc32


@pytest.mark.parametrize("case", CASES_WITH_LOGITS, ids=lambda case: case.id)
def test_spans_are_the_pipelines_on_its_own_logits(case: GoldenCase) -> None:
    """Same logits, same answers; scores to float32 rounding (1e-5 relative)."""
    assert case.logits is not None
    spans = decode_spans(
        case.context,
        case.split(load_tokenizer()),
        [start for start, _ in case.logits],
        [end for _, end in case.logits],
        **case.decode_params,
    )
    case.assert_answers(spans, rel=1e-5, abs_=1e-12)
