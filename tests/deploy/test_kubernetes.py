"""What the Kubernetes objects mean: they fit each other, the settings, and Compose."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from int8qa.errors import ConfigurationError
from int8qa.settings import Settings, iter_setting_names, load_settings
from tests.deploy.rendering import (
    ROOT_OF_BUILDS,
    Manifest,
    expand,
    find,
    get_main,
    iter_containers,
    list_pods,
    load_golden,
    matches,
    read_compose,
    read_environment,
    read_pod,
    read_pod_labels,
)
from tests.docker.test_compose import REPOSITORY, dockerfile_stages

BUILD = "b1"
MADE_BY_PEOPLE = {("Secret", "int8qa-object-storage")}


def test_what_is_referred_to_exists(documents: list[Manifest]) -> None:
    """Maps, secrets, volume claims, and what is scaled."""
    there = {(d["kind"], d["metadata"]["name"]) for d in documents} | MADE_BY_PEOPLE
    wanted = set()
    for _, pod in list_pods(documents).values():
        for container in iter_containers(pod):
            for source in container.get("envFrom", []):
                for key, kind in (
                    ("configMapRef", "ConfigMap"),
                    ("secretRef", "Secret"),
                ):
                    if key in source:
                        wanted.add((kind, source[key]["name"]))
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {m["name"] for m in container["volumeMounts"]} <= volumes
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim"}
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                wanted.add(("PersistentVolumeClaim", claim))
    assert wanted <= there
    for document in documents:
        if document["kind"] == "ScaledObject":
            target = document["spec"]["scaleTargetRef"]["name"]
            service = ("InferenceService", target.removesuffix("-predictor"))
            assert ("Deployment", target) in there or service in there


def test_selectors_take_their_own_pods_and_no_others(documents: list[Manifest]) -> None:
    """A selector that takes nothing is as valid as one that takes everything."""
    pods = list_pods(documents)
    assert set(pods) == {"builder", "triton", "gateway"}
    for document in documents:
        selectors = []
        if document["kind"] in {"Service", "PodDisruptionBudget", "Deployment"}:
            component = document["metadata"]["name"].split("-")[1]
            selectors.append(document["spec"]["selector"])
        if pod := read_pod(document):
            component = read_pod_labels(document)["app.kubernetes.io/component"]
            spread = pod.get("topologySpreadConstraints", [])
            selectors += [constraint["labelSelector"] for constraint in spread]
        for selector in selectors:
            taken = {n for n, (labels, _) in pods.items() if matches(selector, labels)}
            assert taken == {component}, document["metadata"]["name"]


def test_services_lead_to_ports_that_are_listened_on(
    documents: list[Manifest], overlay: str
) -> None:
    """By name in the container; what the processes bind comes from settings and flags."""
    pods = list_pods(documents)
    ports = {
        name: {p["name"]: p["containerPort"] for p in get_main(pod).get("ports", [])}
        for name, (_, pod) in pods.items()
    }
    labels, pod = pods["gateway"]
    environment = read_environment(get_main(pod), labels)
    assert ports["gateway"] == {
        "http": int(environment["INT8QA_PORT"]),
        "admin": int(environment["INT8QA_ADMIN__PORT"]),
    }
    assert ports["triton"] == {"grpc": 8001, "metrics": 8002}
    if overlay == "cpu":
        assert "EXPOSE 8001 8002" in dockerfile_stages()["triton"]
    else:
        flags = get_main(pods["triton"][1])["command"]
        assert {"--grpc-port=8001", "--metrics-port=8002"} <= set(flags)
    for service in (d for d in documents if d["kind"] == "Service"):
        component = service["metadata"]["labels"]["app.kubernetes.io/component"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports[component]


def test_gateways_find_the_tritons_of_their_build(documents: list[Manifest]) -> None:
    """By the name of a headless Service, which selects that build alone."""
    pods = list_pods(documents)
    labels, pod = pods["gateway"]
    environment = read_environment(get_main(pod), labels)
    scheme, _, rest = environment["INT8QA_TRITON__URL"].partition(":///")
    name, _, port = rest.partition(":")
    assert scheme == "dns"
    service = find(documents, "Service", name)
    assert service["metadata"]["name"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert int(port) in {p["port"] for p in service["spec"]["ports"]}
    assert service["spec"]["selector"]["int8qa/build"] == labels["int8qa/build"]


def test_one_name_says_which_build_all_of_them_use(documents: list[Manifest]) -> None:
    """And where it lies: its own directory below the mount, never the mount itself."""
    for labels, pod in list_pods(documents).values():
        assert labels["int8qa/build"] == BUILD
        for container in iter_containers(pod):
            environment = read_environment(container, labels)
            words = [expand(w, environment) for w in container.get("command", [])]
            text = " ".join([*words, *environment.values()])
            assert "$(BUILD)" not in text
            if ROOT_OF_BUILDS in text:
                assert f"{ROOT_OF_BUILDS}/{BUILD}" in text


def test_variables_are_settings_with_good_values(
    documents: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very settings that a process would refuse to start with otherwise."""
    known = {name for name, _, _ in iter_setting_names()}
    for component in ("builder", "triton", "gateway"):
        labels, pod = list_pods(documents)[component]
        with monkeypatch.context() as patch:
            for name in known:
                patch.delenv(name, raising=False)
            ours = {
                name: value
                for name, value in read_environment(get_main(pod), labels).items()
                if name.startswith("INT8QA_")
            }
            assert set(ours) <= known
            for name, value in ours.items():
                patch.setenv(name, value)
            settings = load_settings()
        if component == "gateway":
            check_gateway(settings, pod)
        elif ours:
            assert str(settings.model_repository) == f"{ROOT_OF_BUILDS}/{BUILD}"


