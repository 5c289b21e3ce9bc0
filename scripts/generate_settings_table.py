"""Write what the documentation says of settings from the settings themselves.

In: ``int8qa.settings``. Out: the table in README.md and the sample ``.env``.
With ``--check`` nothing is written and a difference is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from int8qa.settings import iter_setting_names

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- settings: written by `make settings` -->"
END = "<!-- /settings -->"
ENV_HEAD = """\
# Settings of int8qa with their defaults, commented out; `docker compose` reads this
# file, and `set -a; . ./.env` brings it into a shell. Written by `make settings`.
"""


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
    """The settings as a dotenv file in which every line is a comment."""
    lines = [ENV_HEAD]
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
