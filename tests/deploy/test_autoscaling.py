"""How many of each there are: the autoscalers' queries, run by Prometheus' own tool."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import (
    ROOT,
    Manifest,
    find,
    get_main,
    list_pods,
    load_golden,
    read_environment,
)
from tests.observability.test_names import find_faults

SCRAPE = "5s"
LABELS = 'namespace="int8qa",job="triton"'


def list_triggers(documents: list[Manifest], name: str) -> dict[str, Any]:
    """Name to what KEDA is told of it."""
    triggers = find(documents, "ScaledObject", name)["spec"]["triggers"]
    return {trigger["name"]: trigger["metadata"] for trigger in triggers}


def count_pods(trigger: Any, value: float) -> int:
    """What the autoscaler asks for. Source: Kubernetes' algorithm for AverageValue."""
    return math.ceil(round(value / float(trigger["threshold"]), 6))


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """Check what a query gives after four minutes of series; None: nothing."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: apt-get install prometheus")

    def check(query: str, series: dict[str, float | None], value: float | None) -> None:
        """``series``: name to its gain in each scrape; None is a level of 1."""
        test = {
            "interval": SCRAPE,
            "input_series": [
                {"series": name, "values": "1x60" if gain is None else f"0+{gain}x60"}
                for name, gain in series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": query,
                    "eval_time": "4m",
                    "exp_samples": [] if value is None else [{"value": value}],
                }
            ],
        }
        path = tmp_path / "test.yml"
        path.write_text(yaml.safe_dump({"tests": [test]}), encoding="utf-8")
        finished = subprocess.run(
            ["promtool", "test", "rules", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr

    return check


def build_series(
    *, wait_s: float = 0.0, triton_wait_s: float = 0.0, compute_s: float, batches: float
) -> dict[str, float | None]:
    """Two Tritons with 10 requests a second each, in so many batches a second."""
    series: dict[str, float | None] = {}
    gateway = 'namespace="int8qa",job="gateway",instance="g",stage="queue"'
    series[f"int8qa_stage_seconds_sum{{{gateway}}}"] = 5 * 20 * wait_s
    series[f"int8qa_stage_seconds_count{{{gateway}}}"] = 5 * 20
    for instance in ("a", "b"):
        here = f'{LABELS},instance="{instance}"'
        series[f"up{{{here}}}"] = None
        model = f'{here},model="qa_int8",version="1"'
        for name, rate in {
            "nv_inference_request_success": 10.0,
            "nv_inference_exec_count": batches,
            "nv_inference_queue_duration_us": 10 * triton_wait_s * 1e6,
            "nv_inference_compute_infer_duration_us": 10 * compute_s * 1e6,
        }.items():
            series[f"{name}{{{model}}}"] = 5 * rate
    return series


@pytest.mark.parametrize(("overlay", "pods"), [("cpu", 1), ("gpu", 2)])
def test_a_merged_batch_counts_once(ask: Any, overlay: str, pods: int) -> None:
    """Triton adds a batch's time for each of its requests; the engine worked once.

    One instance at work is all that a Triton has on a GPU, and half on CPUs.
    """
    trigger = list_triggers(load_golden(overlay), "int8qa-triton")["busy-engines"]
    series = build_series(compute_s=0.1, batches=5)
    ask(trigger["query"], series, 1.0)
    assert count_pods(trigger, 1.0) == pods


def test_waiting_counts_wherever_it_happens(ask: Any) -> None:
    """Half at the gateway, half in Triton, twice the threshold: twice the Tritons."""
    trigger = list_triggers(load_golden("cpu"), "int8qa-triton")["queue-wait"]
    wait_s = float(trigger["threshold"])
    series = build_series(wait_s=wait_s, triton_wait_s=wait_s, compute_s=0, batches=10)
    ask(trigger["query"], series, 4 * wait_s)
    assert count_pods(trigger, 4 * wait_s) == 4


@pytest.mark.parametrize("name", ["busy-engines", "queue-wait"])
def test_without_traffic_the_answer_is_zero_and_not_nothing(
    ask: Any, name: str
) -> None:
    """Rates of nothing are divided by nothing; NaN would stop the autoscaler."""
    trigger = list_triggers(load_golden("cpu"), "int8qa-triton")[name]
    quiet = dict.fromkeys(build_series(compute_s=0, batches=0), 0.0)
    series = {name: None if name.startswith("up") else 0.0 for name in quiet}
    ask(trigger["query"], series, 0.0)


@pytest.mark.parametrize("name", ["busy-engines", "queue-wait"])
def test_without_targets_there_is_no_answer(ask: Any, name: str) -> None:
    """So KEDA counts it as a failure, and falls back instead of scaling down."""
    trigger = list_triggers(load_golden("cpu"), "int8qa-triton")[name]
    ask(trigger["query"], {'up{job="triton",namespace="another"}': None}, None)
    assert trigger["ignoreNullValues"] == "false"


def test_gateways_are_counted_by_their_cores(ask: Any) -> None:
    """Two at 60 % of theirs stay two; a third comes at 75 %."""
    trigger = list_triggers(load_golden("cpu"), "int8qa-gateway")["busy-cores"]
    name = 'process_cpu_seconds_total{namespace="int8qa",job="gateway",instance="%s"}'
    ask(trigger["query"], {name % "a": 3.0, name % "b": 3.0}, 1.2)
    assert count_pods(trigger, 1.2) == 2
    assert count_pods(trigger, 1.5) == 3


def test_queries_name_what_is_exported(documents: list[Manifest]) -> None:
    """Within this namespace, whose label Prometheus' operator adds."""
    for name in ("int8qa-triton", "int8qa-gateway"):
        for trigger in list_triggers(documents, name).values():
            query = trigger["query"]
            assert query.count("{") == query.count('namespace="int8qa"')
            assert find_faults(re.sub(r'namespace="int8qa",?', "", query)) == []


