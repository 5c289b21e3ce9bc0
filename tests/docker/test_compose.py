"""docker-compose.yml: what is started, in which order, how it is confined.

No engine is needed; scripts/compose-test runs the stack where there is one.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from typing import Any

import pytest
import yaml

from .compose_model import (
    ROOT,
    list_variables,
    load_document,
    load_services,
    read_env,
)

PROFILES = ("cpu", "gpu")
SERVICES = ("builder", "triton", "gateway", "prometheus", "grafana")
REPOSITORY = "/var/lib/int8qa/model_repository"


@pytest.fixture(params=PROFILES)
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one profile starts."""
    return load_services(COMPOSE_PROFILES=request.param)


def dockerfile_stages() -> dict[str, str]:
    """Each target's part of the Dockerfile."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    parts = re.split(r"(?m)^FROM .* AS (.*)$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_profile_is_a_whole_stack(services: dict[str, Any]) -> None:
    """Nothing is missing in either, and nothing is in both."""
    assert list(services) == list(SERVICES)
    assert len(load_document()["services"]) == len(SERVICES) * len(PROFILES)


def test_the_cpu_is_the_default() -> None:
    """Without arguments .env chooses, and nothing asks for a GPU."""
    assert read_env()["COMPOSE_PROFILES"] == "cpu"
    for service in load_services().values():
        assert service["profiles"] == ["cpu"]
        assert "deploy" not in service


def test_the_gpu_profile_reserves_a_device_for_builder_and_triton() -> None:
    """Both run in NVIDIA's image of one release, and only they get the GPU."""
    services = load_services(
        COMPOSE_PROFILES="gpu", NGC_RELEASE="26.11", GPU_DEVICE="3"
    )
    image = "nvcr.io/nvidia/tritonserver:26.11-py3"
    assert services["triton"]["image"] == image
    assert services["builder"]["build"]["args"]["BASE_IMAGE"] == image
    assert "--target tensorrt" in services["builder"]["command"]
    reserving = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services.items()
        if "deploy" in service
    }
    device = {"driver": "nvidia", "device_ids": ["3"], "capabilities": ["gpu"]}
    assert reserving == {"builder": [device], "triton": [device]}


@pytest.mark.parametrize(("profile", "suffix"), [("cpu", ""), ("gpu", "-gpu")])
def test_each_waits_for_the_health_of_the_one_before(profile: str, suffix: str) -> None:
    """The order is a chain of conditions, not of times, and stays in its profile."""
    chain = {
        "triton": ("builder", "service_completed_successfully"),
        "gateway": ("triton", "service_healthy"),
        "prometheus": ("gateway", "service_healthy"),
        "grafana": ("prometheus", "service_healthy"),
    }
    services = load_services(COMPOSE_PROFILES=profile)
    assert "depends_on" not in services["builder"]
    for name, (before, condition) in chain.items():
        wanted = {before + suffix: {"condition": condition}}
        assert services[name]["depends_on"] == wanted


def test_profiles_differ_in_builder_and_triton_only() -> None:
    """The rest is the same, and finds Triton and gateway by the same names."""
    cpu, gpu = (load_services(COMPOSE_PROFILES=profile) for profile in PROFILES)
    for name in SERVICES:
        for service in (cpu[name], gpu[name]):
            service.pop("profiles")
            service.pop("depends_on", None)
        assert (cpu[name] == gpu[name]) == (name not in {"builder", "triton"})
    for name in ("triton", "gateway", "prometheus"):
        assert cpu[name]["networks"]["inner"] == {"aliases": [name]}
        assert gpu[name]["networks"]["inner"] == {"aliases": [name]}


