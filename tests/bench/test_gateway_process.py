"""A gateway process of our own: its end, and its last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8qa.bench.gateway_process import GatewayProcess, run_gateway
from int8qa.errors import GatewayRequestError


def test_gateway_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Its own words and its status are the error's."""
    with (
        pytest.raises(GatewayRequestError, match=r"ended with status 78: .*contract"),
        run_gateway("127.0.0.1:1", tmp_path),
    ):
        pytest.fail("it is ready")


def test_gateway_that_never_ran_is_stopped_already(tmp_path: Path) -> None:
    """So that a start that failed half way can be cleaned up."""
    with (tmp_path / "log").open("w+") as log:
        assert GatewayProcess("127.0.0.1:1", log).stop() == 0
