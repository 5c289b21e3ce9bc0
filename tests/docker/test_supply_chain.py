"""Vulnerabilities, licences and bills of materials of what the images hold."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .compose_model import ROOT

DOCUMENT = ROOT / "docs" / "licenses.md"


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as it imports its neighbour."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("supply_chain")


@pytest.fixture
def licenses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("list_licenses")


def make_package(name: str, *vulnerabilities: str) -> dict[str, Any]:
    vulns = [{"id": one, "fix_versions": ["2.0"]} for one in vulnerabilities]
    return {"name": name, "version": "1.0", "vulns": vulns}


def test_vulnerable_package_is_a_finding(chain: ModuleType):
    """Its name, its version, the vulnerability and what mends it."""
    report = {
        "dependencies": [
            make_package("good"),
            make_package("bad", "PYSEC-1", "PYSEC-2"),
            {"name": "unknown", "skip_reason": "not found"},
        ]
    }
    assert chain.judge_report(report) == [
        "bad 1.0: PYSEC-1, mended in 2.0",
        "bad 1.0: PYSEC-2, mended in 2.0",
    ]


def test_audit_of_nothing_is_not_a_clean_audit(chain: ModuleType):
    """An index without a database is said to be one."""
    report = {"dependencies": [{"name": "a", "skip_reason": "not found"}]}
    with pytest.raises(chain.SkippedError, match="no database"):
        chain.judge_report(report)


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        (json.dumps({"dependencies": [make_package("a")]}), 0, "1 of 1"),
        (json.dumps({"dependencies": [make_package("a", "PYSEC-1")]}), 1, "PYSEC-1"),
        (None, 0, "audit: skipped: pip-audit did not end: no network"),
    ],
    ids=["clean", "vulnerable", "offline"],
)
def test_audit_fails_on_findings_alone(
    chain: ModuleType, monkeypatch, tmp_path: Path, capsys, output, status, said
):
    """1 where something is vulnerable; 0 and a line where nobody could be asked."""
    tool = tmp_path / "pip-audit"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"output = {output!r}\n"
        "target = sys.argv[sys.argv.index('--output') + 1]\n"
        "if output is None:\n"
        "    sys.exit('no network')\n"
        "pathlib.Path(target).write_text(output)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(chain, "find_tool", lambda name: tool)
    assert chain.main(["audit"]) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_bill_has_each_package_once_and_pinned(chain: ModuleType):
    """The lock knows several Pythons; an image has one."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for lists in chain.IMAGES.values():
        names = {
            name
            for one in lists
            for name in chain.read_list(chain.LISTS / f"{one}.txt")
        }
        entries = chain.select_installed(lock, names)
        found = re.findall(r"(?m)^([A-Za-z0-9._-]+)==", entries)
        assert len(found) == len(set(found))
        # Backports for old Pythons are in the lists and not in the image.
        assert names - set(found) <= {"exceptiongroup", "tomli"}
        assert entries.count("--hash=sha256:") >= len(found)
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", chain.find_pin("torch"))


@pytest.mark.parametrize(
    ("expression", "unreviewed"),
    [
        ("MIT", set()),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", set()),
        ("AGPL-3.0-only", {"AGPL-3.0-only"}),
        ("MIT AND GPL-2.0-or-later", {"GPL-2.0-or-later"}),
        ("unknown", {"unknown"}),
    ],
)
def test_licence_that_nobody_looked_at_is_named(
    licenses: ModuleType, expression: str, unreviewed: set[str]
):
    """Every name in an expression counts."""
    assert licenses.find_unreviewed(expression) == unreviewed


def test_list_of_licences_is_current():
    """What the document says is what is installed here."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "list_licenses.py", "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_licences_cover_every_package_of_the_images(licenses: ModuleType):
    """A row for each, backports for old Pythons apart."""
    rows = set(re.findall(r"(?m)^\| ([a-z0-9-]+) \|", DOCUMENT.read_text("utf-8")))
    missing = set(licenses.read_images()) - rows
    assert missing <= {"exceptiongroup", "tomli"}
