"""Every query of boards and rules, asked of a real Prometheus over real traffic."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import (
    Service,
    demo_repository,  # noqa: F401 - a fixture
    free_port,
    start_service,
)
from tests.observability.expressions import EXPRESSIONS, PROMETHEUS, RULES, Expression

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="needs prometheus: apt-get install prometheus",
    ),
]

TEXT = (
    "The lighthouse at Norrvik was finished in May 1887. Its keeper, Solveig Braten, "
    "logged every passing ship until 1952. "
)
QUESTIONS = ("Who was the keeper?", "When was the lighthouse finished?")
TRAFFIC_S = 6.0
PATIENCE_S = 60.0
"""For what has no data yet: a rule that reads a rule needs some evaluations."""

RIGHTLY_EMPTY = {
    r"nv_gpu_": "there is no GPU",
    r"ALERTS\b(?!.*vector\(0\))": "nothing is pending or firing",
    r"changes\(": "nothing has started or switched in the last minute",
}
"""Part of a query to why it is empty in a healthy system on a CPU. Alerts' own
expressions are all empty, which is what healthy means."""

HANGS_ON_THE_MACHINE = "Latency|Slower|nv_gpu_|process_start_time|ALERTS"
"""A busy machine is slow, another has a GPU, and the service has just started."""


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str
    process: subprocess.Popen[str]

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as reply:
            return json.loads(reply.read())["data"]

    def evaluate(self, promql: str) -> list[float]:
        """The values of an instant query, without NaN: a NaN shows nothing."""
        result = self.get("/api/v1/query", query=promql)["result"]
        values = [float(series["value"][1]) for series in result]
        return [value for value in values if not math.isnan(value)]


def write_configuration(directory: Path, gateway: int, triton: int) -> Path:
    """The shipped configuration, with the targets of this test and in a hurry."""
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    configuration["global"] = {
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "evaluation_interval": "1s",
    }
    ports = {"gateway": gateway, "triton": triton}
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (directory / "rules").mkdir()
    for path in RULES:
        rules = yaml.safe_load(path.read_text("utf-8"))
        for group in rules["groups"]:
            group.pop("interval", None)
        (directory / "rules" / path.name).write_text(yaml.safe_dump(rules), "utf-8")
    written = directory / "prometheus.yml"
    written.write_text(yaml.safe_dump(configuration), "utf-8")
    return written


def send_traffic(service: Service) -> None:
    """Single questions in every precision, pairs, a batch, and a faulty request."""
    limit = time.monotonic() + TRAFFIC_S
    number = 0
    while time.monotonic() < limit:
        question = QUESTIONS[number % len(QUESTIONS)]
        number += 1
        body = {"question": question, "context": TEXT * (1 + number % 3)}
        for precision in ("both", "int8", "fp16", "fp32"):
            assert (
                service.post("/v1/answer", {**body, "precision": precision})[0] == 200
            )
        assert service.post("/v1/answers", {"items": [body] * 3})[0] == 200
        assert service.post("/v1/answer", {"question": question})[0] == 422
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stack(demo_repository: Path) -> Iterator[tuple[Service, int]]:  # noqa: F811
    """`int8qa up`, ready, with Triton's metrics at a known port."""
    triton = free_port()
    running = start_service(
        free_port(),
        INT8QA_EMBEDDED__METRICS_PORT=str(triton),
        INT8QA_COMPARISON__FRACTION="1",
        INT8QA_COMPARISON__CAPACITY_SHARE="1",
    )
    try:
        running.wait_ready()
        yield running, triton
    finally:
        running.stop()


@pytest.fixture(scope="module")
def prometheus(
    stack: tuple[Service, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that has seen a few seconds of real traffic."""
    service, triton = stack
    directory = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    configuration = write_configuration(directory, service.port, triton)
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={configuration}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    running = Prometheus(f"http://127.0.0.1:{port}", process)
    try:
        wait_scraping(running, log)
        send_traffic(service)
        yield running
    finally:
        process.terminate()
        process.wait(20)


def wait_scraping(prometheus: Prometheus, log: Path) -> None:
    limit = time.monotonic() + PATIENCE_S
    while time.monotonic() < limit and prometheus.process.poll() is None:
        try:
            if prometheus.evaluate("sum(up)") == [2.0]:
                return
        except (OSError, urllib.error.HTTPError):
            pass
        time.sleep(0.2)
    pytest.fail("Prometheus does not scrape both targets:\n" + log.read_text()[-3000:])


def why_empty(expression: Expression) -> str | None:
    """The reason for which a query gives nothing here, None if it must not."""
    if expression.kind == "alert":
        return "nothing is wrong"
    for part, reason in RIGHTLY_EMPTY.items():
        if re.search(part, expression.text):
            return reason
    return None


def test_every_query_of_boards_and_rules_has_data(prometheus: Prometheus):
    """No panel and no rule is blank over real traffic, a few with a reason apart."""
    waiting = [e for e in EXPRESSIONS if why_empty(e) is None]
    assert len(waiting) > 80
    limit = time.monotonic() + PATIENCE_S
    while waiting and time.monotonic() < limit:
        waiting = [e for e in waiting if not prometheus.evaluate(e.promql)]
        time.sleep(0.5)
    assert not [f"{e.place}: {e.promql}" for e in waiting]


def test_a_healthy_system_raises_no_alert(prometheus: Prometheus):
    """What is said to be rightly empty is so, but for what hangs on the machine."""
    rightly_empty = [e for e in EXPRESSIONS if why_empty(e) is not None]
    assert rightly_empty
    assert not [
        e.place
        for e in rightly_empty
        if not re.search(HANGS_ON_THE_MACHINE, f"{e.place} {e.text}")
        and prometheus.evaluate(e.promql)
    ]


def test_prometheus_finds_no_fault_in_any_rule(prometheus: Prometheus):
    """Evaluated for real, no rule errs; many-to-many matches only show here."""
    groups = prometheus.get("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 50
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert not [rule["lastError"] for rule in rules if rule.get("lastError")]


def test_precisions_differ_where_they_should(prometheus: Prometheus):
    """Series of all served precisions are there, not one of them in three places."""
    found = prometheus.get(
        "/api/v1/query",
        query="job_precision:int8qa_request_seconds:p50_rate5m",
    )["result"]
    assert {series["metric"]["precision"] for series in found} == {
        "both",
        "fp16",
        "fp32",
        "int8",
    }
