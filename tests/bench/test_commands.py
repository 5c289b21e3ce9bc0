"""`bench gateway` and `bench engine` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from int8qa.bench import scenarios
from int8qa.bench.commands import add_bench_commands
from int8qa.bench.load import Scenario
from int8qa.bench.scenarios import LoadOptions
from int8qa.contract import Precision
from int8qa.errors import GatewayRequestError, MissingDependencyError


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    add_bench_commands(app)
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def asked(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[LoadOptions]:
    """LoadGen is stood in for by a finished result; what it was asked for."""
    options: list[LoadOptions] = []

    def bench(given: LoadOptions, say: Any) -> dict[str, Any]:
        options.append(given)
        say("SingleStream int8: p50 14.0 ms, valid")
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenarios, "bench_gateway", bench)
    monkeypatch.setattr(scenarios, "check_loadgen", lambda: None)
    return options


def test_table_and_report(asked: list[LoadOptions], tmp_path: Path) -> None:
    """The figures, machine, versions and command on standard output, files beside."""
    found = invoke("gateway", "--url", "http://h:1", "--min-seconds", "2")
    assert found.exit_code == 0, found.output
    (options,) = asked
    assert options.url == "http://h:1"
    assert options.rules.min_seconds == 2
    assert options.scenarios == tuple(Scenario)
    assert options.precisions == ()
    for text in (
        "14.0 | 20.0 | 30.0",
        "2.00× as fast for one client",
        "Machine: Abacus 9000 (avx512_vnni), 2 cores, 24 GB",
        "Versions: int8qa 0, mlcommons-loadgen 6.0.17",
        "Command: int8qa bench gateway",
    ):
        assert text in found.stdout
    assert "p50 14.0 ms, valid" in found.stderr
    assert "remark: Server-int8: others" in found.stderr
    assert (tmp_path / "int8qa-bench" / "gateway.html").is_file()


def test_json_is_the_result(asked: list[LoadOptions], result: dict[str, Any]) -> None:
    """Alone on standard output; options reach LoadGen's side."""
    found = invoke(
        *("gateway", "--json", "--scenario", "Offline", "--precision", "fp32"),
        *("--output", "there", "--bound-ms", "50", "--concurrency", "7"),
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == result
    (options,) = asked
    assert options.scenarios == (Scenario.OFFLINE,)
    assert options.precisions == (Precision.FP32,)
    assert (options.rules.bound_ms, options.concurrency) == (50.0, 7)
    assert json.loads(Path("there/gateway.json").read_text()) == result


def test_invalid_tests_end_in_an_error(
    asked: list[LoadOptions], result: dict[str, Any]
) -> None:
    """After the report is written."""
    result["problems"] = ["Offline int8 is invalid: 3 × HTTP 503"]
    found = invoke("gateway")
    assert isinstance(found.exception, GatewayRequestError)
    assert "not all of it counts: Offline int8" in str(found.exception)
    assert Path("int8qa-bench/gateway.json").is_file()


def test_interrupt_leaves_a_line(
    asked: list[LoadOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C says what there is and what not."""

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenarios, "bench_gateway", stop)
    found = invoke("gateway")
    assert found.exit_code == 130
    assert "int8qa: stopped; no report was written" in found.stderr


def test_without_loadgen(
    asked: list[LoadOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is asked or written."""

    def refuse() -> None:
        raise MissingDependencyError("no LoadGen")

    monkeypatch.setattr(scenarios, "check_loadgen", refuse)
    found = invoke("gateway")
    assert isinstance(found.exception, MissingDependencyError)
    assert not asked
    assert not Path("int8qa-bench").exists()
