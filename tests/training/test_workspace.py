"""An output directory in each of its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from int8qa.errors import ConfigurationError, RepositoryError
from int8qa.training import workspace as module
from int8qa.training.workspace import REPORT_FILENAME, Workspace

OPTIONS = {"epochs": 2.0, "data": [{"name": "a.json"}]}


def finish(workspace: Workspace, **extra: Any) -> None:
    final = workspace.begin_final()
    (final / "model.safetensors").write_bytes(b"weights")
    workspace.publish({"options": OPTIONS} | extra)


def test_new_directory(tmp_path: Path) -> None:
    """It may be absent or empty; opened, it holds a run that can be resumed."""
    for output in (tmp_path / "a" / "b", tmp_path / "empty"):
        if output.name == "empty":
            output.mkdir()
        workspace = Workspace(output)
        workspace.check(resume=False)
        workspace.check(resume=True)
        assert workspace.open(OPTIONS) == 0
        assert Workspace(output).read_report(OPTIONS) is None
        with pytest.raises(RepositoryError, match="unfinished run; add --resume"):
            Workspace(output).check(resume=False)
        Workspace(output).check(resume=True)


def test_file_in_the_way(tmp_path: Path) -> None:
    """A file is not replaced by a directory."""
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(RepositoryError, match="is a file; give a directory"):
        Workspace(path).check(resume=False)
    assert path.read_text() == "mine"


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """The system's reason stands in the message."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match=r"cannot write to .*: Not a directory"):
        Workspace(tmp_path / "file" / "out").open(OPTIONS)


def test_resumptions_are_counted(tmp_path: Path) -> None:
    """Each opening after the first is one; other options are refused by name."""
    workspace = Workspace(tmp_path / "out")
    assert [workspace.open(OPTIONS) for _ in range(4)] == [0, 1, 2, 3]
    # A tuple is the list that JSON makes of it.
    assert workspace.open(OPTIONS | {"data": ({"name": "a.json"},)}) == 4
    changed = {"epochs": 3.0, "data": [], "seed": 1}
    with pytest.raises(ConfigurationError, match="another data, epochs, seed;"):
        workspace.open(changed)


def test_forgetting(tmp_path: Path) -> None:
    """What was opened goes again; what others put there stays."""
    workspace = Workspace(tmp_path / "out")
    workspace.open(OPTIONS)
    workspace.forget()
    assert not workspace.output.exists()
    workspace.open(OPTIONS)
    (workspace.output / "notes.txt").write_text("mine")
    workspace.forget()
    assert [path.name for path in workspace.output.iterdir()] == ["notes.txt"]


def test_publishing(tmp_path: Path) -> None:
    """The files move out, the report comes last, and nothing else is left."""
    workspace = Workspace(tmp_path / "out")
    workspace.open(OPTIONS)
    (workspace.scratch / "checkpoint-7").mkdir()
    finish(workspace, name="é")
    assert {path.name for path in workspace.output.iterdir()} == {
        "model.safetensors",
        REPORT_FILENAME,
    }
    report = Workspace(tmp_path / "out").read_report(OPTIONS)
    assert report == {"options": OPTIONS, "name": "é"}
    with pytest.raises(ConfigurationError, match="another epochs;"):
        workspace.read_report(OPTIONS | {"epochs": 3.0})
    with pytest.raises(RepositoryError, match="is not empty and holds no run"):
        workspace.check(resume=True)


def test_killed_while_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the report the run is unfinished, after it finished, whatever is left."""
    workspace = Workspace(tmp_path / "out")
    workspace.open(OPTIONS)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", stop)
        with pytest.raises(KeyboardInterrupt):
            finish(workspace)
    assert (workspace.output / "model.safetensors").is_file()
    assert workspace.read_report(OPTIONS) is None
    workspace.check(resume=True)
    assert workspace.open(OPTIONS) == 1
    begin = workspace.begin_final()
    (begin / "model.safetensors").write_bytes(b"weights")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            workspace.publish({"options": OPTIONS})
    assert workspace.scratch.is_dir()
    assert workspace.read_report(OPTIONS) is not None
    assert not workspace.scratch.exists()


def test_final_begins_empty(tmp_path: Path) -> None:
    """A file of an earlier attempt is not published."""
    workspace = Workspace(tmp_path / "out")
    workspace.open(OPTIONS)
    (workspace.begin_final() / "old.bin").write_bytes(b"")
    finish(workspace)
    assert not (workspace.output / "old.bin").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 3}', '"x"'])
def test_strange_report(tmp_path: Path, text: str) -> None:
    """A directory with another program's training.json is not taken for a run."""
    (tmp_path / REPORT_FILENAME).write_text(text)
    with pytest.raises(RepositoryError, match="is no report of a training run"):
        Workspace(tmp_path).read_report(OPTIONS)
