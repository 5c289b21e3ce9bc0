"""Environments of peers: made once, from pins, or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from int8qa.bench import peer_environments
from int8qa.bench.peer_environments import make_environment, read_pins
from int8qa.errors import MissingDependencyError

PEERS = Path(__file__).parents[2] / "bench" / "peers"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run, without running it; `venv` makes a directory."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        failed = any("impossible" in Path(c).name for c in command[-1:])
        text = "WARNING: old pip\nERROR: no impossible==1\n" if failed else ""
        return subprocess.CompletedProcess(command, int(failed), "", text)

    monkeypatch.setattr(peer_environments.subprocess, "run", run)
    monkeypatch.delenv(peer_environments.TORCH_INDEX_VARIABLE, raising=False)
    return ran


def make_peer(directory: Path, *lines: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "requirements.txt").write_text("\n".join(lines) + "\n")
    return directory


def test_made_once(commands: list[list[str]], tmp_path: Path) -> None:
    """And again only when the pins change."""
    peer = make_peer(tmp_path / "peer", "# of it", "torch==2.1", "numpy==1.26.4")
    root = tmp_path / ".venvs"
    python = make_environment(peer, root)
    assert python == root / "peer" / "bin" / "python"
    assert [command[0] for command in commands][1:] == [str(python)]
    assert commands[1][-2:] == ["--requirement", str(peer / "requirements.txt")]
    make_environment(peer, root)
    assert len(commands) == 2
    make_peer(tmp_path / "peer", "torch==2.2")
    make_environment(peer, root)
    assert len(commands) == 4


def test_torch_from_its_own_index(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user names one, and for torch alone."""
    monkeypatch.setenv("INT8QA_TORCH_INDEX", "file:///index")
    make_environment(make_peer(tmp_path / "a", "torch==2.1"), tmp_path / "v")
    assert commands[1][-3:] == ["--index-url", "file:///index", "torch==2.1"]
    commands.clear()
    make_environment(make_peer(tmp_path / "b", "numpy==1.26.4"), tmp_path / "v")
    assert len(commands) == 2


def test_what_cannot_be_made_leaves_nothing(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is pip's last word, not its warnings."""
    monkeypatch.setattr(peer_environments, "REQUIREMENTS", "impossible.txt")
    peer = tmp_path / "peer"
    peer.mkdir()
    (peer / "impossible.txt").write_text("impossible==1\n")
    with pytest.raises(MissingDependencyError, match="ERROR: no impossible==1"):
        make_environment(peer, tmp_path / "v")
    assert not (tmp_path / "v" / "peer").exists()
    assert commands


@pytest.mark.parametrize("name", ["litserve", "transformers", "triton"])
def test_everything_is_pinned(name: str) -> None:
    """By `==`, without an address, and with what the peer is about."""
    path = PEERS / name / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    pins = read_pins(path)
    assert len(pins) == len(packages)
    assert not [line for line in packages if "://" in line or line.startswith("-")]
    about = {"litserve": "onnxruntime", "transformers": "torch", "triton": "tokenizers"}
    assert about[name] in pins
    if name == "transformers":
        # The last one with the pipeline.
        assert pins["transformers"].startswith("5.2.")
