"""Compose's Prometheus rules as objects of Prometheus' operator.

In: ``docker/prometheus/rules``. Out: ``monitoring/rules.yaml`` beside this file, one
PrometheusRule for each of them, comments and all; it is committed. ``--check`` only
compares. Reads no rule: the text is indented, nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "docker" / "prometheus" / "rules"
TARGET = Path(__file__).resolve().parent / "monitoring" / "rules.yaml"
_HEAD = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: int8qa-{name}
  namespace: int8qa
spec:
"""


def render_rules() -> str:
    """The text of all objects, by file name."""
    objects = []
    for path in sorted(RULES.glob("*.yml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        body = (f"  {line}" if line else "" for line in lines)
        objects.append(_HEAD.format(name=path.stem) + "\n".join(body) + "\n")
    note = "# Written by generate_rules.py from docker/prometheus/rules.\n"
    return note + "---\n".join(objects)


def main(arguments: list[str]) -> int:
    """Write the file, or compare it; 1 if it was stale."""
    text = render_rules()
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    if "--check" in arguments:
        print("rules.yaml is stale; run `python deploy/kubernetes/generate_rules.py`")
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print("rules.yaml written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
