"""The table of problems is complete and says what clients rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from int8qa.errors import (
    BuildError,
    EngineUnavailableError,
    InputTooLargeError,
    Int8qaError,
    InvalidInputError,
    QueueFullError,
    ShuttingDownError,
)
from int8qa.gateway.problems import (
    INTERNAL,
    PROBLEMS,
    REJECTION_REASONS,
    describe_problem,
    find_kind,
)


def iter_subclasses(root: type[Int8qaError]) -> Iterator[type[Int8qaError]]:
    for child in root.__subclasses__():
        yield child
        yield from iter_subclasses(child)


def test_every_error_has_a_problem():
    """A class of error that the table does not know fails here."""
    ours = [c for c in iter_subclasses(Int8qaError) if c.__module__ == "int8qa.errors"]
    assert len(ours) > 15
    for kind in ours:
        assert find_kind(kind) is not None, f"{kind.__name__} has no row in PROBLEMS"


def test_unknown_direct_subclass_has_none():
    """The enumeration above can fail: the root itself is no row."""

    class UnheardError(Int8qaError):
        pass

    assert find_kind(UnheardError) is None
    assert describe_problem(UnheardError("x")).kind is INTERNAL


def test_statuses_are_the_contracts():
    """The statuses of the published contract."""
    statuses = {kind.__name__: row.status for kind, row in PROBLEMS.items()}
    assert {name: s for name, s in statuses.items() if s != 500} == {
        "InvalidInputError": 422,
        "InputTooLargeError": 413,
        "UnknownModelError": 404,
        "OverloadedError": 503,
        "QueueFullError": 429,
        "DeadlineUnreachableError": 503,
        "ShuttingDownError": 503,
        "DeadlineExceededError": 504,
        "EngineError": 502,
        "EngineOutputError": 502,
        "EngineUnavailableError": 503,
    }


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("full", retry_after_s=0.01),
        ShuttingDownError("bye", retry_after_s=2.2),
        EngineUnavailableError("gone", retry_after_s=3),
    ],
)
def test_overload_says_when_to_ask_again(error: Int8qaError):
    """Retry-After is whole seconds, rounded up, at least one."""
    response = describe_problem(error).to_response("id")
    assert int(response.headers["retry-after"]) == max(
        1, -int(-error.retry_after_s // 1)
    )


def test_field_errors_name_their_field():
    """Errors about a field carry it in `errors`."""
    for error in (InvalidInputError("context", "m"), InputTooLargeError("body", "m")):
        body = describe_problem(error).to_dict("id")
        assert body["errors"] == [{"field": error.field, "message": "m"}]


@pytest.mark.parametrize("error", [BuildError("secret"), RuntimeError("secret")])
def test_internal_errors_show_nothing(error: Exception):
    """What is not the client's business stays in the log."""
    body = describe_problem(error).to_dict("id")
    assert body["status"] == 500
    assert "secret" not in str(body)


def test_labels_are_bounded():
    """Outcomes and reasons are few, and fit for labels."""
    outcomes = {kind.outcome for kind in PROBLEMS.values()}
    assert outcomes == {
        *("invalid", "overloaded", "timeout", "bad_engine", "unavailable", "error"),
    }
    assert all(reason.isidentifier() for reason in REJECTION_REASONS)
