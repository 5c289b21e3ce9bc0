"""Under which licences the packages of the container images are.

In: the lists of ``docker/packages`` and the metadata of what is installed here. Out:
``docs/licenses.md``. With ``--check`` nothing is written, and a stale list, or a
licence that nobody has looked at yet, is an error. Debian's packages in the base images
and what wheels hold beside their own code are not in it: a scan of the image finds
those.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "docker" / "packages"
DOCUMENT = ROOT / "docs" / "licenses.md"

REVIEWED = frozenset(
    {
        "Apache-2.0",
        "BSD",  # no word on which of the three
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CNRI-Python",
        "ISC",
        "MIT",
        "MPL-2.0",
        "PSF-2.0",
    }
)
"""Licences that allow to run and pass on the packages as they are. A new one is looked
at by a person, who adds it here or takes the package out."""

FAMILIES: Mapping[str, str] = {
    # Of "License ::" classifiers and free texts, in the order they are looked for.
    r"apache": "Apache-2.0",
    r"mozilla|mpl": "MPL-2.0",
    r"python software foundation|psf": "PSF-2.0",
    r"\bisc\b": "ISC",
    r"\bbsd\b": "BSD",
    r"\bmit\b": "MIT",
}


def find_license(name: str) -> str | None:
    """A package's licence as an SPDX expression where its metadata has one.

    None where it is not installed here, being of another Python or platform.
    """
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    expression = found.get("License-Expression")
    if expression:
        return str(expression)
    # Some put the whole text there; its first line is its name.
    text = (found.get("License") or "").strip().partition("\n")[0]
    if text in REVIEWED - {"BSD"}:
        return text
    classifiers = [
        entry.rpartition(" :: ")[2]
        for entry in found.get_all("Classifier") or []
        if entry.startswith("License :: ")
    ]
    known = sorted({_find_family(one) for one in classifiers or [text]} - {""})
    return " OR ".join(known) or "unknown"


def _find_family(text: str) -> str:
    for pattern, family in FAMILIES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return family
    return ""


def find_unreviewed(expression: str) -> set[str]:
    """Licences named in an SPDX expression that nobody has looked at."""
    named = set(re.findall(r"[A-Za-z0-9.+-]+", expression))
    return named - {"AND", "OR", "WITH"} - REVIEWED


def read_images() -> dict[str, set[str]]:
    """Each package's images."""
    images: dict[str, set[str]] = {}
    for path in sorted(LISTS.glob("*.txt")):
        if path.stem == "wheel":  # a stage of the build, in no image
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                images.setdefault(line, set()).add(path.stem)
    return images


def render(found: Mapping[str, str | None], images: Mapping[str, set[str]]) -> str:
    """The document."""
    lines = [
        "# Licences",
        "",
        "What `docker/packages` puts into the container images, under which licences,",
        "as the packages' metadata has it. Versions and hashes are in",
        "`requirements.lock` and in the bills of materials of `make sbom`. Written by",
        "`scripts/list_licenses.py`.",
        "",
        "| package | licence | images |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {license_} | {', '.join(sorted(images[name]))} |"
            for name, license_ in sorted(found.items())
            if license_ is not None
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the document, or hold it to what is installed with ``--check``."""
    images = read_images()
    found = {name: find_license(name) for name in images}
    bad = {
        name: ", ".join(sorted(unreviewed))
        for name, license_ in sorted(found.items())
        if license_ is not None and (unreviewed := find_unreviewed(license_))
    }
    for name, unreviewed in bad.items():
        print(f"{name}: licence {unreviewed} is not reviewed", file=sys.stderr)
    if bad:
        print("look at them; then see REVIEWED in scripts/list_licenses.py")
        return 1
    text = render(found, images)
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    absent = [name for name, license_ in found.items() if license_ is None]
    kept = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    # Another Python has a few packages less or more: what both know must agree.
    known = [line for line in text.splitlines() if line not in kept.splitlines()]
    listed = set(re.findall(r"(?m)^\| ([a-z0-9-]+) \| ", kept)) - {"package", "---"}
    gone = listed - set(images)
    if known or gone:
        print(
            "docs/licenses.md is stale: run scripts/list_licenses.py", file=sys.stderr
        )
        return 1
    if absent:
        print(f"licences: not installed here, so not checked: {', '.join(absent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
