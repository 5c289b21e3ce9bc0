from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from int8qa.errors import EngineOutputError, InvalidInputError
from int8qa.reader.spans import Span, decode_spans
from int8qa.reader.tokenizer import NO_WORD, ReaderTokenizer
from int8qa.reader.windows import Window, split_windows
from tests.golden.pipeline_golden import load_tokenizer
from tests.reader.strategies import texts

QUESTION = "Who built the mill?"


def decode_by_brute_force(
    context: str,
    windows: list[Window],
    start_logits: list[np.ndarray],
    end_logits: list[np.ndarray],
    *,
    top_k: int,
    max_answer_tokens: int,
    allow_no_answer: bool,
    align_to_words: bool,
) -> list[Span]:
    """The documented semantics with plain loops over all S x S pairs, in float64."""
    answers: dict[str, list] = {}
    null_score = np.inf
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        allowed = [0, *range(window.context_start, window.context_end)]
        start_mass = {i: np.exp(np.float64(starts[i])) for i in allowed}
        end_mass = {i: np.exp(np.float64(ends[i])) for i in allowed}
        start_total, end_total = sum(start_mass.values()), sum(end_mass.values())
        null_score = min(
            null_score, start_mass[0] / start_total * end_mass[0] / end_total
        )
        candidates = []
        for first in allowed[1:]:
            for last in allowed[1:]:
                if 0 <= last - first < max_answer_tokens:
                    score = start_mass[first] / start_total * end_mass[last] / end_total
                    candidates.append((score, first, last))
        candidates.sort(key=lambda candidate: -candidate[0])
        for score, first, last in candidates[
            : top_k * 2 + 10 if align_to_words else top_k
        ]:
            low, high = first - window.context_start, last - window.context_start
            words = window.word_ids.tolist()
            if align_to_words and NO_WORD not in (words[low], words[high]):
                low = words.index(words[low])
                high = len(words) - 1 - words[::-1].index(words[high])
            begin, stop = int(window.offsets[low, 0]), int(window.offsets[high, 1])
            text = context[begin:stop]
            answers.setdefault(text.lower(), [text, begin, stop, 0.0])[3] += score
    found = [Span(*answer) for answer in answers.values()]
    if allow_no_answer:
        found.append(Span("", 0, 0, null_score))
    found.sort(key=lambda span: -span.score)
    return found[:top_k]


@st.composite
def requests(draw: st.DrawFn) -> tuple:
    context = "mill" + draw(texts(max_words=30))
    room = draw(st.integers(6, 40))
    windows = split_windows(
        load_tokenizer(),
        QUESTION,
        context,
        max_window_tokens=room + 8,
        doc_stride=draw(st.integers(0, 5)),
    )
    seed = draw(st.integers(0, 2**32 - 1))
    spread = draw(st.sampled_from([0.5, 3.0, 8.0]))
    generator = np.random.default_rng(seed)
    starts, ends = (
        [
            generator.normal(scale=spread, size=len(w)).astype(np.float32)
            for w in windows
        ]
        for _ in range(2)
    )
    return context, windows, starts, ends


@given(
    request=requests(),
    top_k=st.sampled_from([1, 1, 2, 5, 20]),
    max_answer_tokens=st.sampled_from([1, 2, 7, 15, 100]),
    allow_no_answer=st.booleans(),
    align_to_words=st.booleans(),
)
def test_decoding_equals_brute_force(
    request: tuple,
    top_k: int,
    max_answer_tokens: int,
    allow_no_answer: bool,
    align_to_words: bool,
) -> None:
    """The banded, vectorised decoder finds what loops over all pairs find."""
    options = {
        "top_k": top_k,
        "max_answer_tokens": max_answer_tokens,
        "allow_no_answer": allow_no_answer,
        "align_to_words": align_to_words,
    }
    expected = decode_by_brute_force(*request, **options)
    # Random float32 logits tie too rarely to matter, but a tie has no right order.
    scores = [span.score for span in expected]
    assume(all(a - b > 1e-5 * a for a, b in itertools.pairwise(scores)))
    assume(scores[-1] > 1e-30)
    found = decode_spans(*request, **options)
    assert [(s.text, s.start, s.end) for s in found] == [
        (s.text, s.start, s.end) for s in expected
    ]
    np.testing.assert_allclose([s.score for s in found], scores, rtol=1e-4)


