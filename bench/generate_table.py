"""Write the README's table of peers from what was measured.

In: ``bench/results/peers.json``, by ``int8qa bench peers``. Out: the table between two
marks in README.md. With ``--check`` nothing is written and a difference is an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from int8qa.bench.peer_report import write_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "peers.json"
BEGIN = "<!-- peers: written by bench/generate_table.py -->"
END = "<!-- /peers -->"


def replace_table(readme: str, table: str) -> str:
    """The README with ``table`` between the marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(root: Path = ROOT) -> None:
    """Write, or with ``--check`` compare."""
    readme = root / "README.md"
    result = json.loads((root / RESULT.relative_to(ROOT)).read_text(encoding="utf-8"))
    current = readme.read_text(encoding="utf-8")
    wanted = replace_table(current, write_markdown(result))
    if wanted == current:
        return
    if "--check" in sys.argv[1:]:
        sys.exit(
            "README.md does not show what bench/results/peers.json holds: run "
            "python bench/generate_table.py"
        )
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
