"""A Triton model repository, complete or absent.

In: engines, configurations, contract and manifest of one build. Out: a directory
that Triton can serve. Everything is written into a staging directory beside the
target and moved into place by rename, so that no reader ever sees half of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from int8qa.build.triton_config import stamp_config
from int8qa.contract import (
    CONTRACT_FILENAME,
    MANIFEST_FILENAME,
    TOKENIZER_FILENAME,
    Contract,
    Precision,
    load_contract,
)
from int8qa.errors import ContractError, RepositoryError

MODEL_VERSION = "1"
_OWN_FILES = frozenset({CONTRACT_FILENAME, MANIFEST_FILENAME, TOKENIZER_FILENAME})
_KEPT_FILES = frozenset({"README.md", ".gitignore", ".gitkeep"})
_MODEL_NAME = re.compile(
    rf"({'|'.join(precision.model_name for precision in Precision)})(?:_(\d+))?"
)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(repository: Path) -> dict[str, Any]:
    """The manifest of a model repository.

    Raises:
        RepositoryError: there is none, or it is not JSON.
    """
    path = repository / MANIFEST_FILENAME
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RepositoryError(
            f"{repository} has no readable manifest: rebuild it with `int8qa build`"
        ) from error
    if not isinstance(manifest, dict):
        raise RepositoryError(f"{path} is not a manifest: rebuild with `int8qa build`")
    return manifest


def record_costs(
    repository: Path, batch_ms: dict[Precision, dict[int, tuple[float, ...]]]
) -> Contract:
    """Write into a published contract what its batches cost where they were timed.

    Raises:
        ContractError: there is no contract, or the costs are not those of its batches.
        RepositoryError: there is no manifest.
    """
    contract = load_contract(repository)
    manifest = read_manifest(repository)
    contract = Contract.model_validate(contract.model_dump() | {"batch_ms": batch_ms})
    contract.save(repository)
    manifest["files"][CONTRACT_FILENAME] = hash_file(repository / CONTRACT_FILENAME)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (repository / MANIFEST_FILENAME).write_text(text + "\n", encoding="utf-8")
    return contract


def _is_within(repository: Path, name: str) -> bool:
    """Whether a manifest's name is that of a plain file of its own repository."""
    path = (repository / name).resolve()
    return path.is_relative_to(repository.resolve()) and path.is_file()


def find_current(repository: Path, build_id: str) -> Contract | None:
    """The contract of ``repository`` if it is the whole outcome of ``build_id``.

    Every file is hashed again: a repository that was cut short, edited or copied
    badly is not current.
    """
    try:
        contract = load_contract(repository)
        files = read_manifest(repository)["files"]
        intact = (
            contract.build_id == build_id
            and isinstance(files, dict)
            and CONTRACT_FILENAME in files
            and all(
                _is_within(repository, name) and hash_file(repository / name) == sha256
                for name, sha256 in files.items()
            )
        )
    except (ContractError, RepositoryError, KeyError, OSError):
        return None
    return contract if intact else None