@given(request=requests(), top_k=st.integers(1, 8), align_to_words=st.booleans())
def test_answers_are_spans_of_the_context(
    request: tuple, top_k: int, align_to_words: bool
) -> None:
    """context[start:end] is the text, scores fall, texts differ, at most top_k."""
    context = request[0]
    spans = decode_spans(*request, top_k=top_k, align_to_words=align_to_words)
    assert 1 <= len(spans) <= top_k
    assert all(context[span.start : span.end] == span.text for span in spans)
    scores = [span.score for span in spans]
    assert scores == sorted(scores, reverse=True)
    assert len({span.text.lower() for span in spans}) == len(spans)


def make_request(
    tokenizer: ReaderTokenizer, context: str, peaks: dict[int, float], **options: int
) -> tuple:
    """Flat logits, but for peaks at character offsets; -1 is the null position."""
    windows = split_windows(tokenizer, QUESTION, context, **options)
    vectors = []
    for window in windows:
        logits = np.zeros(len(window), dtype=np.float32)
        for place, height in peaks.items():
            if place < 0:
                logits[0] = height
                continue
            inside = np.flatnonzero(window.offsets[:, 0] == place)
            logits[window.context_start + inside] = height
        vectors.append(logits)
    return context, windows, vectors, [logits.copy() for logits in vectors]


def test_answer_widens_to_the_whole_word(tokenizer: ReaderTokenizer) -> None:
    """A peak on ##ffa yields the word with alignment and the piece without."""
    request = make_request(tokenizer, "An unaffable miller", {6: 20.0})
    assert decode_spans(*request)[0].text == "unaffable"
    assert decode_spans(*request, align_to_words=False)[0].text == "ffa"


def test_tokens_without_words_keep_their_offsets(tokenizer: ReaderTokenizer) -> None:
    """Where either end belongs to no word, alignment leaves both ends alone."""
    context, (window,), starts, ends = make_request(
        tokenizer, "An unaffable miller", {6: 20.0}
    )
    words = window.word_ids.copy()
    words[2] = NO_WORD
    blind = Window(
        index=0,
        input_ids=window.input_ids,
        token_type_ids=window.token_type_ids,
        context_start=window.context_start,
        context_end=window.context_end,
        offsets=window.offsets,
        word_ids=words,
    )
    assert decode_spans(context, [blind], starts, ends)[0].text == "ffa"


def test_equal_answers_are_merged_into_the_first(tokenizer: ReaderTokenizer) -> None:
    """The same word in two places and cases counts once, with both scores."""
    request = make_request(tokenizer, "Orla met orla", {0: 10.0, 9: 10.0})
    first, *_ = decode_spans(*request, max_answer_tokens=1)
    assert (first.text, first.start) == ("Orla", 0)
    assert first.score > 0.45
    alone = make_request(tokenizer, "Orla met Finn", {0: 10.0, 9: 10.0})
    assert decode_spans(*alone, max_answer_tokens=1)[0].score < 0.26


def test_null_answer_takes_its_lowest_score_over_windows(
    tokenizer: ReaderTokenizer,
) -> None:
    """One window that finds something outweighs all that find nothing."""
    context = "mill " * 40 + "Orla"
    context, windows, starts, ends = make_request(
        tokenizer, context, {-1: 9.0, 200: 18.0}, max_window_tokens=20, doc_stride=0
    )
    assert len(windows) > 3
    best, *_ = decode_spans(context, windows, starts, ends, allow_no_answer=True)
    assert best.text == "Orla"
    best, *_ = decode_spans(
        context, windows[:-1], starts[:-1], ends[:-1], allow_no_answer=True
    )
    assert best.is_null
    assert (best.text, best.start, best.end) == ("", 0, 0)


def test_null_answer_wins_from_its_threshold_on(tokenizer: ReaderTokenizer) -> None:
    """The lead in log score that the null answer needs is exactly the threshold."""
    request = make_request(tokenizer, "Orla built it", {-1: 4.0, 0: 3.0})
    null, best = decode_spans(*request, top_k=2, allow_no_answer=True)
    assert null.is_null
    lead = math.log(null.score / best.score)
    for threshold, wins in ((lead - 1e-3, True), (lead + 1e-3, False)):
        first, second = decode_spans(
            *request,
            top_k=2,
            allow_no_answer=True,
            null_score_diff_threshold=threshold,
        )
        assert first.is_null is wins
        assert {first, second} == {null, best}


