"""Who may do what: users, files, memory, and who reaches whom."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.rendering import (
    ROOT_OF_BUILDS,
    Manifest,
    find,
    get_main,
    iter_containers,
    list_pods,
    load_golden,
    matches,
    read_compose,
)


def test_everything_is_in_one_namespace_that_admits_restricted_pods_only(
    documents: list[Manifest],
) -> None:
    """The API server then refuses what this file would have overlooked."""
    namespace = find(documents, "Namespace", "int8qa")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for document in documents:
        if document is not namespace:
            assert document["metadata"]["namespace"] == "int8qa"


def test_every_container_is_confined(documents: list[Manifest]) -> None:
    """As in Compose: the same user, nothing writable but what it must write."""
    writers = set()
    for component, (_, pod) in list_pods(documents).items():
        assert pod["automountServiceAccountToken"] is False
        assert pod["shareProcessNamespace"] is True
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in iter_containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert "cpu" in container["resources"]["requests"]
            writers |= {
                (component, container["name"])
                for mount in container["volumeMounts"]
                if mount["mountPath"] == ROOT_OF_BUILDS and not mount.get("readOnly")
            }
    # A gateway's await-build writes where builds are copied from a bucket.
    assert writers - {("gateway", "await-build")} == {("builder", "builder")}


def test_memory_that_looks_like_disk_is_as_large_as_in_compose(
    documents: list[Manifest], overlay: str
) -> None:
    """/tmp and /dev/shm; both count as the container's memory, and fit into it."""
    compose = read_compose(overlay)
    for component, (_, pod) in list_pods(documents).items():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        limit = read_mebibytes(get_main(pod)["resources"]["limits"]["memory"])
        (tmp,) = compose[component]["tmpfs"]
        sizes = {
            "tmp": tmp.rpartition("size=")[2],
            "shm": compose[component].get("shm_size"),
        }
        if overlay == "gpu-object-storage" and component == "triton":
            del sizes["tmp"]  # the models are copied to it
        for name, size in sizes.items():
            if size is not None:
                wanted = f"{size[:-1]}{size[-1].upper()}i"
                assert volumes[name]["emptyDir"] == {
                    "medium": "Memory",
                    "sizeLimit": wanted,
                }
        in_memory = [
            read_mebibytes(volume["emptyDir"]["sizeLimit"])
            for volume in pod["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        assert all(
            "sizeLimit" in v.get("emptyDir", {"sizeLimit": 0}) for v in volumes.values()
        )
        assert sum(in_memory) < limit


def read_mebibytes(quantity: str) -> int:
    """A quantity in Mi or Gi."""
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


HERE = {"kubernetes.io/metadata.name": "int8qa"}
PEERS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "builder": (HERE, {"app.kubernetes.io/component": "builder"}),
    "triton": (HERE, {"app.kubernetes.io/component": "triton"}),
    "gateway": (HERE, {"app.kubernetes.io/component": "gateway"}),
    "prometheus": (
        {"kubernetes.io/metadata.name": "monitoring"},
        {"app.kubernetes.io/name": "prometheus"},
    ),
    "grafana": (
        {"kubernetes.io/metadata.name": "monitoring"},
        {"app.kubernetes.io/name": "grafana"},
    ),
    "ingress": (
        {"kubernetes.io/metadata.name": "ingress-nginx", "int8qa/client": "true"},
        {"app.kubernetes.io/name": "ingress-nginx"},
    ),
    "stranger": (
        {"kubernetes.io/metadata.name": "default"},
        {"app.kubernetes.io/component": "gateway"},
    ),
    "dns": ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
    "outside": ({}, {}),
}
"""Labels of namespace and pod of everybody who may be met."""
PORTS = (53, 443, 8000, 8001, 8002, 8080, 8081)


def permits(
    documents: list[Manifest], direction: str, subject: str, peer: str, port: int
) -> bool:
    """Whether network policies let one of our pods speak with a peer."""
    ends = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}
    rules_key, peers_key = ends[direction]
    bound = False
    for policy in (d["spec"] for d in documents if d["kind"] == "NetworkPolicy"):
        if direction not in policy["policyTypes"]:
            continue
        if not matches(policy["podSelector"], PEERS[subject][1]):
            continue
        bound = True
        for rule in policy.get(rules_key, []):
            named = rule.get(peers_key)
            peers = named is None or any(fits(entry, peer) for entry in named)
            if peers and port in {entry["port"] for entry in rule["ports"]}:
                return True
    return not bound


def fits(entry: Any, peer: str) -> bool:
    """Whether one entry of a policy means that peer."""
    namespace, pod = PEERS[peer]
    assert entry.keys() <= {"namespaceSelector", "podSelector"}
    right_namespace = (
        matches(entry["namespaceSelector"], namespace)
        if "namespaceSelector" in entry
        else namespace == HERE
    )
    return right_namespace and matches(entry.get("podSelector", {}), pod)


def list_ways(documents: list[Manifest], direction: str) -> set[tuple[str, str, int]]:
    """Every (subject, peer, port) that is open."""
    return {
        (subject, peer, port)
        for subject in ("builder", "triton", "gateway")
        for peer in PEERS
        for port in PORTS
        if permits(documents, direction, subject, peer, port)
    }


def test_only_gateways_reach_triton_and_only_prometheus_metrics(
    documents: list[Manifest],
) -> None:
    """Everything that may come in, and nothing else does."""
    assert list_ways(documents, "Ingress") == {
        ("triton", "gateway", 8001),
        ("triton", "prometheus", 8002),
        ("gateway", "prometheus", 8081),
        ("gateway", "ingress", 8080),
    }


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "kserve"])
def test_triton_asks_nobody_and_gateways_triton_alone(
    documents: list[Manifest],
) -> None:
    """Names apart. Checkpoints come by HTTPS, and only the builder has them."""
    ways = list_ways(documents, "Egress")
    assert {way for way in ways if way[0] != "builder"} == {
        ("gateway", "triton", 8001),
        ("gateway", "dns", 53),
    }
    assert {port for subject, _, port in ways if subject == "builder"} == {53, 443}


def test_a_bucket_is_reached_by_all_and_by_https_alone() -> None:
    """Its address is not known, so any may be."""
    ways = list_ways(load_golden("gpu-object-storage"), "Egress")
    assert {(subject, port) for subject, peer, port in ways if peer == "outside"} == {
        ("builder", 443),
        ("triton", 443),
        ("gateway", 443),
    }
