"""The tree in the docstring is the tree in the code, and each class leaves its code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from int8qa import errors
from int8qa.cli import EXIT_CODES, exit_code


def walk(kind: type[Exception] = errors.Int8qaError) -> Iterator[type[Exception]]:
    yield kind
    for child in kind.__subclasses__():
        yield from walk(child)


CLASSES = list(walk())


def read_tree() -> dict[str, str]:
    """Parent by class name, as the docstring draws it."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else ""
    return parents


def test_docstring_tree() -> None:
    """Every class stands in the drawing, below its own parent, and none besides."""
    assert read_tree() == {
        kind.__name__: "" if kind is errors.Int8qaError else kind.__base__.__name__
        for kind in CLASSES
        if kind.__base__ is not None
    }


def test_no_class_outside_the_module() -> None:
    """The module is the whole tree: no other module of ours adds a class to it."""
    assert {kind.__module__ for kind in CLASSES} == {errors.__name__}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_exit_code(kind: type[errors.Int8qaError]) -> None:
    """A code of sysexits.h, the class's own or its parent's, but never the root's."""
    error = kind.__new__(kind)
    code = exit_code(error)
    assert 64 <= code <= 78
    nearest = next(parent for parent in kind.__mro__ if parent in EXIT_CODES)
    if kind is not errors.Int8qaError:
        assert nearest is not errors.Int8qaError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InputTooLargeError, 65),
        (errors.QueueFullError, 75),
        (errors.EngineUnavailableError, 69),
        (errors.AccuracyGateError, 70),
        (errors.CheckpointError, 66),
        (errors.DataFileError, 66),
        (errors.RepositoryError, 73),
        (errors.ContractError, 78),
    ],
)
def test_documented_exit_codes(kind: type[errors.Int8qaError], code: int) -> None:
    """Codes scripts rely on."""
    assert exit_code(kind.__new__(kind)) == code


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_says_when(kind: type[Exception]) -> None:
    """Each class has a docstring of its own."""
    assert kind.__doc__
    assert kind.__doc__ != getattr(kind.__base__, "__doc__", None)


def test_attributes() -> None:
    """What edges need travels with the error: the field, and when to come back."""
    assert errors.InputTooLargeError("context", "too long").field == "context"
    assert errors.QueueFullError("full", retry_after_s=3.0).retry_after_s == 3.0
    assert errors.EngineUnavailableError("gone").retry_after_s == 2.0
