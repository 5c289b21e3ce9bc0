"""The model card says what the report says, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from int8qa.training.card import write_card

SCORES = {
    "file": "dev.json",
    "precision": "float",
    "total": 2106,
    "missing": 0,
    "exact": 61.234,
    "f1": 72.345,
    "has_ans_exact": 61.234,
    "has_ans_f1": 72.345,
    "has_ans_total": 2106,
    "no_ans_exact": None,
    "no_ans_f1": None,
    "no_ans_total": 0,
}
REPORT: dict[str, Any] = {
    "name": "my-reader",
    "architecture": "BertForQuestionAnswering",
    "parameters": 22_564_610,
    "dtype": "fp16",
    "weights_sha256": "w" * 64,
    "start": {"name": "acme/encoder", "sha256": "a" * 64, "fresh_head": True},
    "teacher": None,
    "options": {
        "epochs": 2.0,
        "batch": 32,
        "learning_rate": 2e-4,
        "layer_decay": 0.95,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "dropout": None,
        "seed": 3,
        "keep_order": True,
        "quantization": None,
        "distillation": None,
    },
    "quantized_tensors": 0,
    "data": [
        {
            "name": "train.json",
            "sha256": "d" * 64,
            "questions": 4370,
            "unanswerable": 0,
            "negatives": 874,
            "windows": 5300,
            "skipped": 1,
        }
    ],
    "max_window_tokens": 384,
    "doc_stride": 128,
    "scores": [SCORES],
    "versions": {"int8qa": "1.2.3", "torch": "2.13.0"},
    "finished_at": "2026-11-23T12:00:00Z",
    "command": "int8qa train --data train.json",
    "device": "x86_64 CPU, 2 threads",
    "precision": "bf16",
    "resumed": 0,
    "steps": 332,
    "losses": [[10, 3.5], [330, 1.25]],
    "train_seconds": 3600.0,
}


def test_card() -> None:
    """Every figure of a plain run stands where a reader looks for it."""
    card = write_card(REPORT)
    lines = card.splitlines()
    assert lines[0] == "# my-reader: extractive question answering"
    for part in (
        "22.6 million parameters, stored as fp16 safetensors",
        "Trained by int8qa 1.2.3, finished 2026-11-23T12:00:00Z",
        f"- Checkpoint: acme/encoder, SHA-256 `{'a' * 64}`; its question answering head",
        f"| train.json | 4370 | 0 | 874 | 5300 | 1 | `{'d' * 64}` |",
        "2 epochs, 332 steps of up to 32 windows of up to 384 tokens (overlap 128)",
        "file after file",
        "learning rate 0.0002",
        "dropout as the checkpoint says, seed 3, bf16 on x86_64 CPU, 2 threads",
        "60.0 minutes of training.",
        "The loss was 3.500 at step 10 and 1.250 at step 330.",
        "```\nint8qa train --data train.json\n```",
        "| dev.json | float | 2106 | 61.23 | 72.34 | 61.23 | 72.34 |  |",
        "int8qa 1.2.3, torch 2.13.0",
    ):
        assert part in card, part
    for absent in ("Teacher", "INT8's rounding in the graph", "resumed", "None"):
        assert absent not in card
    assert card.endswith("\n")
    assert not card.endswith("\n\n")


def test_card_of_qat() -> None:
    """Teacher, recipe and target; the list of what it began from stays a list."""
    report = copy.deepcopy(REPORT)
    report["teacher"] = {"name": "acme/large", "sha256": "t" * 64}
    report["options"] |= {
        "distillation": {"temperature": 2.0, "weight": 0.9},
        "quantization": {
            "recipe": {"name": "full"},
            "calibrator": "percentile-99.999",
            "smooth": False,
            "target": "openvino",
        },
        "dropout": 0.0,
        "keep_order": False,
    }
    report |= {"quantized_tensors": 78, "resumed": 2, "losses": []}
    report["start"]["fresh_head"] = False
    card = write_card(report)
    _, _, text = card.partition("## Start\n\n")
    items = text.split("\n\n")[0].splitlines()
    assert items == [
        f"- Checkpoint: acme/encoder, SHA-256 `{'a' * 64}`",
        f"- Teacher: acme/large, SHA-256 `{'t' * 64}`; temperature 2, 90 % of the loss",
        (
            "- Trained with INT8's rounding in the graph: recipe full for openvino, "
            "calibrator percentile-99.999, without SmoothQuant, 78 tensors. Its ranges "
            "are in `quantizer_ranges.safetensors`, and `int8qa build` keeps them"
        ),
    ]
    assert "files mixed" in card
    assert "dropout 0," in card
    assert "minutes of training, resumed 2 times." in card
    assert "The loss was" not in card


@pytest.mark.parametrize("value", [None, 48.5])
def test_scores(value: float | None) -> None:
    """Without data nothing was measured; a split that is not there is left blank."""
    report = copy.deepcopy(REPORT)
    report["scores"][0]["no_ans_exact"] = value
    row = next(line for line in write_card(report).splitlines() if "dev.json" in line)
    assert row.endswith("|  |" if value is None else "| 48.50 |")
    report["scores"] = []
    assert "Nothing: no evaluation data was given." in write_card(report)
