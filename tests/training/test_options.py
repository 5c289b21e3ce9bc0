"""What a run may be told, and what it refuses before anything slow begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from int8qa.build.quantization import RECIPES
from int8qa.errors import ConfigurationError, DataFileError
from int8qa.training.options import Distillation, FakeQuantization, TrainingOptions
from tests.training.runs import write_articles


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_articles(tmp_path / "train.json")


def make(data: Path, **change: Any) -> TrainingOptions:
    return TrainingOptions(data=(data,), output=data.parent / "out", **change)


def test_defaults(data: Path) -> None:
    """They pass; QAT learns at a tenth of the rate and without dropout."""
    plain = make(data)
    plain.check()
    assert (plain.chosen_learning_rate, plain.chosen_dropout) == (2e-4, None)
    qat = make(data, quantization=FakeQuantization())
    qat.check()
    assert (qat.chosen_learning_rate, qat.chosen_dropout) == (2e-5, 0.0)
    told = make(data, quantization=FakeQuantization(), learning_rate=1e-3, dropout=0.2)
    assert (told.chosen_learning_rate, told.chosen_dropout) == (1e-3, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0.0}, "--epochs is 0; allowed: 0.001 to 1000"),
        ({"epochs": float("nan")}, "--epochs is nan"),
        ({"batch": 0}, "--batch is 0; allowed: 1 to 4096"),
        ({"learning_rate": 2.0}, "--learning-rate is 2; allowed: 1e-08 to 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0"),
        ({"layer_decay": 1.1}, "--layer-decay is 1.1"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"warmup": 1.0}, "--warmup is 1; allowed: 0 to 0.9"),
        ({"negatives": 1.5}, "--negatives is 1.5; allowed: 0 to 1"),
        ({"dropout": -0.5}, "--dropout is -0.5"),
        ({"save_minutes": -1.0}, "--save-minutes is -1"),
        ({"seed": -1}, "--seed is -1; allowed: 0 to"),
        ({"max_window_tokens": 16}, "--max-window-tokens is 16; allowed: 32 to"),
        ({"doc_stride": 200}, "--doc-stride is 200; allowed: 0 to 192"),
        ({"max_window_tokens": 64}, "--doc-stride is 128; allowed: 0 to 32"),
        ({"distillation": Distillation()}, "self teaches nothing without --qat"),
        (
            {"distillation": Distillation("x", temperature=0.0)},
            "--temperature is 0; allowed: 0.1 to 100",
        ),
        (
            {"distillation": Distillation("x", weight=0.0)},
            "--distill-weight is 0; allowed: above 0, at most 1",
        ),
        ({"distillation": Distillation("x", weight=1.1)}, "--distill-weight is 1.1"),
    ],
)
def test_out_of_range(data: Path, change: dict[str, Any], message: str) -> None:
    """The option, its value and what is allowed."""
    with pytest.raises(ConfigurationError) as caught:
        make(data, **change).check()
    assert message in str(caught.value)


def test_files(data: Path, tmp_path: Path) -> None:
    """At least one to train on, and every one is there."""
    with pytest.raises(DataFileError, match="--data FILE"):
        TrainingOptions(data=(), output=tmp_path).check()
    with pytest.raises(DataFileError, match=r"no such file: .*absent"):
        make(data, evaluation=(tmp_path / "absent.json",)).check()
    with pytest.raises(DataFileError, match="no such file"):
        make(tmp_path).check()


def test_description_holds_what_decides(data: Path) -> None:
    """JSON of everything that changes the weights; nothing of what does not."""
    plain = make(data)
    described = plain.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["data"][0]["name"] == "train.json"
    for change in (
        {"evaluation": (data,)},
        {"save_minutes": 9.0},
        {"dtype": "fp32"},
        {"precision": "bf16"},
        {"resume": True},
        {"learning_rate": 2e-4},
    ):
        assert make(data, **change).describe() == described
    for change in (
        {"epochs": 1.0},
        {"seed": 1},
        {"negatives": 0.1},
        {"limit": 2},
        {"keep_order": True},
        {"quantization": FakeQuantization()},
        {"distillation": Distillation("x")},
    ):
        assert make(data, **change).describe() != described
    before = make(data, quantization=FakeQuantization()).describe()
    for other in (
        FakeQuantization(RECIPES["full"]),
        FakeQuantization(smooth=False),
        FakeQuantization(tensorrt=True),
    ):
        assert make(data, quantization=other).describe() != before
    write_articles(data, [[("The oil is red.", (("Which?", "oil"),))]])
    assert plain.describe() != described


def test_grids_of_the_target() -> None:
    """TensorRT has no unsigned INT8; nothing else of the recipe changes."""
    full = FakeQuantization(RECIPES["full"])
    assert full.grids is RECIPES["full"]
    assert (
        FakeQuantization(RECIPES["full"], tensorrt=True).grids.unsigned_softmax is False
    )


def test_no_torch() -> None:
    """A refusal takes no seconds of imports."""
    script = (
        "import sys; import int8qa.training.commands, int8qa.training.options; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert finished.returncode == 0