def check_gateway(settings: Settings, pod: Manifest) -> None:
    """It listens beyond loopback, and ends within its time."""
    assert settings.host == settings.admin.host == "0.0.0.0"
    pause = float(get_main(pod)["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = pause + settings.limits.shutdown_timeout_s
    assert needed < pod["terminationGracePeriodSeconds"]


def test_services_do_not_become_settings(documents: list[Manifest]) -> None:
    """Kubernetes names variables after Services, and ours begin like our settings."""
    with pytest.raises(ConfigurationError, match="INT8QA_GATEWAY_SERVICE_HOST"):
        load_settings({"INT8QA_GATEWAY_SERVICE_HOST": "10.0.0.1"})
    for _, pod in list_pods(documents).values():
        assert pod["enableServiceLinks"] is False


def test_images_are_those_of_compose(documents: list[Manifest], overlay: str) -> None:
    """In the same versions; all others are pinned too."""
    compose = read_compose(overlay)
    theirs = {compose[name]["image"] for name in ("builder", "triton", "gateway")}
    ours = set()
    for component, (_, pod) in list_pods(documents).items():
        assert get_main(pod)["image"] == compose[component]["image"]
        ours |= {container["image"] for container in iter_containers(pod)}
    assert {image.partition(":")[0] for image in ours - theirs} <= {"rclone/rclone"}
    assert all(image.rpartition(":")[2][0].isdigit() for image in ours)


def test_programs_and_flags_are_those_of_compose(
    documents: list[Manifest], overlay: str
) -> None:
    """But for the build's directory. Without a command the image's own runs in both."""
    compose = read_compose(overlay)
    pods = list_pods(documents)
    assert (
        get_main(pods["builder"][1])["command"] == compose["builder"]["command"].split()
    )
    assert "command" not in compose["gateway"]
    assert "command" not in get_main(pods["gateway"][1])
    ours = get_main(pods["triton"][1]).get("command")
    if overlay == "cpu":
        assert ours is None
        assert "command" not in compose["triton"]
        return
    place = {
        "gpu-object-storage": "s3://$(BUCKET)/$(BUILD)",
    }.get(overlay, f"{ROOT_OF_BUILDS}/$(BUILD)")
    theirs = [w.replace(REPOSITORY, place) for w in run_without_a_key(compose)]
    assert ours == theirs


def run_without_a_key(compose: dict[str, Any]) -> list[str]:
    """The command line that Compose's shell comes to, where nobody may load models."""
    shell, option, script, *arguments = compose["triton"]["command"]
    shown = script.replace("exec tritonserver", r"printf '%s\n' tritonserver")
    assert shown != script
    finished = subprocess.run(
        [shell, option, shown, *arguments],
        env={"CONTROL_KEY": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout.splitlines()


def test_triton_is_asked_for_its_health_as_in_compose(
    documents: list[Manifest], overlay: str
) -> None:
    """Ready is the same question; alive is asked of the same address."""
    triton = get_main(list_pods(documents)["triton"][1])
    ready = triton["readinessProbe"]["exec"]["command"]
    if overlay == "cpu":
        stage = dockerfile_stages()["triton"]
        (line,) = (x for x in stage.splitlines() if x.strip().startswith('CMD ["check'))
        theirs = yaml.safe_load(line.strip().removeprefix("CMD "))
    else:
        theirs = read_compose(overlay)["triton"]["healthcheck"]["test"][1:]
    assert ready == theirs == triton["startupProbe"]["exec"]["command"]
    alive = triton["livenessProbe"]["exec"]["command"]
    assert alive == [word.replace("/ready", "/live") for word in ready]


def test_a_lost_triton_takes_no_gateway_out_of_service(
    documents: list[Manifest],
) -> None:
    """Only a new gateway waits for one; all would leave together otherwise."""
    gateway = get_main(list_pods(documents)["gateway"][1])
    paths = {
        kind: gateway[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/ready", "readiness": "/live", "liveness": "/live"}


def test_a_restart_inside_the_pod_comes_before_one_of_the_pod(
    documents: list[Manifest],
) -> None:
    """The launcher's longest delay, and the start after it, end before liveness acts."""
    probe = get_main(list_pods(documents)["triton"][1])["livenessProbe"]
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience >= 4 * Settings().embedded.max_restart_delay_s


def test_a_pod_waits_for_its_build(tmp_path: Path) -> None:
    """The waiting script, run: it ends once the contract is there and not before."""
    labels, pod = list_pods(load_golden("cpu"))["gateway"]
    (waiting,) = pod["initContainers"]
    environment = read_environment(waiting, labels)
    command = [
        expand(word, environment)
        .replace(ROOT_OF_BUILDS, str(tmp_path))
        .replace("sleep 5", "exit 7")
        for word in waiting["command"]
    ]
    assert subprocess.run(command, check=False).returncode == 7
    (tmp_path / BUILD).mkdir()
    (tmp_path / BUILD / "contract.json").touch()
    assert subprocess.run(command, check=False).returncode == 0