def test_all_that_stays_has_a_health_check(services: dict[str, Any]) -> None:
    """In the compose file or in our image; the builder ends, and is not started again."""
    stages = dockerfile_stages()
    for name, service in services.items():
        if name == "builder":
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped"
        target = service.get("build", {}).get("target")
        assert "healthcheck" in service or "HEALTHCHECK" in stages[target], name


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(services: dict[str, Any], name: str) -> None:
    """No root, no capabilities, no new privileges, a read-only root file system."""
    service = services[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert all(re.search(r"size=\d", mount) for mount in service["tmpfs"])
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc"}


def test_gateway_and_grafana_alone_are_published(services: dict[str, Any]) -> None:
    """And on loopback."""
    assert {
        name: service["ports"]
        for name, service in services.items()
        if "ports" in service
    } == {"gateway": ["127.0.0.1:8080:8080"], "grafana": ["127.0.0.1:3000:3000"]}


def test_another_address_must_be_asked_for() -> None:
    """Each of the two has its own variable for that."""
    services = load_services(INT8QA_HOST="192.0.2.1", GRAFANA_PORT="3001")
    assert services["gateway"]["ports"] == ["192.0.2.1:8080:8080"]
    assert services["grafana"]["ports"] == ["127.0.0.1:3001:3000"]


def test_triton_and_prometheus_have_the_inner_network_only(
    services: dict[str, Any],
) -> None:
    """It has no way out, and every port on it is out of reach from outside."""
    assert load_document()["networks"]["inner"] == {"internal": True}
    assert set(services["triton"]["networks"]) == {"inner"}
    assert set(services["prometheus"]["networks"]) == {"inner"}


def test_one_path_to_the_model_repository(services: dict[str, Any]) -> None:
    """Builder, Triton and gateway see it in the same place; only the builder writes."""
    mounts = {
        name: [v for v in service["volumes"] if v.startswith("models:")]
        for name, service in services.items()
    }
    place = "models:/var/lib/int8qa"
    assert mounts.pop("builder") == [place]
    assert mounts.pop("triton") == mounts.pop("gateway") == [f"{place}:ro"]
    assert not any(mounts.values())
    for name in ("builder", "triton", "gateway"):
        environment = services[name].get("environment", {})
        command = services[name].get("command", [])
        assert (
            environment.get("INT8QA_MODEL_REPOSITORY") == REPOSITORY
            or f"--model-repository={REPOSITORY}" in command
        )


def test_what_is_mounted_from_the_checkout_is_there(services: dict[str, Any]) -> None:
    """Docker would make an empty directory of a wrong path; all are read-only."""
    volumes = [v for service in services.values() for v in service["volumes"]]
    mounts = [v.split(":") for v in volumes if v.startswith(".")]
    assert len(mounts) == 4
    for source, target, mode in mounts:
        assert (ROOT / source).is_dir(), source
        assert target.startswith("/")
        assert mode == "ro"
    named = {v.split(":")[0] for v in volumes if not v.startswith(".")}
    assert named == set(load_document()["volumes"])


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    """A tag with a version; `latest` is another image every week."""
    for service in services.values():
        bases = [service["image"]]
        if "build" in service:
            bases.append(service["build"]["args"]["BASE_IMAGE"])
        for image in bases:
            assert re.search(r":v?\d+\.\d+", image), image


def test_the_dockerfile_has_no_base_of_its_own() -> None:
    """Stages come from each other or from the one pinned base, the same as in .env."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    (default,) = re.findall(r"(?m)^ARG BASE_IMAGE=(.*)$", text)
    assert default == read_env()["PYTHON_IMAGE"]
    stages = re.findall(r"(?m)^FROM (\S+) AS (\S+)$", text)
    assert len(stages) == text.count("\nFROM ")
    known = {"${BASE_IMAGE}"}
    for base, name in stages:
        assert base in known
        known.add(name)


def test_images_end_without_root_compiler_and_torch() -> None:
    """What is final starts from the runtime stage and only copies packages in."""
    stages = dockerfile_stages()
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    for target in ("gateway", "triton", "builder"):
        assert f"FROM runtime AS {target}\n" in text
        assert "pip" not in stages[target]
        users = re.findall(r"(?m)^USER (.*)$", stages["runtime"] + stages[target])
        assert users[-1] == "10001:10001"
    for label in ("title", "description", "licenses", "version"):
        assert f"org.opencontainers.image.{label}=" in stages["runtime"]
    assert "gcc" not in text
    assert "build-essential" not in text


def test_what_the_dockerfile_copies_is_in_the_context() -> None:
    """.dockerignore lets in exactly that."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in dockerfile_stages().values()
        for words in re.findall(r"(?m)^COPY (?!--from)(.*)$", stage)
        for source in words.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_env_has_every_variable_and_no_other() -> None:
    """What compose needs is set there; what has a default is there as a comment."""
    text = (ROOT / ".env").read_text(encoding="utf-8")
    used = list_variables()
    needed = {name for name, how in used.items() if how == {":?"}}
    by_compose_itself = {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}
    assert set(read_env()) == needed | by_compose_itself
    for name in used.keys() - set(read_env()):
        assert re.search(rf"(?m)^#{name}=", text), name


def test_nobody_but_grafana_gets_its_password(services: dict[str, Any]) -> None:
    """A service that reads .env has the password taken out again; none is written."""
    for service in services.values():
        if "env_file" in service:
            assert service["environment"]["GRAFANA_ADMIN_PASSWORD"] == ""
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == ""
    told = load_services(GRAFANA_ADMIN_PASSWORD="s3cret")
    holders = [name for name, service in told.items() if "s3cret" in str(service)]
    assert holders == ["grafana"]


@pytest.mark.parametrize("password", ["", "s3cret"])
def test_grafana_has_an_administrator_only_with_a_password(password: str) -> None:
    """Its start script, run for real up to where Grafana would start."""
    grafana = load_services()["grafana"]
    *shell, script = grafana["entrypoint"]
    assert "exec /run.sh" in script
    output = subprocess.run(
        [*shell, script.replace("exec /run.sh", "exec env")],
        env={"PATH": "/usr/bin:/bin", "GF_SECURITY_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    has_admin = "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION=true" not in output
    can_log_in = "GF_AUTH_DISABLE_LOGIN_FORM=true" not in output
    assert has_admin == can_log_in == bool(password)
    assert ("GF_SECURITY_ADMIN_PASSWORD=" in output) == bool(password)
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_compose_itself_reads_it_so() -> None:
    """Compose's own reading agrees with ours."""
    finished = subprocess.run(
        [*_find_compose(), "--profile", "cpu", "--profile", "gpu", "config"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    theirs = yaml.safe_load(finished.stdout)["services"]
    ours = load_document()["services"]
    assert set(theirs) == set(ours)
    for name, service in ours.items():
        assert theirs[name]["image"] == service["image"]
        assert theirs[name]["read_only"] is True
        assert theirs[name]["profiles"] == service["profiles"]
        assert theirs[name].get("deploy") == service.get("deploy")
        assert _conditions(theirs[name]) == _conditions(service)


def _find_compose() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([*command, "version"], capture_output=True, check=True)
            return command
    pytest.skip("no Compose; on Debian: apt install docker-compose")


def _conditions(service: dict[str, Any]) -> dict[str, str]:
    entries = service.get("depends_on", {})
    return {name: entry["condition"] for name, entry in entries.items()}
