"""Every metric, label and label value that a query names is one that is exported."""

from __future__ import annotations

import re
from pathlib import Path

import promql_parser as promql
import pytest
from prometheus_client import Histogram

from int8qa.contract import Precision
from int8qa.gateway.app import create_app
from int8qa.gateway.problems import INTERNAL, PROBLEMS, REJECTION_REASONS
from int8qa.gateway.telemetry import (
    NO_PRECISION,
    OTHER_ROUTE,
    SECONDS_BUCKETS,
    SKIP_REASONS,
    STAGES,
    Telemetry,
)
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import (
    TOKENIZER_JSON,
    FakeEngine,
    build_contract,
    build_settings,
)
from tests.observability.expressions import EXPRESSIONS, Expression, load_rules

SCRAPE_LABELS = {"job", "instance"}
TRITON_METRICS = Path(__file__).with_name("triton_metrics.txt")
MODELS = {precision.model_name for precision in Precision}
TOKENIZER = ReaderTokenizer.from_file(TOKENIZER_JSON)
APP = create_app(
    build_settings(), build_contract(TOKENIZER), TOKENIZER, FakeEngine(TOKENIZER)
)

LABEL_VALUES: dict[str, set[str]] = {
    "job": {"gateway", "triton"},
    "precision": {*map(str, Precision), "both", NO_PRECISION},
    "stage": set(STAGES),
    "outcome": {
        "ok",
        "cancelled",
        INTERNAL.outcome,
        *(kind.outcome for kind in PROBLEMS.values()),
    },
    "reason": {*REJECTION_REASONS, *SKIP_REASONS},
    "agreement": {"same", "different", "error"},
    "to": {"int8", "fp16"},
    "route": {OTHER_ROUTE, *APP.state.plain_paths, *APP.openapi()["paths"]},
    "model": MODELS,
    "le": {str(bound) for bound in SECONDS_BUCKETS},
    "alertstate": {"pending", "firing"},
}


def build_vocabulary() -> dict[str, set[str]]:
    """Name of every series to its labels."""
    registry = Telemetry(build_contract(TOKENIZER)).registry
    known: dict[str, set[str]] = {}
    for name, collector in registry._names_to_collectors.items():
        labels = set(getattr(collector, "_labelnames", ()))
        if isinstance(collector, Histogram) and name.endswith("_bucket"):
            labels.add("le")
        known[name] = labels
    for family in registry.collect():  # the process collector names nothing before
        for sample in family.samples:
            known.setdefault(sample.name, set(sample.labels))
    for line in TRITON_METRICS.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            name, *labels_of_triton = line.split()
            known[name] = set(labels_of_triton)
    for rule in load_rules():
        if "record" in rule:
            levels = rule["record"].partition(":")[0]
            known[rule["record"]] = {
                label for label in LABEL_VALUES if label in levels.split("_")
            }
    known["up"] = set()
    known["ALERTS"] = {"alertname", "alertstate", "severity", "precision"}
    return {name: labels | SCRAPE_LABELS for name, labels in known.items()}


VOCABULARY = build_vocabulary()
ALL_LABELS = set().union(*VOCABULARY.values())


def find_selectors(text: str) -> list[promql.VectorSelector]:
    """Every selector of an expression; the walk enters ranges too."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        return True

    promql.walk(promql.parse(text), visit)
    return found


def find_faults(text: str) -> list[str]:
    """What an expression asks for that nobody exports."""
    faults = []
    for selector in find_selectors(text):
        if selector.name not in VOCABULARY:
            faults.append(f"no metric {selector.name}")
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name not in VOCABULARY[selector.name]:
                faults.append(f"{selector.name} has no label {matcher.name}")
            faults += [
                f"{matcher.name} is never {pattern}"
                for pattern in matcher.value.split("|")
                if matcher.name in LABEL_VALUES
                and not any(
                    re.fullmatch(pattern, v) for v in LABEL_VALUES[matcher.name]
                )
            ]
    for clause in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", text):
        labels = {label.strip() for label in clause.split(",") if label.strip()}
        faults += [f"nothing has a label {label}" for label in labels - ALL_LABELS]
    return faults


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_every_query_names_what_is_exported(expression: Expression):
    """A query with a misspelt name is empty for ever, and nobody is told."""
    assert find_selectors(expression.promql) or "vector(" in expression.promql
    assert find_faults(expression.promql) == []


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_no_variable_is_left(expression: Expression):
    """Grafana's variables are known, and used on boards alone."""
    assert "$" not in expression.promql
    if expression.kind in ("record", "alert"):
        assert expression.text == expression.promql


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rate(int8qa_requests_seconds_count[5m])", "no metric"),
        ('rate(int8qa_stage_seconds_count{route="/"}[5m])', "has no label route"),
        ('rate(int8qa_stage_seconds_count{stage="decoding"}[5m])', "is never decoding"),
        ('int8qa_rejected_total{reason=~"overloaded|ful"}', "is never ful"),
        ('int8qa_request_seconds_bucket{le="1"}', "is never 1"),
        ("sum by (modell) (up)", "nothing has a label modell"),
    ],
)
def test_a_misspelt_name_is_found(text: str, fault: str):
    """The check itself can fail."""
    (found,) = find_faults(text)
    assert fault in found
