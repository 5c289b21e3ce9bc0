"""What all bodies have in common: how strict they are, their bounds, their example.

In: nothing. Out: the two base models and the constants that several bodies share.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

MAX_TOP_K = 100
MAX_ANSWER_TOKENS = 512
MAX_DOC_STRIDE = 4096
MAX_NULL_SCORE_DIFF = 50.0  # logits rarely differ by more

EXAMPLE_CONTEXT = (
    "The harbour committee met on 14 March 2024. Ingrid Sørensen presented the new "
    "tide tables, and the members agreed to dredge the east basin before May."
)
EXAMPLE_QUESTION = "Who presented the tide tables?"
EXAMPLE_ANSWER: JsonDict = {
    "text": "Ingrid Sørensen",
    "start": 44,
    "end": 59,
    "score": 0.93,
}
EXAMPLE_TIMING: JsonDict = {
    "tokenize": 0.4,
    "queue": 0.6,
    "inference": 6.3,
    "decode": 0.1,
    "total": 7.9,
}


class Body(BaseModel):
    """A body we receive: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Reply(BaseModel):
    """A body we send."""

    model_config = ConfigDict(extra="forbid", frozen=True)
