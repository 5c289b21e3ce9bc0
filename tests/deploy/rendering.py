"""What deploy/kubernetes gives: as kubectl renders it, and as it is kept here.

`python -m tests.deploy.rendering` writes tests/deploy/golden anew. Those files are what
most tests look at, so that they hold where there is no kubectl too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.docker.compose_model import load_services

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
GOLDEN = Path(__file__).resolve().parent / "golden"
OVERLAYS = ("cpu", "gpu", "gpu-object-storage", "kserve")
MONITORING = "monitoring"
TARGETS = (*OVERLAYS, MONITORING)
ROOT_OF_BUILDS = "/var/lib/int8qa"
"""Where pods see the volume that holds one directory for each build."""
_LONG_CHARS = 5_000

Manifest = dict[str, Any]


def find_kubectl() -> str | None:
    """A kubectl that renders these files: its kustomize must be 5 or newer."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    told = subprocess.run(
        [kubectl, "version", "--client", "--output=json"],
        capture_output=True,
        text=True,
        check=False,
    )
    version = json.loads(told.stdout or "{}").get("kustomizeVersion", "")
    return kubectl if version.startswith("v5.") else None


def render(target: str, manifests: Path = MANIFESTS) -> list[Manifest]:
    """All objects of an overlay or of the monitoring, as `kubectl kustomize` says."""
    directory = manifests / (target if target == MONITORING else f"overlays/{target}")
    command = [find_kubectl() or "kubectl", "kustomize", str(directory)]
    if target == MONITORING:
        command.append("--load-restrictor=LoadRestrictionsNone")
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return [shorten(document) for document in yaml.safe_load_all(finished.stdout)]


def load_golden(target: str) -> list[Manifest]:
    """The objects as they are kept."""
    text = (GOLDEN / f"{target}.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


def shorten(document: Manifest) -> Manifest:
    """Boards and rules are in docker/ and are not kept a second time."""
    if document["kind"] == "PrometheusRule":
        return {**document, "spec": "(long)"}
    if document["kind"] == "ConfigMap":
        data = {
            name: "(long)" if len(text) > _LONG_CHARS else text
            for name, text in document["data"].items()
        }
        return {**document, "data": data}
    return document


def read_pod_labels(document: Manifest) -> dict[str, str]:
    """Labels of the pods that an object makes, else its own."""
    template = document.get("spec", {}).get("template", document)
    labels: dict[str, str] = template["metadata"].get("labels", {})
    return labels


def read_pod(document: Manifest) -> Manifest | None:
    """The pod that an object makes, if any; KServe's are from the predictor."""
    spec: Manifest = document.get("spec", {})
    if document["kind"] == "InferenceService":
        predictor: Manifest = spec["predictor"]
        return predictor
    pod: Manifest | None = spec.get("template", {}).get("spec")
    return pod


def list_pods(documents: list[Manifest]) -> dict[str, tuple[dict[str, str], Manifest]]:
    """Component to labels and pod."""
    return {
        read_pod_labels(document)["app.kubernetes.io/component"]: (
            read_pod_labels(document),
            pod,
        )
        for document in documents
        if (pod := read_pod(document)) is not None
    }


def read_environment(container: Manifest, labels: dict[str, str]) -> dict[str, str]:
    """A container's variables as the kubelet would set them, those of maps left out."""
    environment: dict[str, str] = {}
    for entry in container.get("env", []):
        if "value" in entry:
            value = expand(entry["value"], environment)
        elif "fieldRef" in entry["valueFrom"]:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            value = labels[path.removeprefix("metadata.labels['").removesuffix("']")]
        else:
            kind, _, name = entry["valueFrom"]["resourceFieldRef"][
                "resource"
            ].partition(".")
            value = container["resources"][kind][name]
        environment[entry["name"]] = value
    return environment


def expand(text: str, environment: dict[str, str]) -> str:
    """``$(NAME)`` as the kubelet replaces it."""
    for name, value in environment.items():
        text = text.replace(f"$({name})", value)
    return text


def find(documents: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name."""
    (found,) = (
        d
        for d in documents
        if d["kind"] == kind and d["metadata"]["name"].startswith(name)
    )
    return found


def iter_containers(pod: Manifest) -> list[Manifest]:
    """Those that come first as well."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def get_main(pod: Manifest) -> Manifest:
    """The container that does what the pod is for, under whatever name."""
    return next(
        c
        for c in iter_containers(pod)
        if c["name"] in {"builder", "triton", "kserve-container", "gateway"}
    )


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector with labels alone, or with matchLabels, takes these."""
    return selector.get("matchLabels", selector).items() <= labels.items()


def read_compose(overlay: str) -> dict[str, Any]:
    """The stack of Compose that an overlay is to be like."""
    return load_services(COMPOSE_PROFILES="cpu" if overlay == "cpu" else "gpu")


def main() -> None:
    """Write every golden file."""
    GOLDEN.mkdir(exist_ok=True)
    for target in TARGETS:
        text = yaml.safe_dump_all(render(target), sort_keys=True, width=88)
        (GOLDEN / f"{target}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
