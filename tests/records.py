"""The least that tests must say of a model in a contract."""

from __future__ import annotations

from typing import Any

from int8qa.contract import ModelRecord


def make_model_record(**changes: Any) -> ModelRecord:
    """INT8, calibrated by its maxima, never measured; and ``changes``."""
    said: dict[str, Any] = {
        "name": "qa_int8",
        "engine": "test",
        "calibrator": "max",
        "recipe": "linear",
        "f1": None,
        "exact_match": None,
        "size_bytes": 1,
    }
    return ModelRecord(**said | changes)