class StagedRepository:
    """A model repository under construction, invisible until published."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory = directory
        self._target = target

    def model_directory(self, model_name: str) -> Path:
        """The version directory of a model, made if need be."""
        path = self.directory / model_name / MODEL_VERSION
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_config(self, model_name: str, config: str) -> None:
        """Write a model's ``config.pbtxt``."""
        path = self.directory / model_name / "config.pbtxt"
        path.write_text(config, encoding="utf-8")

    def publish(
        self, contract: Contract, manifest: dict[str, Any], *, beside: bool = False
    ) -> Contract:
        """Seal with contract and manifest, and take the target's place.

        Args:
            contract: of the build.
            manifest: likewise.
            beside: give the models names that no build in this place had before, so
                that a running Triton can load them beside those it serves.

        Returns:
            The contract as it was published.

        Raises:
            RepositoryError: the target holds things int8qa did not write, or the
                file system refused.
        """
        if beside:
            contract = self._name_anew(contract)
        contract.save(self.directory)
        files = {
            str(path.relative_to(self.directory)): hash_file(path)
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        }
        text = json.dumps({**manifest, "files": files}, indent=2, ensure_ascii=False)
        (self.directory / MANIFEST_FILENAME).write_text(text + "\n", encoding="utf-8")
        # Again: a build takes minutes, and the owner may have used them.
        _check_replaceable(self._target)
        try:
            self._exchange()
        except OSError as error:
            raise RepositoryError(
                f"cannot publish {self._target}: {error.strerror} ({error.filename})"
            ) from error
        return contract

    def _name_anew(self, contract: Contract) -> Contract:
        generation = _read_generation(self._target) + 1
        contract = contract.model_copy(update={"generation": generation})
        for precision in contract.models:
            directory = self.directory / precision.model_name
            name = contract.triton_name(precision)
            config = directory / "config.pbtxt"
            text = stamp_config(config.read_text("utf-8"), name, contract.build_id)
            config.write_text(text, encoding="utf-8")
            directory.rename(self.directory / name)
        return contract

    def _exchange(self) -> None:
        previous = _sibling(self._target, "previous")
        if self._target.exists():
            for name in _KEPT_FILES:
                if (self._target / name).is_file():
                    shutil.copy2(self._target / name, self.directory / name)
            shutil.rmtree(previous, ignore_errors=True)
            self._target.rename(previous)
        # Killed here, the target is absent, never half; the next build begins by
        # putting the previous one back.
        try:
            self.directory.rename(self._target)
        except OSError:
            _restore_previous(self._target)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _read_generation(target: Path) -> int:
    """The highest generation of any model directory in ``target``; 0 if there is none.

    Read from the names: they are what must not come twice, whatever the contract says.
    """
    if not target.is_dir():
        return 0
    found = (_MODEL_NAME.fullmatch(entry.name) for entry in target.iterdir())
    return max((int(match[2] or 1) for match in found if match), default=0)


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}"


def _restore_previous(target: Path) -> None:
    """Undo the first half of an exchange whose second half never came."""
    previous = _sibling(target, "previous")
    if previous.is_dir() and not target.exists():
        previous.rename(target)


@contextlib.contextmanager
def stage_repository(target: Path) -> Iterator[StagedRepository]:
    """Open a staging directory for ``target``; it is gone when the block is left.

    One build at a time: the staging directory is locked for as long as its process
    lives, and a left-over of a killed build is cleared.

    Raises:
        RepositoryError: another build is at work, the target is not ours to
            replace, or the place cannot be written.
    """
    # Resolved: a link to another disk stays one, and the renames happen over there.
    target = target.resolve()
    staging = _sibling(target, "staging")
    with _lock(target):
        try:
            _restore_previous(target)
            _check_replaceable(target)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        except OSError as error:
            raise RepositoryError(
                f"cannot write {staging}: {error.strerror}"
            ) from error
        try:
            yield StagedRepository(staging, target)
        except OSError as error:
            raise RepositoryError(
                f"writing the model repository failed: {error.strerror or error} "
                f"({os.fspath(error.filename) if error.filename else staging}); "
                f"{target} is as it was"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the lock file beside ``target``, which the kernel frees with its process."""
    path = _sibling(target, "lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise RepositoryError(
            f"cannot write beside {target}: {error.strerror}"
        ) from error
    with lock:
        if not _try_lock(lock, path):
            raise RepositoryError(
                f"another build is writing {target}; wait for it or stop it"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _try_lock(lock: IO[str], path: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its former owner may have removed the file after we opened it; a lock on a
        # removed file keeps nobody out.
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a directory that holds anything a build does not write."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RepositoryError(f"{target} is a file; give a directory")
    foreign = [
        entry.name
        for entry in sorted(target.iterdir())
        if not (
            (entry.is_dir() and _MODEL_NAME.fullmatch(entry.name))
            or (entry.is_file() and entry.name in _OWN_FILES | _KEPT_FILES)
        )
    ]
    if foreign:
        raise RepositoryError(
            f"{target} holds {', '.join(foreign[:3])}, which int8qa did not write and "
            f"will not replace; give an empty directory with --model-repository"
        )
