"""The question-answering task of the Hugging Face Inference API.

In: nothing. Out: its bodies. What we do not have is refused, or ignored where the
description says so.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from int8qa.gateway.schemas.base import (
    EXAMPLE_CONTEXT,
    EXAMPLE_QUESTION,
    MAX_ANSWER_TOKENS,
    MAX_DOC_STRIDE,
    MAX_TOP_K,
    Body,
    Reply,
)


class HfInputs(Body):
    """Question and context, as the Hugging Face Inference API names them."""

    question: str = Field(description="the question; not blank")
    context: str = Field(description="the text that holds the answer; not blank")


class HfParameters(Body):
    """Parameters of the Hugging Face Inference API; null means the default."""

    top_k: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOP_K,
        description="answers wanted, best first; default 1; more than 1 gives a list",
    )
    doc_stride: int | None = Field(
        default=None,
        ge=0,
        le=MAX_DOC_STRIDE,
        description="overlap of windows, tokens; default 128, at most half a window",
    )
    max_answer_len: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ANSWER_TOKENS,
        description="longest answer, tokens; default 15",
    )
    max_question_len: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DOC_STRIDE,
        description="longer questions are cut to this, tokens; by default none is cut, "
        "as in the former pipeline with its fast tokenizers",
    )
    max_seq_len: int | None = Field(
        default=None,
        ge=16,
        le=MAX_DOC_STRIDE,
        description="longest window, tokens; default 384, never more than the model's",
    )
    handle_impossible_answer: bool | None = Field(
        default=None, description="accept that there is no answer; default false"
    )
    align_to_words: bool | None = Field(
        default=None, description="widen answers to whole words; default true"
    )


class HfRequest(Body):
    """Body of the Hugging Face Inference API's question answering."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": {
                        "question": EXAMPLE_QUESTION,
                        "context": EXAMPLE_CONTEXT,
                    },
                    "parameters": {"top_k": 1, "max_answer_len": 15},
                }
            ]
        }
    )

    inputs: HfInputs
    parameters: HfParameters | None = None
    options: dict[str, Any] | None = Field(
        default=None, description="accepted for old clients, and ignored"
    )


class HfAnswer(Reply):
    """One answer; of ``top_k`` 1 the body is this object, otherwise a list of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"answer": "Ingrid Sørensen", "start": 44, "end": 59, "score": 0.93}
            ]
        }
    )

    answer: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    score: float = Field(ge=0)
