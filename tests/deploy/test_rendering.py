"""deploy/kubernetes renders to what is kept here, and its objects fit their schemas."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes.generate_rules import TARGET as RULES_FILE
from deploy.kubernetes.generate_rules import main, render_rules
from tests.deploy.rendering import (
    MANIFESTS,
    OVERLAYS,
    ROOT,
    TARGETS,
    Manifest,
    find_kubectl,
    list_pods,
    load_golden,
    read_pod,
    render,
)

KUBERNETES = ("1.30", "1.37")
"""The oldest that everything in here is stable or default in, and the newest known."""
CUSTOM = {
    "InferenceService",
    "PrometheusRule",
    "ScaledObject",
    "ServiceMonitor",
}
CRDS = os.environ.get("CRD_DIRECTORY", "")

needs_kubectl = pytest.mark.skipif(
    find_kubectl() is None,
    reason="needs kubectl 1.27 or newer, for its kustomize 5",
)


def identify(document: Manifest) -> tuple[str, str]:
    """What no two objects may share."""
    return document["kind"], document["metadata"]["name"]


@needs_kubectl
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_rendered_is_what_is_kept(target: str) -> None:
    """A difference is meant, then `python -m tests.deploy.rendering`, or it is not."""
    rendered = {identify(document): document for document in render(target)}
    kept = {identify(document): document for document in load_golden(target)}
    assert rendered == kept


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("target", TARGETS)
def test_objects_of_kubernetes_fit_its_schemas(target: str, version: str) -> None:
    """No unknown field, no wrong type, nothing missing."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    )
    checked = 0
    for document in load_golden(target):
        if document["kind"] not in CUSTOM:
            validator.validate(document, version, strict=True)
            checked += 1
    assert checked >= 3


def test_the_validator_sees_a_misspelt_field() -> None:
    """Deep in a pod, where a lenient one would look away."""
    validator = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    )
    job = next(d for d in load_golden("cpu") if d["kind"] == "Job")
    broken = copy.deepcopy(job)
    pod = read_pod(broken)
    assert pod is not None
    pod["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    validator.validate(job, KUBERNETES[-1], strict=True)
    with pytest.raises(validator.ValidationError, match="readOnlyRootFileSystem"):
        validator.validate(broken, KUBERNETES[-1], strict=True)


@pytest.mark.skipif(
    not CRDS,
    reason="set CRD_DIRECTORY to a directory with the definitions (YAML) of KEDA's "
    "ScaledObject, KServe's InferenceService, and of Prometheus' operator",
)
@pytest.mark.parametrize("target", TARGETS)
def test_custom_objects_fit_their_definitions(target: str) -> None:
    """As the API server would check them, and unknown fields are errors too."""
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    schemas = load_custom_schemas(Path(CRDS))
    documents = [d for d in load_golden(target) if d["kind"] in CUSTOM]
    rules = yaml.safe_load_all(render_rules()) if target == "monitoring" else []
    documents = [d for d in documents if d["spec"] != "(long)"] + list(rules)
    assert documents
    for document in documents:
        schema = schemas[document["apiVersion"], document["kind"]]
        jsonschema.Draft202012Validator(schema).validate(document)


@functools.cache
def load_custom_schemas(directory: Path) -> dict[tuple[str, str], Any]:
    """JSON schemas by API version and kind."""
    schemas = {}
    for path in sorted(directory.glob("*.y*ml")):
        for definition in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = close(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                name = f"{spec['group']}/{version['name']}"
                schemas[name, spec["names"]["kind"]] = schema
    return schemas


def close(schema: Any) -> Any:
    """The schema with unknown fields refused and Kubernetes' own words turned."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close(value) for name, value in schema.items()}
    if closed.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    if "properties" in closed and not closed.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        closed.setdefault("additionalProperties", False)
    return closed


def test_rules_are_those_of_compose(capsys: pytest.CaptureFixture[str]) -> None:
    """`python deploy/kubernetes/generate_rules.py` would change nothing."""
    assert main(["--check"]) == 0, capsys.readouterr().out
    groups: list[Any] = []
    for document in yaml.safe_load_all(RULES_FILE.read_text(encoding="utf-8")):
        assert document["kind"] == "PrometheusRule"
        groups += document["spec"]["groups"]
    rules = sorted((ROOT / "docker/prometheus/rules").glob("*.yml"))
    theirs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in rules]
    assert groups == [group for file in theirs for group in file["groups"]]


def test_boards_are_the_files_of_compose() -> None:
    """Each of them, by its own name, and none is copied."""
    directory = MANIFESTS / "monitoring"
    text = (directory / "kustomization.yaml").read_text(encoding="utf-8")
    generators = yaml.safe_load(text)["configMapGenerator"]
    boards = {
        (directory / file).resolve()
        for generator in generators
        if "grafana_dashboard" in generator["options"]["labels"]
        for file in generator["files"]
    }
    assert boards == set((ROOT / "docker/grafana/dashboards").glob("*.json"))


@needs_kubectl
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_a_second_build_stands_beside_the_first(
    overlay: str, tmp_path: Path, copy_build: Callable[[Path], None]
) -> None:
    """By the steps of docs/scaling.md: no object of the first changes with it."""
    manifests = tmp_path / "kubernetes"
    shutil.copytree(MANIFESTS, manifests)
    directory = manifests / "overlays" / overlay
    copy_build(directory)
    before = {identify(d): d for d in load_golden(overlay)}
    after = {identify(d): d for d in render(overlay, manifests)}
    assert before.items() <= after.items()
    added = {name for _, name in after.keys() - before.keys()}
    assert added == {"int8qa-builder-b2", "int8qa-triton-b2"}
    selectors = [
        d["spec"]["selector"]
        for d in after.values()
        if d["kind"] == "Service" and "triton" in d["metadata"]["name"]
    ]
    assert [s["int8qa/build"] for s in selectors] == ["b1", "b2"]

    kustomization = directory / "kustomization.yaml"
    text = kustomization.read_text(encoding="utf-8")
    kustomization.write_text(text.replace("value: b1", "value: b2"), "utf-8")
    moved = {identify(d): d for d in render(overlay, manifests)}
    changed = {name for name in moved if moved[name] != after[name]}
    assert changed == {("Deployment", "int8qa-gateway")}
    labels, _ = list_pods([moved["Deployment", "int8qa-gateway"]])["gateway"]
    assert labels["int8qa/build"] == "b2"


@pytest.fixture
def copy_build() -> Callable[[Path], None]:
    """Add build b2 to an overlay, as a person would."""

    def copy_it(overlay: Path) -> None:
        shutil.copytree(overlay / "b1", overlay / "b2")
        build = overlay / "b2" / "kustomization.yaml"
        text = build.read_text(encoding="utf-8")
        build.write_text(text.replace("b1", "b2"), encoding="utf-8")
        kustomization = overlay / "kustomization.yaml"
        text = kustomization.read_text(encoding="utf-8")
        kustomization.write_text(text.replace("  - b1 ", "  - b2\n  - b1 "), "utf-8")

    return copy_it


def test_every_overlay_is_kept() -> None:
    """An overlay without a golden file would be tested by nothing."""
    directories = {path.name for path in (MANIFESTS / "overlays").iterdir()}
    assert directories == set(OVERLAYS)
