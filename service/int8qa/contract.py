"""What the build stage promises and the gateway relies on, in one small file.

In: what the build decided (tensor names, padded shapes, tokenizer, models).
Out: ``contract.json`` at the root of a model repository, read back and held
against Triton's own model metadata before the gateway serves a request.
Knows neither torch nor tritonclient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from int8qa.errors import ContractError

CONTRACT_FILENAME = "contract.json"
MANIFEST_FILENAME = "manifest.json"
ALONE_PARAMETER = "alone"
"""Request parameter: nothing else of its sender is in the model."""

BUILD_ID_PARAMETER = "build_id"
"""In each model's configuration: what Triton tells of the build it has loaded."""
TOKENIZER_FILENAME = "tokenizer.json"
CONTROL_HEADER = "int8qa-control"
"""Of Triton's control API: carries the key without which no model is loaded."""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
TOKEN_TYPE_IDS = "token_type_ids"  # noqa: S105 - a tensor's name
START_LOGITS = "start_logits"
END_LOGITS = "end_logits"

INPUT_DATATYPE = "INT32"
"""Triton's name of the inputs' type, shape [B, S]."""
OUTPUT_DATATYPE = "FP32"
"""Triton's name of the logits' type, shape [B, S]."""


class Precision(str, Enum):
    """A served precision. FP32 is the reference the other two are held against."""

    INT8 = "int8"
    FP16 = "fp16"
    FP32 = "fp32"

    def __str__(self) -> str:
        return self.value

    @property
    def model_name(self) -> str:
        """What clients call the model; see ``Contract.triton_name``."""
        return f"qa_{self.value}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Frozen):
    """One served model: what the gateway shows of it and labels metrics with."""

    name: str = Field(pattern=r"^qa_[a-z0-9]+$")
    engine: str = Field(description="openvino, tensorrt or tensorrt-rtx")
    calibrator: str = Field(description="none for float models")
    recipe: str = Field(description="none for float models")
    f1: float | None = Field(description="F1 at build on the evaluation set, 0-100")
    exact_match: float | None = Field(description="EM at build, 0-100")
    size_bytes: int = Field(ge=0)
    execution: str = Field(
        default="",
        description="types the engine's GEMMs really ran in where it was built, "
        "such as u8, i8, f16 or bf16",
    )