def test_null_answer_is_offered_only_on_request(tokenizer: ReaderTokenizer) -> None:
    """Without allow_no_answer even a sure null yields the best span."""
    request = make_request(tokenizer, "Orla built it", {-1: 9.0, 0: 1.0})
    (answer,) = decode_spans(*request)
    assert not answer.is_null
    assert answer.score < 1e-4


def test_underflow_yields_the_null_answer_not_an_empty_list(
    tokenizer: ReaderTokenizer,
) -> None:
    """Where float32 leaves no span any probability, the list still has one entry."""
    request = make_request(tokenizer, "Orla built it", {-1: 5000.0})
    assert decode_spans(*request) == [Span("", 0, 0, 0.0)]


def test_short_list_is_not_filled_with_impossible_spans(
    tokenizer: ReaderTokenizer,
) -> None:
    """Three tokens have six spans; asking for fifty invents none."""
    request = make_request(tokenizer, "a b c", {})
    spans = decode_spans(*request, top_k=50, align_to_words=False)
    assert {span.text for span in spans} == {"a", "b", "c", "a b", "b c", "a b c"}


def test_cls_typed_into_the_question_is_no_answer(tokenizer: ReaderTokenizer) -> None:
    """The question's tokens never compete, whatever they are."""
    context = "Orla built it"
    (window,) = split_windows(tokenizer, "[CLS] [CLS] who?", context)
    logits = np.zeros(len(window), dtype=np.float32)
    logits[1:3] = 50.0
    (answer,) = decode_spans(context, [window], [logits], [logits])
    assert context[answer.start : answer.end] == answer.text != ""
    assert answer.score > 0.01


def test_half_precision_logits_are_decoded(tokenizer: ReaderTokenizer) -> None:
    """float16 vectors give the answer of their float32 values, without overflow."""
    context, windows, starts, ends = make_request(tokenizer, "Orla met Finn", {9: 12.0})
    halves = [logits.astype(np.float16) for logits in starts]
    assert decode_spans(context, windows, halves, halves) == decode_spans(
        context, windows, starts, ends
    )


@given(
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.integers(0, 10),
    side=st.booleans(),
)
def test_logits_that_are_not_finite_are_refused(
    bad: float, place: int, side: bool
) -> None:
    """Wherever it stands, also on padding-like tokens, one bad value is an error."""
    context, windows, starts, ends = make_request(load_tokenizer(), "Orla built", {})
    (starts if side else ends)[0][place % len(windows[0])] = bad
    with pytest.raises(EngineOutputError, match="not finite"):
        decode_spans(context, windows, starts, ends)


@given(shape=hnp.array_shapes(min_dims=1, max_dims=2, max_side=20))
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """The message tells both shapes."""
    context, windows, starts, _ = make_request(load_tokenizer(), "Orla built", {})
    assume(shape != starts[0].shape)
    with pytest.raises(EngineOutputError, match="shape"):
        decode_spans(context, windows, starts, [np.zeros(shape, dtype=np.float32)])


def test_missing_window_is_refused(tokenizer: ReaderTokenizer) -> None:
    """As many vectors as windows, or none is trusted."""
    context, windows, starts, _ = make_request(tokenizer, "Orla", {})
    with pytest.raises(EngineOutputError, match="1 start and 0 end"):
        decode_spans(context, windows, starts, [])
    with pytest.raises(EngineOutputError, match="for 0 windows"):
        decode_spans(context, [], [], [])


@pytest.mark.parametrize("field", ["top_k", "max_answer_tokens"])
def test_counts_below_one_are_refused_by_field(
    tokenizer: ReaderTokenizer, field: str
) -> None:
    """As the former pipeline, but with the field's name."""
    with pytest.raises(InvalidInputError, match="allowed: 1 or more") as caught:
        decode_spans(*make_request(tokenizer, "Orla", {}), **{field: 0})
    assert caught.value.field == field
