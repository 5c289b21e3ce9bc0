"""The boards' JSON: what Grafana would choke on, and what a reader would miss."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.observability.expressions import BOARDS, ROOT, load_board

GRAFANA = ROOT / "docker" / "grafana"
DATA_SOURCE = yaml.safe_load(
    (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
)["datasources"][0]


@pytest.fixture(params=BOARDS, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> Any:
    return load_board(request.param)


def list_panels(board: Any) -> list[Any]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_there_are_two_boards_of_different_uids():
    """The stack ships INT8 against FP16, and Operations."""
    uids = {load_board(path)["uid"] for path in BOARDS}
    assert uids == {"int8qa-precision", "int8qa-operations"}


def test_boards_are_what_the_code_gives():
    """The committed JSON is the generator's output."""
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        pytest.skip("needs grafana-foundation-sdk (Python 3.11 or later, extra dev)")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate_boards.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ids_are_unique(board: Any):
    """Two panels of one id would replace each other."""
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in list_panels(board)]
    assert len(titles) - len(set(titles)) <= 1, titles  # "Guard": now, and over time


def test_panels_lie_on_the_grid_without_overlap(board: Any):
    """Grafana's grid has 24 columns, and moves what overlaps."""
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]),
            range(place["y"], place["y"] + place["h"]),
        ):
            assert cell not in taken, (panel["title"], taken.get(cell))
            taken[cell] = panel["title"]
    for panel in board["panels"]:  # nor are there holes that Grafana would close
        place = panel["gridPos"]
        if place["y"]:
            assert (place["x"], place["y"] - 1) in taken, panel["title"]


def test_every_panel_explains_itself(board: Any):
    """Title, description, unit, thresholds and a legend, on every panel."""
    for panel in list_panels(board):
        title = panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert title.strip()
        assert len(panel["description"]) > 25, title
        assert panel["description"].rstrip()[-1] in ".%", title
        assert defaults["unit"], title
        assert defaults["thresholds"]["steps"][0]["value"] is None, title
        assert defaults["noValue"], title
        values = [step["value"] for step in defaults["thresholds"]["steps"][1:]]
        assert values == sorted(values), title
        for target in panel["targets"]:
            assert target["legendFormat"], title


def test_every_target_names_the_provisioned_data_source(board: Any):
    """A board that asks for another data source shows nothing."""
    wanted = {"type": "prometheus", "uid": DATA_SOURCE["uid"]}
    for panel in list_panels(board):
        assert panel["datasource"] == wanted
        assert panel["targets"]
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(ref_ids) == len(set(ref_ids))
        assert all(target["datasource"] == wanted for target in panel["targets"])
    for annotation in board["annotations"]["list"]:
        assert annotation["datasource"] == wanted


def test_boards_have_schemas_that_grafana_11_and_later_read(board: Any):
    """A schema newer than the reader is not migrated."""
    assert 39 <= board["schemaVersion"] <= 41
    known = {"timeseries", "stat", "heatmap", "table", "bargauge", "state-timeline"}
    assert {panel["type"] for panel in list_panels(board)} <= known


def test_links_lead_to_boards_that_exist(board: Any):
    """Each board links to the other."""
    uids = {load_board(path)["uid"] for path in BOARDS}
    for link in board["links"]:
        assert link["url"].removeprefix("/d/") in uids - {board["uid"]}


def test_the_provider_reads_where_the_boards_are_mounted():
    """docker-compose.yml mounts them at /etc/grafana/dashboards."""
    provider = yaml.safe_load(
        (GRAFANA / "provisioning" / "dashboards" / "int8qa.yml").read_text()
    )["providers"][0]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