class Contract(_Frozen):
    """The shapes, names and identities both halves of int8qa agree on."""

    format_version: Literal[1] = 1
    build_id: str = Field(description="hash over everything that shaped the build")
    generation: int = Field(
        default=0,
        ge=0,
        description="names the models in Triton, above 1; 0: not to be loaded beside "
        "another build",
    )
    checkpoint: str = Field(description="hub id or directory name")
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    pad_token_id: int = Field(ge=0)
    inputs: tuple[str, ...] = Field(
        description="tensors the models take, all INT32 [B, S]; order is free"
    )
    max_window_tokens: int = Field(ge=16, description="longest window, in tokens")
    sequence_buckets: tuple[int, ...] = Field(
        description="padded lengths S that may occur, ascending, in tokens"
    )
    batch_sizes: tuple[int, ...] = Field(
        description="batch sizes B that may occur, ascending; the first is 1"
    )
    max_batch_tokens: int = Field(ge=16, description="largest B x S, in tokens")
    models: dict[Precision, ModelRecord]
    batch_ms: dict[Precision, dict[int, tuple[float, ...]]] = Field(
        default_factory=dict,
        description="what each batch takes of an engine where it was built, in ms: by "
        "precision and padded length, for each batch size that may occur with it; "
        "precisions that were not timed are missing",
    )
    verdict: str = Field(
        default="", description="one paragraph: what INT8 gains and costs here"
    )
    recommended: Precision | None = Field(
        default=None,
        description="what requests that name no precision get, unless the gateway is "
        "told otherwise; null: the build recommends none",
    )

    @field_validator("sequence_buckets", "batch_sizes")
    @classmethod
    def _check_ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or values[0] < 1 or list(values) != sorted(set(values)):
            raise ValueError("must be positive, ascending and without repeats")
        return values

    @field_validator("batch_sizes")
    @classmethod
    def _check_single(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if values[0] != 1:
            raise ValueError("must begin with 1, or a lone window could not leave")
        return values

    @field_validator("recommended")
    @classmethod
    def _check_recommended(
        cls, value: Precision | None, info: ValidationInfo
    ) -> Precision | None:
        if value is not None and value not in info.data.get("models", {value}):
            raise ValueError("must be one of the models")
        return value

    @model_validator(mode="after")
    def _check_batch_ms(self) -> Contract:
        for precision, by_length in self.batch_ms.items():
            expected = {s: len(self.list_batch_sizes(s)) for s in self.sequence_buckets}
            found = {length: len(row) for length, row in by_length.items()}
            if precision not in self.models or found != expected:
                raise ValueError(
                    f"batch_ms of {precision} must have a time for each batch size at "
                    f"each padded length of one of the models"
                )
            if any(not 0 < ms < math.inf for row in by_length.values() for ms in row):
                raise ValueError(f"batch_ms of {precision} must be above 0 and finite")
        return self

    def triton_name(self, precision: Precision) -> str:
        """The name of a model in Triton and of its directory.

        From a build with ``--beside`` never that of a build before: two can be loaded
        side by side, and a name says which one answers.
        """
        if self.generation <= 1:
            return precision.model_name
        return f"{precision.model_name}_{self.generation}"

    def list_batch_sizes(self, length: int) -> tuple[int, ...]:
        """Batch sizes that may occur with a padded length, ascending."""
        budget = self.max_batch_tokens
        return tuple(b for b in self.batch_sizes if b == 1 or b * length <= budget)

    def bucket_for(self, length: int) -> int:
        """Padded length for a window of ``length`` tokens.

        Raises:
            ContractError: the window is longer than the longest bucket.
        """
        for bucket in self.sequence_buckets:
            if length <= bucket:
                return bucket
        raise ContractError(
            f"a window of {length} tokens exceeds the longest bucket of "
            f"{self.sequence_buckets[-1]}; split with max_window_tokens="
            f"{self.max_window_tokens}"
        )

    def save(self, repository: Path) -> None:
        """Write ``contract.json`` into ``repository``."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        (repository / CONTRACT_FILENAME).write_text(text, encoding="utf-8")


def load_contract(repository: Path) -> Contract:
    """Read the contract of a model repository.

    Raises:
        ContractError: there is none, or it is not one this version can read.
    """
    path = repository / CONTRACT_FILENAME
    try:
        return Contract.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ContractError(
            f"{repository} is no complete model repository: it has no "
            f"{CONTRACT_FILENAME}. Run `int8qa build --model-repository {repository}`"
        ) from None
    except OSError as error:
        raise ContractError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ContractError(
            f"{path} is not a contract this version reads: {where}: {first['msg']}. "
            f"Rebuild with `int8qa build --model-repository {repository}`"
        ) from error


def check_model_tensors(
    contract: Contract,
    precision: Precision,
    *,
    inputs: Iterable[tuple[str, str]],
    outputs: Iterable[tuple[str, str]],
    build_id: str,
) -> None:
    """Hold what Triton says of one model to the contract.

    Args:
        contract: what the gateway works by.
        precision: the model's.
        inputs: (name, datatype) pairs.
        outputs: likewise.
        build_id: of the model's configuration; empty in builds that are not to be
            loaded beside others.

    Raises:
        ContractError: it is of another build, or a tensor is missing, unknown or of
            another type.
    """
    name = contract.triton_name(precision)
    own_id = contract.build_id if contract.generation else ""
    if build_id != own_id:
        raise ContractError(
            f"Triton serves {name} of build {build_id or 'unknown'}, the contract is "
            f"of {contract.build_id}: the model repository was made anew in between; "
            f"restart Triton and the gateway"
        )
    expected_inputs = {(name, INPUT_DATATYPE) for name in contract.inputs}
    expected_outputs = {
        (START_LOGITS, OUTPUT_DATATYPE),
        (END_LOGITS, OUTPUT_DATATYPE),
    }
    for kind, expected, found in (
        ("inputs", expected_inputs, set(inputs)),
        ("outputs", expected_outputs, set(outputs)),
    ):
        if expected != found:
            raise ContractError(
                f"Triton serves {name} with {kind} "
                f"{sorted(found)}, the contract says {sorted(expected)}. Triton and "
                f"the gateway read different model repositories, or one is stale: "
                f"rebuild with `int8qa build` and restart both"
            )
