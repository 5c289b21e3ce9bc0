"""Every PromQL expression of the boards, the rules and the alerts, with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
BOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

VARIABLES = {
    # Grafana: at least four scrapes of 5 s.
    "$__rate_interval": "20s",
    "$__range": "1h",
    "$window": "5m",
}


@dataclass(frozen=True)
class Expression:
    """One query and where it stands."""

    place: str
    kind: str
    """panel, annotation, record or alert"""
    text: str
    """as written"""

    @property
    def promql(self) -> str:
        """The query with Grafana's variables filled in."""
        text = self.text
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        return text

    def __str__(self) -> str:
        return self.place


def load_board(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_rules() -> list[dict[str, Any]]:
    """All rules of all files."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def iter_expressions() -> Iterator[Expression]:
    for rule in load_rules():
        kind = "record" if "record" in rule else "alert"
        yield Expression(rule[kind], kind, rule["expr"])
    for path in BOARDS:
        board = load_board(path)
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                place = f"{path.stem}: {panel['title']} {target['refId']}"
                yield Expression(place, "panel", target["expr"])
        for annotation in board["annotations"]["list"]:
            place = f"{path.stem}: annotation {annotation['name']}"
            yield Expression(place, "annotation", annotation["expr"])


EXPRESSIONS = list(iter_expressions())
