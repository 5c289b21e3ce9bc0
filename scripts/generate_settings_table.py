"""Write what the documentation says of settings from the settings themselves.

In: ``int8qa.settings``. Out: the table in README.md and ``.env``, which also holds the
defaults of ``docker-compose.yml``.
With ``--check`` nothing is written and a difference is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from int8qa import __version__
from int8qa.settings import iter_setting_names

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- settings: written by `make settings` -->"
END = "<!-- /settings -->"
ENV_HEAD = """\
# The defaults of `docker compose`, and the settings of int8qa with theirs, commented
# out. `docker compose` reads this file, and gateway and Triton get what is set in it;
# `set -a; . ./.env` brings it into a shell. Written by `make settings`.
"""
COMPOSE_DEFAULTS = (
    ("COMPOSE_PROFILES", "cpu", "cpu, or gpu for TensorRT on NVIDIA GPUs"),
    ("COMPOSE_PROJECT_NAME", "int8qa", "first part of all containers' names"),
    ("IMAGE_VERSION", __version__, "tag of the images built here"),
    ("PYTHON_IMAGE", "python:3.12.12-slim-bookworm", "what they are built from"),
    ("PROMETHEUS_IMAGE", "prom/prometheus:v3.5.0", "Prometheus"),
    ("GRAFANA_IMAGE", "grafana/grafana:12.2.0", "Grafana"),
    ("NGC_RELEASE", "26.10", "of NVIDIA's Triton image, for the profile gpu"),
)
"""Variables that docker-compose.yml cannot do without."""
COMPOSE_CHOICES = (
    ("BUILD_OPTIONS", "", "more options for `int8qa build`"),
    (
        "CHECKPOINTS",
        "./service/int8qa/data",
        "directory that the builder sees as /checkpoints",
    ),
    (
        "INT8QA_TORCH_INDEX",
        "",
        "address of PyTorch's CPU wheel index; without it pip may take the CUDA build",
    ),
    ("BUILD_NETWORK", "default", "network of `docker compose build`"),
    ("GPU_DEVICE", "0", "which GPU, for the profile gpu"),
    ("GRAFANA_HOST", "127.0.0.1", "address that Grafana is published on"),
    ("GRAFANA_PORT", "3000", "and its port"),
    (
        "GRAFANA_ADMIN_PASSWORD",
        "",
        "of Grafana's `admin`; without one there is no such user",
    ),
    ("PROMETHEUS_RETENTION", "15d", "how long Prometheus keeps what it scraped"),
)
"""Variables for which docker-compose.yml has the default itself."""


def _rows() -> list[tuple[str, str, str]]:
    rows = []
    for name, description, default in iter_setting_names():
        shown = "" if default is PydanticUndefined else str(default)
        rows.append((name, shown, description))
    return rows


def render_table() -> str:
    """The settings as a Markdown table."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | `{default}` | {text} |" for name, default, text in _rows()]
    return "\n".join(lines)


def render_env() -> str:
    """The dotenv file; what is commented out is the default anyway."""
    lines = [ENV_HEAD]
    lines += [f"# {text}\n{name}={value}\n" for name, value, text in COMPOSE_DEFAULTS]
    lines += [f"# {text}\n#{name}={value}\n" for name, value, text in COMPOSE_CHOICES]
    lines += [f"# {text}\n#{name}={default}\n" for name, default, text in _rows()]
    return "\n".join(lines)


def main() -> int:
    """Write both, or compare with ``--check``."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = {
        readme: f"{before}{BEGIN}\n\n{render_table()}\n\n{END}{after}",
        ROOT / ".env": render_env(),
    }
    stale = [
        path.name
        for path, content in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    if "--check" in sys.argv[1:]:
        if stale:
            print(f"{', '.join(stale)}: stale; run `make settings`", file=sys.stderr)
        return len(stale)
    for path, content in wanted.items():
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
