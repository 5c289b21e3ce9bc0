"""Where, when, with what and by which command something was measured.

In: this machine and installation. Out: a JSON-ready record, and lines to print.
Measures nothing; says how busy the machine was, since that spoils figures most.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from int8qa import __version__
from int8qa.build.cpu import cpu_features

BUSY_SHARE = 0.25
"""Load per core before a test from which on figures are to be doubted."""


def describe_run(packages: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, command and start of a measurement.

    Args:
        packages: distributions whose versions matter; left out where absent.
    """
    cores = list_cores()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "processor": _read_processor(),
            "cores": len(cores),
            "core_numbers": cores,
            "memory_gb": _read_memory_gb(),
            "features": cpu_features(),
            "system": f"{platform.system()} {platform.release()}",
            "load_before": _read_load(),
        },
        "versions": {"int8qa": __version__, "python": platform.python_version()}
        | {name: version for name in packages if (version := _find_version(name))},
    }


def list_facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The record in words: name and text."""
    machine = provenance["machine"]
    features = f" ({' '.join(machine['features'])})" if machine["features"] else ""
    memory = f", {machine['memory_gb']} GB" if machine["memory_gb"] else ""
    versions = provenance["versions"].items()
    processor = machine["processor"] + features
    return [
        ("Machine", f"{processor}, {machine['cores']} cores{memory}"),
        ("System", machine["system"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions)),
        ("Started", provenance["started_at"]),
        ("Command", provenance["command"]),
    ]


def drop_command(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """As a page has them: its frame shows the command in its own way."""
    return [fact for fact in facts if fact[0] != "Command"]


def remark_load(provenance: dict[str, Any]) -> list[str]:
    """A remark if others used the machine when the measurement began."""
    load, cores = (provenance["machine"][name] for name in ("load_before", "cores"))
    if load is None or load <= BUSY_SHARE * cores:
        return []
    remark = f"the machine was busy before the first test: load {load:.1f} on {cores} "
    return [remark + "cores"]


def list_cores() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return list(range(os.cpu_count() or 1))


def _read_processor() -> str:
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read_memory_gb() -> int | None:
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20)
    return None


def _read_load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
