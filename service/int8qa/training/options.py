"""What a training run may be told.

In: choices, each with its default. Out: :class:`TrainingOptions`, checked before
anything slow begins, and the record that a resumed run is held to. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.build.manifest import describe_recipe
from int8qa.build.plans import sign_softmax
from int8qa.build.quantization import RECIPES, Recipe
from int8qa.build.repository import hash_file
from int8qa.build.subject import LEAST_WINDOW_TOKENS
from int8qa.errors import ConfigurationError, DataFileError
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS

Precision = Literal["auto", "fp32", "bf16"]
WeightType = Literal["fp16", "fp32"]

SELF = "self"
"""Teacher: the float model the run starts from."""


@dataclass(frozen=True, slots=True)
class FakeQuantization:
    """Train with the rounding of INT8 in the graph (QAT)."""

    recipe: Recipe = RECIPES["gemms"]
    calibrator: Calibrator = field(default_factory=Calibrator)
    smooth: bool = True
    """SmoothQuant before calibration, as in the build."""
    tensorrt: bool = False
    """On the grids, and with the smoothing, of a build for TensorRT."""

    @property
    def grids(self) -> Recipe:
        """The recipe on grids that the target has."""
        return sign_softmax(self.recipe) if self.tensorrt else self.recipe


@dataclass(frozen=True, slots=True)
class Distillation:
    """Learn from a teacher's logits beside the answers."""

    teacher: str = SELF
    """``self``, or a directory or hub id."""
    temperature: float = 2.0
    weight: float = 0.9
    """Share of the teacher in the loss, 0-1; the rest is the answers'."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Everything a run depends on besides the code and the machine."""

    data: tuple[Path, ...]
    output: Path
    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    evaluation: tuple[Path, ...] = ()
    evaluation_limit: int | None = None
    limit: int | None = None
    """Questions of each training file, evenly spaced; None takes all."""
    epochs: float = 2.0
    batch: int = 32
    """Windows a step."""
    learning_rate: float | None = None
    layer_decay: float = 0.95
    """Each layer below the head learns at this share of the one above. Source: Clark
    et al. 2020, arXiv:2003.10555, appendix B (ELECTRA; 0.8 to 0.9 there)."""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    dropout: float | None = None
    seed: int = 0
    keep_order: bool = False
    """Go through the files in the order given, in every epoch."""
    negatives: float = 0.0
    """Questions without an answer made, as a share of those with one."""
    max_window_tokens: int = MAX_WINDOW_TOKENS
    doc_stride: int = DOC_STRIDE_TOKENS
    precision: Precision = "auto"
    dtype: WeightType = "fp16"
    """Of the weights written."""
    save_minutes: float = 3.0
    quantization: FakeQuantization | None = None
    distillation: Distillation | None = None
    resume: bool = False

    @property
    def chosen_learning_rate(self) -> float:
        """As asked for; else 2e-4, small encoders' rate, and a tenth for QAT.

        Source of the tenth: Wu et al. 2020, arXiv:2004.09602, section 5.2, who
        fine-tune quantized networks at a hundredth to a tenth of the first rate.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.quantization else 2e-4

    @property
    def chosen_dropout(self) -> float | None:
        """None leaves the checkpoint's; QAT does without, as it has noise enough."""
        if self.dropout is None and self.quantization is not None:
            return 0.0
        return self.dropout

    def check(self) -> None:
        """Refuse what cannot work before anything slow begins.

        Raises:
            ConfigurationError: an option is out of range or contradicts another.
            DataFileError: no training file, or one is not there.
        """
        if not self.data:
            raise DataFileError("nothing to train on; give one or more --data FILE")
        for path in (*self.data, *self.evaluation):
            if not path.is_file():
                raise DataFileError(
                    f"no such file: {path}; give a SQuAD-format JSON file"
                )
        limits: tuple[tuple[str, float, float, float], ...] = (
            ("--epochs", self.epochs, 0.001, 1000),
            ("--batch", self.batch, 1, 4096),
            ("--learning-rate", self.chosen_learning_rate, 1e-8, 1),
            ("--layer-decay", self.layer_decay, 0.1, 1),
            ("--weight-decay", self.weight_decay, 0, 1),
            ("--warmup", self.warmup, 0, 0.9),
            ("--negatives", self.negatives, 0, 1),
            ("--dropout", self.dropout or 0.0, 0, 0.9),
            ("--save-minutes", self.save_minutes, 0, 24 * 60),
            ("--seed", self.seed, 0, 2**32 - 1),  # what numpy takes
            (
                "--max-window-tokens",
                self.max_window_tokens,
                LEAST_WINDOW_TOKENS,
                1e5,
            ),
            ("--doc-stride", self.doc_stride, 0, self.max_window_tokens // 2),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ConfigurationError(
                    f"{name} is {value:g}; allowed: {low:g} to {high:g}"
                )
        self._check_distillation()

    def _check_distillation(self) -> None:
        wanted = self.distillation
        if wanted is None:
            return
        if wanted.teacher == SELF and self.quantization is None:
            raise ConfigurationError(
                "--distill-from self teaches nothing without --qat: the reader starts "
                "as its own teacher. Add --qat, or name a stronger checkpoint"
            )
        if not 0.1 <= wanted.temperature <= 100:
            raise ConfigurationError(
                f"--temperature is {wanted.temperature:g}; allowed: 0.1 to 100"
            )
        if not 0 < wanted.weight <= 1:
            raise ConfigurationError(
                f"--distill-weight is {wanted.weight:g}; allowed: above 0, at most 1"
            )

    def describe(self) -> dict[str, Any]:
        """What decides the outcome, as JSON; a resumed run must have the same."""
        quantization, distillation = self.quantization, self.distillation
        return {
            "data": [{"name": p.name, "sha256": hash_data(p)} for p in self.data],
            "limit": self.limit,
            "epochs": self.epochs,
            "batch": self.batch,
            "learning_rate": self.chosen_learning_rate,
            "layer_decay": self.layer_decay,
            "weight_decay": self.weight_decay,
            "warmup": self.warmup,
            "dropout": self.chosen_dropout,
            "seed": self.seed,
            "keep_order": self.keep_order,
            "negatives": self.negatives,
            "max_window_tokens": self.max_window_tokens,
            "doc_stride": self.doc_stride,
            "quantization": quantization
            and {
                "recipe": describe_recipe(quantization.recipe),
                "calibrator": quantization.calibrator.name,
                "smooth": quantization.smooth,
                "target": "tensorrt" if quantization.tensorrt else "openvino",
            },
            "distillation": distillation
            and {
                "temperature": distillation.temperature,
                "weight": distillation.weight,
            },
        }


def hash_data(path: Path) -> str:
    """SHA-256 of a file of questions, in hex.

    Raises:
        DataFileError: it cannot be read.
    """
    try:
        return hash_file(path)
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror}") from error
