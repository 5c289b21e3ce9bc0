"""Write Grafana's boards: docker/grafana/dashboards/*.json from scripts/boards/.

In: the modules of scripts/boards. Out: JSON that Grafana is provisioned with; with
``--check`` nothing is written and stale files are an error. Needs the development
extra; the service and the stack need the JSON alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from boards import int8_against_fp16, operations
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
except ImportError as error:  # the SDK needs Python 3.11
    print(f"boards neither written nor checked: {error}")
    sys.exit(0 if "--check" in sys.argv and sys.version_info < (3, 11) else 1)

DASHBOARDS = Path(__file__).parents[1] / "docker" / "grafana" / "dashboards"


def render_boards() -> dict[str, str]:
    """File name to content, of every board."""
    encoder = JSONEncoder(indent=1, ensure_ascii=False)
    return {
        board.FILENAME: encoder.encode(board.build_board().build()) + "\n"
        for board in (int8_against_fp16, operations)
    }


def main(arguments: list[str]) -> int:
    """Write the boards, or compare them; 1 if any was stale."""
    stale = []
    for name, text in render_boards().items():
        path = DASHBOARDS / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
            print(f"{name} written")
    if "--check" in arguments and stale:
        print(f"stale: {', '.join(stale)}; run `python scripts/generate_boards.py`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
