"""The contract: read back as written, refused in one line, held to Triton's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from int8qa.contract import (
    Contract,
    Precision,
    check_model_tensors,
    load_contract,
)
from int8qa.errors import ContractError
from tests.records import make_model_record

INPUTS = [("input_ids", "INT32"), ("attention_mask", "INT32")]
OUTPUTS = [("start_logits", "FP32"), ("end_logits", "FP32")]


@pytest.fixture
def contract() -> Contract:
    return Contract(
        build_id="b1",
        checkpoint="acme/lesé",
        tokenizer_sha256="0" * 64,
        pad_token_id=0,
        inputs=("input_ids", "attention_mask"),
        max_window_tokens=96,
        sequence_buckets=(32, 64, 96),
        batch_sizes=(1, 2),
        max_batch_tokens=192,
        models={Precision.INT8: make_model_record(engine="openvino", exact_match=70.0)},
    )


def test_round_trip(contract: Contract, tmp_path: Path) -> None:
    """What is saved is what is loaded."""
    contract.save(tmp_path)
    assert load_contract(tmp_path) == contract


def with_costs(contract: Contract, batch_ms: Any) -> dict[str, Any]:
    return contract.model_dump(mode="json") | {"batch_ms": batch_ms}


def test_batch_sizes_keep_the_budget(contract: Contract) -> None:
    """One window is legal at any length."""
    sizes = {s: contract.list_batch_sizes(s) for s in contract.sequence_buckets}
    assert sizes == {32: (1, 2), 64: (1, 2), 96: (1, 2)}
    tight = contract.model_copy(update={"max_batch_tokens": 64})
    assert [tight.list_batch_sizes(s) for s in (32, 64, 96)] == [(1, 2), (1,), (1,)]


def test_costs_are_read_back(contract: Contract, tmp_path: Path) -> None:
    """By precision and padded length, a time for each batch size."""
    rows = {32: (1.5, 2.5), 64: (2.0, 4.0), 96: (3.0, 6.0)}
    document = with_costs(contract, {"int8": rows})
    costed = Contract.model_validate_json(json.dumps(document))
    costed.save(tmp_path)
    assert load_contract(tmp_path).batch_ms == {Precision.INT8: rows}


@pytest.mark.parametrize(
    ("precision", "rows"),
    [
        ("fp16", {32: (1.0, 2.0), 64: (1.0, 2.0), 96: (1.0, 2.0)}),
        ("int8", {32: (1.0, 2.0), 64: (1.0, 2.0)}),
        ("int8", {32: (1.0, 2.0), 64: (1.0, 2.0), 96: (1.0,)}),
        ("int8", {32: (1.0, 2.0), 64: (1.0, 2.0), 96: (1.0, 0.0)}),
        ("int8", {32: (1.0, 2.0), 64: (1.0, 2.0), 96: (1.0, float("inf"))}),
    ],
    ids=["no model", "length missing", "size missing", "zero", "infinite"],
)
def test_costs_must_be_whole(contract: Contract, precision: str, rows: Any) -> None:
    """A batcher that finds no cost for a batch could not choose."""
    with pytest.raises(ValidationError, match=f"batch_ms of {precision}"):
        Contract.model_validate(with_costs(contract, {precision: rows}))


def test_before_recommendations(contract: Contract, tmp_path: Path) -> None:
    """A contract written before builds recommended anything still loads."""
    document = contract.model_dump(mode="json")
    del document["recommended"]
    (tmp_path / "contract.json").write_text(json.dumps(document))
    assert load_contract(tmp_path).recommended is None


def test_recommended_round_trip(contract: Contract, tmp_path: Path) -> None:
    """The recommended precision is read back as the precision it is."""
    contract.model_copy(update={"recommended": Precision.INT8}).save(tmp_path)
    assert load_contract(tmp_path).recommended is Precision.INT8


def test_absent(tmp_path: Path) -> None:
    """A directory without one is told how to become a repository."""
    with pytest.raises(ContractError) as caught:
        load_contract(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no complete model repository: it has no contract.json. Run "
        f"`int8qa build --model-repository {tmp_path}`"
    )


def test_unreadable(tmp_path: Path) -> None:
    """A contract the system will not open is an error of ours."""
    (tmp_path / "contract.json").mkdir()
    with pytest.raises(ContractError, match=r"cannot read .*directory"):
        load_contract(tmp_path)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"tokenizer_sha256": "short"}, "tokenizer_sha256"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"max_window_tokens": 8}, "max_window_tokens"),
        ({"models": {"int4": {}}}, "models.int4"),
        ({"surprise": 1}, "surprise"),
        ({"build_id": None}, "build_id"),
        ({"recommended": "int4"}, "recommended"),
        ({"recommended": "fp16"}, "recommended: .*must be one of the models"),
    ],
)
def test_wrong_field(
    contract: Contract, tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    """The first wrong field is named, and the way to a right one."""
    document = {**contract.model_dump(mode="json"), **changes}
    (tmp_path / "contract.json").write_text(json.dumps(document))
    with pytest.raises(ContractError, match=f"this version reads: {where}") as caught:
        load_contract(tmp_path)
    assert "Rebuild with `int8qa build" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_no_json(tmp_path: Path, content: bytes) -> None:
    """Half a file, or another file, ends in one line."""
    (tmp_path / "contract.json").write_bytes(content)
    with pytest.raises(ContractError, match="not a contract this version") as caught:
        load_contract(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 32), (32, 32), (33, 64), (95, 96), (96, 96)]
)
def test_bucket(contract: Contract, length: int, bucket: int) -> None:
    """The smallest bucket that holds the window."""
    assert contract.bucket_for(length) == bucket


def test_no_bucket(contract: Contract) -> None:
    """A window longer than all buckets names both lengths."""
    with pytest.raises(ContractError, match=r"97 tokens exceeds .* 96"):
        contract.bucket_for(97)


def test_same_tensors(contract: Contract) -> None:
    """Order is free."""
    check_model_tensors(
        contract,
        Precision.INT8,
        inputs=reversed(INPUTS),
        outputs=reversed(OUTPUTS),
        build_id="",
    )


@pytest.mark.parametrize(("generation", "told"), [(0, "b"), (2, ""), (2, "another")])
def test_other_build(contract: Contract, generation: int, told: str) -> None:
    """Names and types may agree: a model that says it is of another build is refused."""
    ours = contract.model_copy(update={"generation": generation})
    tensors = {"inputs": INPUTS, "outputs": OUTPUTS}
    own = ours.build_id if generation else ""
    check_model_tensors(ours, Precision.INT8, **tensors, build_id=own)
    with pytest.raises(ContractError, match=f"of build {told or 'unknown'}, the"):
        check_model_tensors(ours, Precision.INT8, **tensors, build_id=told)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [
        (INPUTS[:1], OUTPUTS, "inputs"),
        ([*INPUTS, ("token_type_ids", "INT32")], OUTPUTS, "inputs"),
        ([("input_ids", "INT64"), INPUTS[1]], OUTPUTS, "inputs"),
        (INPUTS, OUTPUTS[1:], "outputs"),
        (INPUTS, [("start_logits", "FP16"), OUTPUTS[1]], "outputs"),
    ],
)
def test_other_tensors(
    contract: Contract, inputs: Any, outputs: Any, kind: str
) -> None:
    """A missing, unknown or otherwise typed tensor: both sides are shown."""
    with pytest.raises(ContractError, match=f"serves qa_fp16 with {kind}") as caught:
        check_model_tensors(
            contract, Precision.FP16, inputs=inputs, outputs=outputs, build_id=""
        )
    assert "the contract says" in str(caught.value)


def test_precision_names() -> None:
    """A precision is its own name, in text and in Triton."""
    assert [f"{p}:{p.model_name}" for p in Precision] == [
        "int8:qa_int8",
        "fp16:qa_fp16",
        "fp32:qa_fp32",
    ]


def test_frozen(contract: Contract) -> None:
    """Nobody changes it after it was read."""
    with pytest.raises(ValidationError):
        contract.build_id = "b2"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("sequence_buckets", []),
        ("sequence_buckets", [64, 32]),
        ("sequence_buckets", [32, 32]),
        ("sequence_buckets", [0, 32]),
        ("batch_sizes", [2, 4]),
        ("batch_sizes", []),
        ("format_version", 2),
    ],
)
def test_contract_refuses_shapes_no_batcher_could_use(
    contract: Contract, field: str, values: object
) -> None:
    """Shapes ascend, start with a lone window, and the format is the one we read."""
    document = contract.model_dump(mode="json")
    assert Contract.model_validate_json(json.dumps(document))
    with pytest.raises(ValidationError):
        Contract.model_validate_json(json.dumps({**document, field: values}))