def test_falling_back_is_allowed_and_never_scales_down(
    documents: list[Manifest],
) -> None:
    """KEDA falls back on averages only; the figure lies within the bounds."""
    for name in ("int8qa-triton", "int8qa-gateway"):
        spec = find(documents, "ScaledObject", name)["spec"]
        assert {t["metricType"] for t in spec["triggers"]} == {"AverageValue"}
        assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
        replicas = spec["fallback"]["replicas"]
        assert spec["minReplicaCount"] <= replicas <= spec["maxReplicaCount"]


def test_one_pod_may_always_be_taken_away(documents: list[Manifest]) -> None:
    """A node can be drained, and something is left that answers."""
    for name in ("int8qa-triton", "int8qa-gateway"):
        allowed = find(documents, "PodDisruptionBudget", name)["spec"]["maxUnavailable"]
        fewest = find(documents, "ScaledObject", name)["spec"]["minReplicaCount"]
        assert 1 <= allowed < fewest


def test_the_fewest_gateways_can_keep_the_most_tritons_busy(
    documents: list[Manifest],
) -> None:
    """Two batches each, or the autoscaler would add Tritons that get no work."""
    labels, pod = list_pods(documents)["gateway"]
    environment = read_environment(get_main(pod), labels)
    in_flight = int(environment["INT8QA_BATCHER__MAX_IN_FLIGHT"])
    gateways = find(documents, "ScaledObject", "int8qa-gateway")["spec"]
    tritons = find(documents, "ScaledObject", "int8qa-triton")["spec"]
    assert in_flight * gateways["minReplicaCount"] >= 2 * tritons["maxReplicaCount"]


def test_replicas_are_left_to_the_autoscaler(documents: list[Manifest]) -> None:
    """A figure in the Deployment would undo its work at every apply."""
    deployments = [d for d in documents if d["kind"] == "Deployment"]
    assert deployments
    assert all("replicas" not in d["spec"] for d in deployments)


def test_monitors_give_the_jobs_that_rules_and_boards_name() -> None:
    """Each takes one Service of every overlay, at a port it has, as often as Compose."""
    monitoring = load_golden("monitoring")
    text = (ROOT / "docker/prometheus/prometheus.yml").read_text(encoding="utf-8")
    compose = yaml.safe_load(text)
    jobs = {job["job_name"] for job in compose["scrape_configs"]}
    for overlay in ("cpu", "gpu", "kserve"):
        services = [d for d in load_golden(overlay) if d["kind"] == "Service"]
        found = set()
        for monitor in (d for d in monitoring if d["kind"] == "ServiceMonitor"):
            spec = monitor["spec"]
            wanted = spec["selector"]["matchLabels"].items()
            (service,) = (
                s for s in services if wanted <= s["metadata"]["labels"].items()
            )
            assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
            (endpoint,) = spec["endpoints"]
            assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
            assert endpoint["interval"] == compose["global"]["scrape_interval"]
            assert endpoint["scrapeTimeout"] == compose["global"]["scrape_timeout"]
            found.add(service["metadata"]["labels"][spec["jobLabel"]])
        assert found == jobs


def test_boards_find_their_data_source() -> None:
    """As in Compose but for its name, address, and its claim to be the default."""
    (text,) = find(load_golden("monitoring"), "ConfigMap", "int8qa-datasource")[
        "data"
    ].values()
    (ours,) = yaml.safe_load(text)["datasources"]
    path = ROOT / "docker/grafana/provisioning/datasources/prometheus.yml"
    (theirs,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    for source in (ours, theirs):
        for key in ("name", "url", "isDefault"):
            source.pop(key, None)
    assert ours == theirs
