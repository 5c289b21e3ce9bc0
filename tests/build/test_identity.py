"""What tells one outcome from another besides the choices made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from int8qa.build import identity
from int8qa.build.cpu import cpu_features
from int8qa.build.identity import (
    describe_machine,
    hash_code,
    hash_parts,
    hash_questions,
    read_versions,
)
from int8qa.errors import MissingDependencyError
from int8qa.reader.squad import SquadQuestion

QUESTION = SquadQuestion(
    "1", "Where is it?", "It hangs behind the bar.", ("bar",), (20,)
)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package with a module in each directory that is looked at."""
    root = tmp_path / "int8qa"
    for name in ("build/graph.py", "build/engines/one.py", "reader/spans.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(identity.resources, "files", lambda package: root)
    return root


@pytest.mark.parametrize(
    "name",
    ["build/graph.py", "build/engines/one.py", "build/new.py", "reader/spans.py"],
)
def test_changed_code_has_another_hash(code: Path, name: str) -> None:
    """A line changed, or a module added, in the build stage or the reader."""
    before = hash_code()
    assert hash_code() == before
    with (code / name).open("a") as stream:
        stream.write("# changed\n")
    assert hash_code() != before


def test_other_code_does_not_count(code: Path, tmp_path: Path) -> None:
    """What serves changes no build; nor does the place of the package."""
    before = hash_code()
    (code / "gateway").mkdir()
    (code / "gateway" / "app.py").write_text("# new\n")
    (code / "build" / "page.html").write_text("<p>")
    assert hash_code() == before


def test_own_code_is_found() -> None:
    """The hash is of something: of no files it would be that of nothing."""
    assert hash_code() != identity.hashlib.sha256().hexdigest()


CHANGES: dict[str, Callable[[SquadQuestion], SquadQuestion]] = {
    "id": lambda q: dataclasses.replace(q, id="2"),
    "question": lambda q: dataclasses.replace(q, question="Who is it?"),
    "context": lambda q: dataclasses.replace(q, context=q.context + " "),
    "answers": lambda q: dataclasses.replace(q, answers=("bar.",)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_changed_question_has_another_hash(part: str) -> None:
    """Whatever changed, though its id is the same."""
    other = dataclasses.replace(QUESTION, id="9")
    before = hash_questions([QUESTION, other])
    assert hash_questions(iter([QUESTION, other])) == before
    assert hash_questions([CHANGES[part](QUESTION), other]) != before
    assert hash_questions([other, QUESTION]) != before
    assert hash_questions([QUESTION]) != before


def test_order_of_keys_does_not_count() -> None:
    """Parts are told apart by name and value."""
    assert hash_parts({"a": 1, "b": 2}) == hash_parts({"b": 2, "a": 1})
    assert hash_parts({"a": 1, "b": 2}) != hash_parts({"a": 2, "b": 1})


def test_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the build stage is told what to install."""

    def find(package: str) -> str:
        if package == "onnx":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(identity.metadata, "version", find)
    with pytest.raises(MissingDependencyError, match=r"needs onnx: run `make install`"):
        read_versions()


def test_machine() -> None:
    """The architecture and what of its instruction sets counts."""
    assert describe_machine().split()[0] == identity.platform.machine()
    assert describe_machine().split()[1:] == cpu_features()


def test_machine_without_procfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel lists no instruction sets, none are known."""

    def refuse(self: Path, **options: str) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert cpu_features() == []
