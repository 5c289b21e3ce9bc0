"""One question on its way through the gateway, and what became of it.

Plain records between routes, pipeline and comparison; they know no HTTP and compute
nothing but views of themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from int8qa.contract import Precision
from int8qa.gateway.telemetry import StageSeconds
from int8qa.reader.spans import Span

BOTH = "both"
"""The ``precision`` that asks INT8 and FP16 and compares them."""

PAIR = (Precision.INT8, Precision.FP16)


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What a request's ``precision`` means here."""

    label: str
    """As asked, or the default's name; one of a closed set."""
    precisions: tuple[Precision, ...]
    answering: Precision
    """Whose answer is the answer."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question and how it is to be answered."""

    question: str
    context: str
    choice: PrecisionChoice
    top_k: int
    max_answer_tokens: int
    doc_stride: int
    allow_no_answer: bool
    max_window_tokens: int
    null_score_diff_threshold: float = 0.0
    max_question_tokens: int | None = None
    align_to_words: bool = True
    request_id: str = ""
    """Of the HTTP request it came with; for logs and exemplars."""


@dataclass(frozen=True, slots=True)
class Run:
    """One precision's answers to a query, best first, never empty."""

    spans: tuple[Span, ...]
    stages: StageSeconds

    @property
    def best(self) -> Span | None:
        """The best answer, None where the null answer won."""
        return None if self.spans[0].is_null else self.spans[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a query."""

    choice: PrecisionChoice
    windows: int
    runs: dict[Precision, Run]
    stages: StageSeconds
    """Sums over the precisions asked; the texts are tokenized once."""
    agreement: bool | None = None
    speedup: float | None = None

    @property
    def run(self) -> Run:
        """The run whose answer is the answer."""
        return self.runs[self.choice.answering]
