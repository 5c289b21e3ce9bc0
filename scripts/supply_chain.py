"""What comes with the images: known vulnerabilities, and bills of materials.

In: ``requirements.lock``, ``docker/packages`` and pyproject.toml. Out: ``audit`` holds
every pinned package to PyPI's database of vulnerabilities, with pip-audit; ``sbom``
writes a CycloneDX file for each image into ``dist``, with cyclonedx-bom. The tools live
in ``.venv-audit``, apart from what they look at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from select_packages import LISTS, ROOT, iter_entries, read_list

LOCK = ROOT / "requirements.lock"
TOOLS = ("pip-audit>=2.9,<3", "cyclonedx-bom>=7,<8")
ENVIRONMENT = ROOT / ".venv-audit"
DIST = ROOT / "dist"

IMAGES = {
    "gateway": ("gateway",),
    "triton": ("gateway", "triton"),  # one stage is built upon the other
    "builder": ("builder",),
}
"""Each image's lists of packages."""


class SkippedError(Exception):
    """The network, or what is behind it, is not there."""


def find_tool(name: str) -> Path:
    """A tool's executable, installed if need be.

    Raises:
        SkippedError: it cannot be installed.
    """
    executable = ENVIRONMENT / "bin" / name
    if not executable.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet"]
        done = subprocess.run([*pip, *TOOLS], check=False, capture_output=True)
        if done.returncode != 0:
            raise SkippedError(f"{name} cannot be installed here; is there a network?")
    return executable


def judge_report(report: dict[str, Any]) -> list[str]:
    """A line for each known vulnerability.

    Raises:
        SkippedError: the database knows none of the packages.
    """
    packages = report["dependencies"]
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        raise SkippedError(
            f"the package index has no database of vulnerabilities: none of "
            f"{len(packages)} packages found"
        )
    print(f"audit: {len(asked)} of {len(packages)} packages held to the database")
    for package in packages:
        if "vulns" not in package:
            print(f"audit: {package['name']} not held: {package['skip_reason']}")
    return [
        f"{package['name']} {package['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for package in asked
        for found in package["vulns"]
    ]


def audit_lock(lock: Path) -> int:
    """Exit status: 1 if a package has a known vulnerability, 0 if none or skipped."""
    tool = find_tool("pip-audit")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "report.json"
        done = subprocess.run(
            [tool, "--requirement", lock, "--disable-pip", "--require-hashes",
             "--progress-spinner", "off", "--format", "json", "--output", output],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if not output.exists() or not output.stat().st_size:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SkippedError(f"pip-audit did not end: {last}")
        findings = judge_report(json.loads(output.read_text(encoding="utf-8")))
    for finding in findings:
        print(f"audit: {finding}", file=sys.stderr)
    return 1 if findings else 0


def write_sboms() -> int:
    """One file for each image, the same bytes for the same lock."""
    tool = find_tool("cyclonedx-py")
    lock = LOCK.read_text(encoding="utf-8")
    DIST.mkdir(exist_ok=True)
    for image, lists in IMAGES.items():
        names = {name for one in lists for name in read_list(LISTS / f"{one}.txt")}
        requirements = select_installed(lock, names)
        if image == "builder":
            requirements += f"{find_pin('torch')}\n"
        target = DIST / f"sbom-{image}.cdx.json"
        subprocess.run(
            [tool, "requirements", "-", "--output-reproducible", "--of", "JSON",
             "--output-file", target],
            input=requirements, text=True, check=True,
            env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},
        )  # fmt: skip
        found = json.loads(target.read_text(encoding="utf-8"))["components"]
        print(f"{target.relative_to(ROOT)}: {len(found)} packages")
    return 0


def select_installed(lock: str, names: Collection[str]) -> str:
    """The lock's entries of these names for the images' own Python."""
    from packaging.markers import Marker

    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    match = re.search(r"BASE_IMAGE=python:(\d+\.\d+)(\.\d+)", dockerfile)
    assert match is not None
    machine = {
        "python_version": match[1],
        "python_full_version": match[1] + match[2],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    chosen = []
    for name, entry in iter_entries(lock):
        marker = re.match(r"[^;\n]*;([^\n]*?)\\?\n", entry)
        applies = marker is None or Marker(marker[1].strip()).evaluate(machine)
        if name in names and applies:
            chosen.append(entry)
    return "".join(chosen)


def find_pin(name: str) -> str:
    """A requirement that is pinned in pyproject.toml and not in the lock."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(rf'"({name}==[^"]+)"', text)
    assert match is not None
    return match[1]


def main(arguments: Sequence[str]) -> int:
    """``supply_chain.py audit [LOCK]`` or ``supply_chain.py sbom``."""
    try:
        if arguments[:1] == ["audit"] and len(arguments) <= 2:
            return audit_lock(Path(arguments[1]) if len(arguments) == 2 else LOCK)
        if list(arguments) == ["sbom"]:
            return write_sboms()
    except SkippedError as reason:
        print(f"{arguments[0]}: skipped: {reason}")
        # An audit that did not happen finds nothing; a file not written is missed.
        return 0 if arguments[0] == "audit" else 1
    print(main.__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
