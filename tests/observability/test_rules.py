"""Rules and alerts: valid, each with a test of its own, each with a runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.expressions import (
    PROMETHEUS,
    ROOT,
    RULE_TESTS,
    RULES,
    load_rules,
)

ALERTS = {rule["alert"]: rule for rule in load_rules() if "alert" in rule}
RECORDS = [rule["record"] for rule in load_rules() if "record" in rule]
LEVEL_METRIC_OPERATION = re.compile(r"[a-z_]+:[a-z][a-z0-9_]*:[a-z0-9_]+")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="needs promtool: apt-get install prometheus",
)


def run_promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_configuration_is_valid(name: str):
    """Prometheus itself says so, rules included."""
    run_promtool("check", "config", PROMETHEUS / name)


@needs_promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_tests_say(path: Path):
    """Each recording rule gives its value, each alert fires and stays quiet."""
    run_promtool("test", "rules", path)


def iter_rule_tests() -> list[Any]:
    return [
        test
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
    ]


def test_every_recording_rule_is_tested():
    """A rule without an expected value could say anything."""
    tested = " ".join(
        case["expr"]
        for test in iter_rule_tests()
        for case in test.get("promql_expr_test", ())
        if case["exp_samples"]
    )
    missing = [name for name in RECORDS if not re.search(rf"{name}\b", tested)]
    assert not missing


def test_every_alert_is_tested_firing_and_quiet():
    """An alert that cannot fire and one that always does are both useless."""
    fired, quiet = set(), set()
    for test in iter_rule_tests():
        for case in test.get("alert_rule_test", ()):
            (fired if case["exp_alerts"] else quiet).add(case["alertname"])
    assert fired == set(ALERTS)
    assert quiet == set(ALERTS)


def test_recording_rules_are_named_level_metric_operation():
    """The names say what was summed away and what was computed."""
    assert [n for n in RECORDS if not LEVEL_METRIC_OPERATION.fullmatch(n)] == []
    assert len(RECORDS) == len(set(RECORDS))


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_and_leads_to_its_runbook(name: str):
    """Summary, description, severity, and an anchor that docs/operations.md has."""
    alert = ALERTS[name]
    notes = alert["annotations"]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    page, _, anchor = notes["runbook"].partition("#")
    assert anchor == name.lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert anchor in {heading.strip("` ").lower() for heading in headings}


def test_the_two_configurations_differ_in_addresses_alone():
    """local.yml scrapes this machine, and is otherwise prometheus.yml."""
    first, second = (
        yaml.safe_load((PROMETHEUS / name).read_text("utf-8"))
        for name in ("prometheus.yml", "local.yml")
    )
    for configuration in (first, second):
        for job in configuration["scrape_configs"]:
            (static,) = job.pop("static_configs")
            assert len(static["targets"]) == 1
    assert first == second
    assert [job["job_name"] for job in first["scrape_configs"]] == ["gateway", "triton"]
    assert first["rule_files"] == ["rules/*.yml"]
    assert len(RULES) > 1
