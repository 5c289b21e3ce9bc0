"""The report of a measurement: JSON that is the result, a page that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from int8qa.bench.figures import TIMES
from int8qa.bench.report import (
    check_output,
    tabulate_headline,
    write_report,
    write_verdict,
)
from int8qa.errors import RepositoryError
from tests.bench.conftest import make_run


def read_figures(page: str) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL
    )
    assert found is not None
    figures = json.loads(found[1])
    assert isinstance(figures, dict)
    return figures


def test_page_holds_everything(result: dict[str, Any], tmp_path: Path) -> None:
    """Figures that plotly takes, provenance, every test, and nothing from elsewhere."""
    data, page = write_report(result, tmp_path)
    assert json.loads(data.read_text(encoding="utf-8")) == result
    text = page.read_text(encoding="utf-8")
    assert "src=" not in text.partition("<script")[0]
    assert "Plotly.react" in text
    for fact in ("Abacus 9000", "avx512_vnni", "6.0.17", "int8qa bench gateway"):
        assert fact in text
    assert "3 × HTTP 503" in text
    assert "others asked this gateway 3 questions" in text
    figures = read_figures(text)
    labels = {name: [c["label"] for c in f["choices"]] for name, f in figures.items()}
    three = ["SingleStream", "Server", "Offline"]
    assert labels == {
        "cdf": three[:2],
        "rates": ["Server"],
        "time": three,
        "fill": three,
    }
    colours = set(re.findall(r"(--[\w-]+):", text))
    for figure in figures.values():
        for choice in figure["choices"]:
            drawn = json.dumps(choice["figure"])
            assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) <= colours
            resolved = re.sub(r"var\(--[\w-]+\)", "#123456", drawn)
            plotly.graph_objects.Figure(json.loads(resolved))
            assert choice["description"]


def test_server_shows_the_highest_valid_rate(
    result: dict[str, Any], tmp_path: Path
) -> None:
    """Its distribution is that of the rate quoted; the invalid one is drawn hollow."""
    _, page = write_report(result, tmp_path)
    figures = read_figures(page.read_text(encoding="utf-8"))
    server = figures["cdf"]["choices"][1]
    assert [row[0] for row in server["rows"]] == ["INT8 at 56/s", "FP16 at 28/s"]
    rates = figures["rates"]["choices"][0]["figure"]["data"]
    int8 = next(line for line in rates if line["name"] == "INT8 p99")
    assert int8["marker"]["symbol"] == ["circle", "circle-open"]
    stacked = figures["time"]["choices"][0]["figure"]["data"]
    assert [bar["name"] for bar in stacked] == [label for label, _ in TIMES.values()]


def test_without_metrics(result: dict[str, Any], tmp_path: Path) -> None:
    """A gateway that has none, and a run of one scenario, make a page all the same."""
    result["runs"] = [
        make_run("Offline", precision, gateway=None, time_ms=None)
        for precision in ("int8", "fp16")
    ]
    _, page = write_report(result, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("Not measured in this run.") == 2
    assert text.count("The gateway has no metrics.") == 2


def test_hostile_names_stay_text(result: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint, an address or a reason is no markup."""
    evil = "<img src=x onerror=alert(1)>"
    result["gateway"]["checkpoint"] = evil
    result["gateway"]["url"] = evil
    result["runs"][-1]["reasons"] = [evil]
    result["problems"] = [evil]
    _, page = write_report(result, tmp_path)
    assert "<img" not in page.read_text(encoding="utf-8")


def test_verdict_needs_both(result: dict[str, Any]) -> None:
    """Ratios of what was measured validly for both precisions, and of nothing else."""
    assert write_verdict(result) == (
        "INT8 against FP16, through HTTP: 2.00× as fast for one client, 2.00× the "
        "questions per second offline, 2.00× the questions per second as a server."
    )
    result["headline"][1]["server_qps"] = None
    assert "server" not in write_verdict(result)
    table = tabulate_headline(result)
    assert table["rows"][1] == ("FP16", "28.0 | 40.0 | 60.0", "40.0", "–")
    result["headline"].pop()
    assert "not both measured" in write_verdict(result)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Said before anything is measured."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match="cannot write the report"):
        check_output(tmp_path / "file" / "out")
    check_output(tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out").is_dir()
