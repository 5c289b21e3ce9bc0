"""A repository is complete or absent: struck at every step, tampered with, foreign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from int8qa.build.repository import (
    StagedRepository,
    find_current,
    hash_file,
    read_manifest,
    record_costs,
    stage_repository,
)
from int8qa.build.triton_config import parse_config
from int8qa.contract import Precision, load_contract
from int8qa.errors import RepositoryError
from tests.build import publish_under_fire
from tests.build.publish_under_fire import make_contract, publish

SERVICE = Path(__file__).parents[2] / "service"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a repository is to come, in a directory of its own."""
    return tmp_path / "place" / "model_repository"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def run_python(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{SERVICE}:{SERVICE.parent}", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
@pytest.mark.parametrize("mode", ["kill", "fail"])
def test_struck_at_every_step(tmp_path: Path, mode: str) -> None:
    """Killed or refused at any access, the target is whole; the next build clears up."""
    output = run_python(publish_under_fire.__file__, str(tmp_path), mode)
    report = json.loads(output)
    assert report["faults"] == []
    states = report["states"]
    assert len(states) > 40
    # Never half; absent at most between two renames, and never after a mere failure.
    assert set(states) == {"old", "new"} | ({"absent"} if mode == "kill" else set())
    assert states.count("absent") <= 1
    assert states[-1] == "new"


def test_costs_are_recorded_in_a_published_repository(target: Path) -> None:
    """The contract has them, and the repository is current as before."""
    publish(target, "one")
    contract = load_contract(target)
    batch_ms = {
        Precision.INT8: {
            length: tuple(1.0 + size for size in contract.list_batch_sizes(length))
            for length in contract.sequence_buckets
        }
    }
    costed = record_costs(target, batch_ms)
    assert load_contract(target) == costed
    assert costed.batch_ms == batch_ms
    assert find_current(target, contract.build_id) == costed


def test_published_files(target: Path) -> None:
    """Contract, manifest, tokenizer, three models; nothing is left beside them."""
    publish(target, "one")
    assert sorted(snapshot(target)) == [
        "contract.json",
        "manifest.json",
        *(f"qa_{name}/{file}" for name in ("fp16", "fp32", "int8") for file in FILES),
        "tokenizer.json",
    ]
    assert [path.name for path in target.parent.iterdir()] == [target.name]


FILES = ("1/model.xml", "config.pbtxt")


def test_names_are_never_used_twice(target: Path) -> None:
    """A build beside another names its models anew, and writes into them whose they are.

    Triton is to load them beside those it serves; what it loaded, it can tell. A build
    without that wish has the plain names, whatever was there.
    """
    for number, build_id in enumerate(("one", "two", "one"), start=1):
        publish(target, build_id, beside=True)
        contract = load_contract(target)
        assert contract.generation == number
        names = [contract.triton_name(precision) for precision in Precision]
        assert names[0] == ("qa_int8" if number == 1 else f"qa_int8_{number}")
        assert sorted(p.name for p in target.iterdir() if p.is_dir()) == sorted(names)
        for name in names:
            config = parse_config((target / name / "config.pbtxt").read_text())
            assert config.name == name
            assert config.parameters["build_id"].string_value == build_id
        assert find_current(target, build_id) == contract
    # The names count, not what the contract says.
    (target / "contract.json").unlink()
    publish(target, "four", beside=True)
    assert load_contract(target).generation == 4
    publish(target, "five")
    assert load_contract(target) == make_contract("five")
    assert (target / "qa_int8" / "config.pbtxt").read_text() == "# five"


def test_manifest_hashes_every_file(target: Path) -> None:
    """The manifest's hashes are the files'; only its own cannot be among them."""
    publish(target, "one")
    files = read_manifest(target)["files"]
    assert files == {
        name: hash_file(target / name)
        for name in snapshot(target)
        if name != "manifest.json"
    }


def test_current(target: Path) -> None:
    """Current is a matter of the build's identity."""
    publish(target, "one")
    contract = find_current(target, "one")
    assert contract == make_contract("one")
    assert find_current(target, "two") is None
    assert find_current(target.parent, "one") is None
    assert find_current(target / "absent", "one") is None


@pytest.mark.parametrize("how", ["above", "absolute", "link", "device"])
def test_manifest_cannot_point_elsewhere(target: Path, how: str) -> None:
    """Names of a manifest stay in its repository; nothing outside is even read."""
    publish(target, "one")
    outside = target.parent / "outside"
    outside.write_text("secret")
    name = {"above": "../outside", "absolute": str(outside), "device": "/dev/zero"}.get(
        how, "link"
    )
    if how == "link":
        (target / name).symlink_to(outside)
    manifest = json.loads((target / "manifest.json").read_text())
    assert find_current(target, "one")
    manifest["files"][name] = hash_file(outside)
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert find_current(target, "one") is None


@pytest.mark.parametrize("how", ["change", "cut", "remove"])
def test_tampering(target: Path, how: str) -> None:
    """A byte changed, cut off or a file missing anywhere: no longer current."""
    publish(target, "one")
    for name, content in snapshot(target).items():
        path = target / name
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif name == "manifest.json":
            path.write_bytes(content.replace(b'"qa_int8/1/model.xml": "', b"\\0", 1))
        else:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert find_current(target, "one") is None, name
        path.write_bytes(content)
        assert find_current(target, "one") is not None


@pytest.mark.parametrize("files", [{}, None, [], "x", {"qa_int8": "0"}])
def test_manifest_that_lists_nothing(target: Path, files: object) -> None:
    """A manifest without hashes vouches for nothing."""
    publish(target, "one")
    manifest = read_manifest(target)
    (target / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    assert find_current(target, "one") is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_unreadable_manifest(target: Path, text: str) -> None:
    """What is no JSON object is no manifest; the message names the way out."""
    target.mkdir(parents=True)
    (target / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(RepositoryError, match="int8qa build"):
        read_manifest(target)


def test_readme_and_gitignore_are_kept(target: Path) -> None:
    """What git keeps in the directory survives, over two builds."""
    target.mkdir(parents=True)
    kept = {"README.md": b"about", ".gitignore": b"*", ".gitkeep": b""}
    for name, content in kept.items():
        (target / name).write_bytes(content)
    for build_id in ("one", "two"):
        publish(target, build_id)
        assert find_current(target, build_id)
        assert kept.items() <= snapshot(target).items()


def _make_file(path: Path) -> None:
    path.write_text("mine")


def _make_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("notes.txt", _make_file),
        ("resnet", _make_directory),
        ("qa_notes", _make_directory),
        ("qa_int8", _make_file),
        ("README.md", _make_directory),
        (".git", _make_directory),
    ],
)
def test_foreign_content(target: Path, name: str, make: object) -> None:
    """A directory that holds anything of somebody else is refused, untouched."""
    target.mkdir(parents=True)
    (target / "tokenizer.json").write_text("{}")
    assert callable(make)
    make(target / name)
    before = snapshot(target)
    with pytest.raises(RepositoryError, match=rf"holds {name}, which int8qa did not"):
        publish(target, "two")
    assert snapshot(target) == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_foreign_content_that_came_during_the_build(target: Path) -> None:
    """A build takes minutes; what is put there meanwhile is not lost either."""
    publish(target, "one")
    with stage_repository(target) as staged:
        (target / "notes.txt").write_text("mine")
        with pytest.raises(RepositoryError, match="did not write"):
            staged.publish(make_contract("two"), {})
    assert (target / "notes.txt").read_text() == "mine"
    assert find_current(target, "one")


def test_target_is_a_file(target: Path) -> None:
    """A file in the place of the directory is refused and stays."""
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(RepositoryError, match="is a file; give a directory"):
        publish(target, "one")
    assert target.read_text() == "mine"


def test_parent_is_a_file(target: Path) -> None:
    """A place that cannot be made is an error of one line."""
    target.parent.write_text("mine")
    with pytest.raises(RepositoryError, match="cannot write beside"):
        publish(target, "one")


def test_link_stays_a_link(target: Path, tmp_path: Path) -> None:
    """A repository linked to another disk is exchanged over there."""
    target.parent.mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    target.symlink_to(disk / "models")
    for build_id in ("one", "two"):
        publish(target, build_id)
        assert target.is_symlink()
        assert find_current(disk / "models", build_id)
    assert [path.name for path in disk.iterdir()] == ["models"]


def test_two_builds_at_once(target: Path) -> None:
    """The second is refused at once; the first goes on, and then there is room."""
    with stage_repository(target) as first:
        (first.directory / "half").write_text("")
        with (
            pytest.raises(RepositoryError, match="another build is writing"),
            stage_repository(target),
        ):
            raise AssertionError
        assert (first.directory / "half").is_file()
    publish(target, "one")
    assert find_current(target, "one")


def test_lock_on_a_removed_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file its owner removes while another opens it keeps the other out."""
    import fcntl

    flock = fcntl.flock

    def remove_then_lock(lock: object, flags: int) -> None:
        (target.parent / f".{target.name}.lock").unlink()
        flock(lock, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with (
        pytest.raises(RepositoryError, match="another build"),
        stage_repository(target),
    ):
        raise AssertionError


def test_failed_build_leaves_no_trace(target: Path) -> None:
    """A build that fails for any reason clears its staging directory."""
    publish(target, "one")
    before = snapshot(target)

    def fail() -> None:
        with stage_repository(target) as staged:
            staged.model_directory("qa_int8")
            staged.write_config("qa_int8", "")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert snapshot(target) == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from int8qa.build.repository import find_current, stage_repository
from int8qa.errors import RepositoryError
from tests.build.publish_under_fire import make_contract, publish

target = Path(sys.argv[1])
publish(target, "old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    with stage_repository(target) as staged:
        path = staged.model_directory("qa_int8") / "model.bin"
        path.write_bytes(bytes(100_000))
except RepositoryError as error:
    print(error)
print(find_current(target, "old") is not None)
print(sorted(path.name for path in target.parent.iterdir()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_full(target: Path) -> None:
    """A write the system refuses ends in a RepositoryError; the old target stays."""
    message, intact, left = run_python("-c", DISK_FULL, str(target)).splitlines()
    assert "writing the model repository failed: File too large" in message
    assert message.endswith(f"{target} is as it was")
    assert intact == "True"
    assert left == "['model_repository']"


def test_version_directory(tmp_path: Path) -> None:
    """Triton looks for versions below the model; asking twice is no error."""
    staged = StagedRepository(tmp_path, tmp_path / "target")
    assert staged.model_directory("qa_int8") == tmp_path / "qa_int8" / "1"
    assert staged.model_directory("qa_int8").is_dir()
