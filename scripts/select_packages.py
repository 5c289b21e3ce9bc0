"""Which pinned packages go into which container image.

In: ``requirements.lock`` and a list of names from ``docker/packages``. Out: the lock's
entries of these names, hashes and all, for pip. With ``--write`` the lists themselves,
from ``pyproject.toml`` and the metadata of what is installed here. One lock, so that an
image never holds another version than the one tested; each image gets what it uses.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "docker" / "packages"
PYTHONS = ("3.10", "3.11", "3.12")

IMAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # image: packages with all they need, packages on their own
    "gateway": (("int8qa[tracing]",), ()),
    # Of pytriton only the server's files are used, never its Python interface.
    "triton": (("int8qa", "openvino"), ("nvidia-pytriton",)),
    "builder": (("int8qa[build]", "openvino"), ()),
    "wheel": ((), ("setuptools",)),
}


def normalize_name(name: str) -> str:
    """The one spelling of a package's name. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def iter_entries(lock: str) -> Iterator[tuple[str, str]]:
    """Yield (name, entry with its hashes) of a lock, in order."""
    for entry in re.split(r"(?m)^(?=[a-zA-Z0-9])", lock):
        match = re.match(r"([A-Za-z0-9._-]+)==", entry)
        if match:
            yield normalize_name(match[1]), entry


def select_entries(lock: str, names: Collection[str]) -> str:
    """The part of ``lock`` that ``names`` ask for.

    Raises:
        SystemExit: a name is not in the lock.
    """
    entries = list(iter_entries(lock))
    absent = set(names) - {name for name, _ in entries}
    if absent:
        raise SystemExit(
            f"not in requirements.lock: {', '.join(sorted(absent))}; run "
            "`python scripts/select_packages.py --write` after `make lock`"
        )
    return "".join(entry for name, entry in entries if name in names)


def read_list(path: Path) -> list[str]:
    """The names of a list; comments begin with ``#``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def find_names(image: str, locked: Collection[str]) -> list[str]:
    """What an image needs, by the metadata of what is installed here."""
    roots, alone = IMAGES[image]
    names = _close(roots) | set(alone)
    return sorted(name for name in names if name in locked)


def _close(roots: Iterable[str]) -> set[str]:
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = normalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed = _read_own(extra) if name == "int8qa" else _read_installed(name)
            waiting += [
                found
                for found in map(Requirement, needed)
                if found.marker is None
                or any(
                    found.marker.evaluate({"python_version": python, "extra": extra})
                    for python in PYTHONS
                )
            ]
    return {name for name, _ in seen}


def _read_installed(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # of another Python: no more known
        return []


def _read_own(extra: str) -> list[str]:
    """What pyproject.toml asks for; the installed metadata may be of yesterday."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    needed: list[str] = (
        project["optional-dependencies"][extra] if extra else project["dependencies"]
    )
    return needed


def main() -> int:
    """``select_packages.py LIST LOCK`` or ``select_packages.py --write``."""
    if sys.argv[1:] == ["--write"]:
        locked = {
            name
            for name, _ in iter_entries(
                (ROOT / "requirements.lock").read_text(encoding="utf-8")
            )
        }
        for image in IMAGES:
            text = "\n".join(
                ["# Written by scripts/select_packages.py.", *find_names(image, locked)]
            )
            (LISTS / f"{image}.txt").write_text(text + "\n", encoding="utf-8")
        return 0
    if len(sys.argv) != 3:
        print(main.__doc__, file=sys.stderr)
        return 64
    names, lock = map(Path, sys.argv[1:])
    print(select_entries(lock.read_text(encoding="utf-8"), read_list(names)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
