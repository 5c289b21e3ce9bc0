"""docker-compose.yml as Compose sees it: variables replaced, one profile chosen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?P<how>:-|:\?)?(?P<text>[^}]*)\})")


def read_env() -> dict[str, str]:
    """What .env sets; commented lines set nothing."""
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return dict(pairs)  # type: ignore[arg-type]


def load_document(**variables: str) -> dict[str, Any]:
    """The whole file under .env and ``variables``, which win over it."""
    environment = {**read_env(), **variables}

    def replace(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        value = environment.get(match["name"], "")
        if value or match["how"] is None:
            return value
        assert match["how"] == ":-", f"{match['name']} is not set"
        return str(match["text"])

    document: dict[str, Any] = _walk(
        yaml.safe_load(COMPOSE), lambda text: VARIABLE.sub(replace, text)
    )
    return document


def load_services(**variables: str) -> dict[str, Any]:
    """What `docker compose up` starts, by what it is: `triton-gpu` is `triton`."""
    profile = {**read_env(), **variables}["COMPOSE_PROFILES"]
    return {
        name.removesuffix("-gpu"): service
        for name, service in load_document(**variables)["services"].items()
        if profile in service.get("profiles", [profile])
    }


def list_variables() -> dict[str, set[str | None]]:
    """Variables of the file, and how they do without a value."""
    found: dict[str, set[str | None]] = {}
    for match in VARIABLE.finditer(COMPOSE):
        if match["name"]:
            found.setdefault(match["name"], set()).add(match["how"])
    return found


def _walk(node: Any, change: Any) -> Any:
    if isinstance(node, dict):
        return {key: _walk(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_walk(value, change) for value in node]
    return change(node) if isinstance(node, str) else node
