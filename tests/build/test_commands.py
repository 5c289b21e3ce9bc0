"""The build stage's commands: what they hand on, what they print, what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from int8qa import cli
from int8qa.build import laboratory, pipeline
from int8qa.build.calibration import Calibrator, Method
from int8qa.build.engines.tensorrt_options import (
    RTX_CAPABILITIES,
    Flavour,
    PlanOptions,
)
from int8qa.build.options import ALL_CALIBRATORS, BuildOptions, LaboratoryOptions
from int8qa.build.pipeline import BuildOutcome
from int8qa.build.quantization import RECIPES
from int8qa.build.subject import QuestionSources
from tests.build.builds import VERDICT, make_outcome
from tests.command_line import Run, check_one_line

COMMANDS = ("build", "calibrate-compare", "sensitivity")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts to work is told apart from whoever refuses first."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(pipeline, "build_repository", refuse)
    monkeypatch.setattr(laboratory, "compare_calibrators", refuse)
    monkeypatch.setattr(laboratory, "measure_one", refuse)


def options_of(command: str) -> list[str]:
    """Every option of a command, as it is typed."""
    root: Any = typer.main.get_command(cli.app)
    parameters = root.commands[command].params
    return [
        name
        for parameter in parameters
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    """The help names every option, and every option says something."""
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"int8qa {command}" in out
    options = options_of(command)
    assert len(options) > 10
    words = out.replace(",", " ").replace("/", " ").split()
    assert [name for name in options if name not in words] == []


def test_build_options(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every option reaches the build; left out, the build's own defaults stand."""
    seen: list[BuildOptions] = []

    def fake(options: BuildOptions) -> BuildOutcome:
        seen.append(options)
        return make_outcome(cached=True)

    monkeypatch.setattr(pipeline, "build_repository", fake)
    monkeypatch.setenv("INT8QA_MODEL_REPOSITORY", "from-environment")
    assert run("build")[0] == 0
    assert seen[0] == BuildOptions(model_repository=Path("from-environment"))
    assert seen[0].is_default
    code, _, err = run(
        *("build", "--checkpoint", "acme/x", "--revision", "v2"),
        *("--target", "openvino", "--recipe", "full", "--weights", "per-tensor"),
        *("--share-qkv", "--calibrator", "percentile", "--percentile", "99.9"),
        *("--calibration-data", "c.json", "--calibration-limit", 5, "--gate", 0.5),
        *("--evaluation-data", "e.json", "--evaluation-limit", 6, "--force"),
        *("--mixed", "--model-repository", "there", "--no-smooth"),
    )
    assert code == 0, err
    full = RECIPES["full"]
    assert seen[1] == BuildOptions(
        model_repository=Path("there"),
        checkpoint="acme/x",
        revision="v2",
        recipe=type(full)("full", full.rules, per_channel=False, share_qkv=True),
        calibrator=Calibrator("percentile", 99.9),
        sources=QuestionSources(Path("c.json"), Path("e.json"), 5, 6),
        smooth=False,
        gate=0.5,
        mixed=True,
        force=True,
    )
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nbase: linear\nweights: per-tensor\nshare_qkv: true\n")
    run("build", "--calibrator", "search", "--recipe", path)
    assert seen[2].calibrator == Calibrator("search")
    assert seen[2].recipe.name == "own"
    assert (seen[2].recipe.per_channel, seen[2].recipe.share_qkv) == (False, True)
    run("build", "--recipe", path, "--weights", "per-channel", "--separate-qkv")
    assert (seen[3].recipe.per_channel, seen[3].recipe.share_qkv) == (True, False)
    run("build", "--share-qkv", "--target", "tensorrt-rtx")
    assert (seen[4].recipe.name, seen[4].recipe.share_qkv) == ("linear", True)


@pytest.mark.parametrize("cached", [True, False])
def test_build_output(run: Run, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    """The report goes to standard error; with --json the manifest to standard output."""
    outcome = make_outcome(cached=cached)
    monkeypatch.setattr(pipeline, "build_repository", lambda options: outcome)
    _, out, err = run("build")
    assert out == ""
    assert VERDICT in err
    assert ("nothing to do" in err) == cached
    _, out, err = run("build", "--json")
    assert json.loads(out) == outcome.manifest
    assert err == ""
    assert "lesé" in out


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("build", "--recipe", "ful"), 78, "did you mean full?"),
        (("build", "--recipe", "none.yaml"), 78, "none.yaml"),
        (("build", "--percentile", "50"), 70, "percentile is 50.0"),
        (("build", "--explain", "--recipe", "cubic"), 78, "no recipe is called"),
        (("calibrate-compare", "--recipe", "ful"), 78, "did you mean full?"),
        (("calibrate-compare", "--calibrator", "average"), 70, "known are max"),
        (("calibrate-compare", "--calibrator", "percentile-x"), 70, "percentile-99.99"),
        (("calibrate-compare", "--calibrator", "percentile-5"), 70, "above 50"),
        (("sensitivity", "--recipe", "ful"), 78, "did you mean full?"),
        (("sensitivity", "--calibrator", "average"), 70, "known are max"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_unknown_name(
    run: Run, arguments: tuple[str, ...], code: int, part: str
) -> None:
    """A recipe or calibrator that is none is refused in one line, before any work."""
    check_one_line(run(*arguments), code, part)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("place", ["nowhere/report.html", "file/report.html"])
def test_report_without_a_directory(run: Run, tmp_path: Path, place: str) -> None:
    """Twenty minutes of work must not end in a report that cannot be written."""
    (tmp_path / "file").write_text("")
    finished = run("calibrate-compare", "--html", tmp_path / place)
    parent = tmp_path / Path(place).parent
    check_one_line(finished, 73, f"no such directory for the report: {parent}")


def test_compare_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option reaches the laboratory; table, JSON and page come of its result."""
    from int8qa.build import report
    from int8qa.build.comparison import page as comparison_page

    seen: list[LaboratoryOptions] = []
    result = {"verdict": "naïve"}

    def fake(options: LaboratoryOptions) -> dict[str, Any]:
        seen.append(options)
        return result

    pages: list[tuple[Any, Path]] = []
    tables: list[Any] = []
    monkeypatch.setattr(laboratory, "compare_calibrators", fake)
    monkeypatch.setattr(
        comparison_page, "write_page", lambda found, path: pages.append((found, path))
    )
    monkeypatch.setattr(report, "show_comparison", tables.append)
    code, out, err = run("calibrate-compare")
    assert (code, out) == (0, "")
    assert err == "report: int8qa-calibrators.html\n"
    assert seen[0] == LaboratoryOptions()
    assert seen[0].calibrators == ALL_CALIBRATORS
    assert tables == [result]
    assert pages == [(result, Path("int8qa-calibrators.html"))]
    code, out, err = run(
        *("calibrate-compare", "--checkpoint", "acme/x", "--revision", "v2"),
        *("--data", "d.json", "--limit", 7, "--calibration-data", "c.json"),
        *("--calibration-limit", 5, "--recipe", "linear", "--calibrator", "max"),
        *("--calibrator", "percentile-99.99", "--no-smooth", "--gate", 0.5),
        *("--sensitivity-questions", 0, "--html", "r.html", "--cache", "k", "--json"),
    )
    assert code == 0, err
    assert json.loads(out) == result
    assert "naïve" in out
    assert len(tables) == 1
    assert seen[1] == LaboratoryOptions(
        checkpoint="acme/x",
        revision="v2",
        sources=QuestionSources(Path("c.json"), Path("d.json"), 5, 7),
        recipes=(RECIPES["linear"],),
        calibrators=(Calibrator("max"), Calibrator("percentile", 99.99)),
        smooth=False,
        gate=0.5,
        sensitivity_questions=0,
        cache=Path("k"),
    )


def test_sensitivity_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option reaches the laboratory; by default full, 200 questions, plain."""
    from int8qa.build import report

    seen: list[Any] = []
    tables: list[Any] = []

    def fake(
        options: LaboratoryOptions, calibrator: Calibrator, *, smooth: bool
    ) -> dict[str, Any]:
        seen.append((options, calibrator, smooth))
        return {"units": []}

    monkeypatch.setattr(laboratory, "measure_one", fake)
    monkeypatch.setattr(report, "show_sensitivity", tables.append)
    code, out, err = run("sensitivity")
    assert (code, out, err) == (0, "", "")
    assert tables == [{"units": []}]
    expected = LaboratoryOptions(
        sources=QuestionSources(evaluation_limit=200),
        recipes=(RECIPES["full"],),
        sensitivity_questions=200,
    )
    assert seen[0] == (expected, Calibrator("percentile", 99.999), False)
    code, out, err = run(
        *("sensitivity", "--checkpoint", "acme/x", "--revision", "v2"),
        *("--data", "d.json", "--limit", 7, "--calibration-data", "c.json"),
        *("--calibration-limit", 5, "--recipe", "linear", "--calibrator", "search"),
        *("--smooth", "--cache", "k", "--json"),
    )
    assert json.loads(out) == {"units": []}
    expected = LaboratoryOptions(
        checkpoint="acme/x",
        revision="v2",
        sources=QuestionSources(Path("c.json"), Path("d.json"), 5, 7),
        recipes=(RECIPES["linear"],),
        sensitivity_questions=7,
        cache=Path("k"),
    )
    assert seen[1] == (expected, Calibrator("search"), True)


@pytest.mark.usefixtures("no_work")
def test_explain(run: Run, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor that could be quantized, and what the recipe does with it."""
    checkpoint = str(tiny_checkpoints["bert"])
    explain = ("build", "--checkpoint", checkpoint, "--explain", "--recipe")
    code, out, err = run(*explain, "linear", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert all(row.keys() == {"layer", "class", "quantizer", "grid"} for row in rows)
    found = {(row["layer"], row["class"]): row["grid"] for row in rows}
    assert found[0, "qkv_input"] == "INT8"
    assert found[1, "ffn_out_weight"] == "INT8 per channel"
    assert found[1, "softmax"] == found[None, "classifier_weight"] == "float"
    assert len({row["quantizer"] for row in rows}) == len(rows)
    _, out, _ = run(*explain, "full", "--weights", "per-tensor", "--json")
    grids = {(row["layer"], row["class"]): row["grid"] for row in json.loads(out)}
    assert grids.keys() == found.keys()
    assert grids[1, "ffn_out_weight"] == grids[1, "value"] == "INT8"
    assert grids[1, "softmax"] == "UINT8"
    assert grids[1, "ffn_output"] == "float"
    _, out, _ = run(*explain, "linear")
    lines = out.splitlines()
    assert "tiny-bert, recipe linear" in lines[0]
    for row in rows:
        assert any(row["quantizer"] in line and row["grid"] in line for line in lines)
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.usefixtures("no_work")
def test_explain_for_tensorrt(
    run: Run,
    tiny_checkpoints: dict[str, Path],
    question_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the tensors, what keeps TensorRT from fusing; it need not be here."""
    from int8qa.build import plans

    explain = (
        *("build", "--explain", "--recipe", "full", "--target", "tensorrt"),
        *("--checkpoint", tiny_checkpoints["bert"]),
        *("--calibration-data", question_files[0]),
        *("--evaluation-data", question_files[1]),
    )
    code, out, err = run(*explain)
    assert code == 0, err
    # Softmax on the grid that TensorRT has.
    assert "UINT8" not in out
    assert out.splitlines()[-1].startswith("Nothing in the graph is known to keep")
    monkeypatch.setattr(plans, "choose_unsmoothed", lambda sites: frozenset())
    found = json.loads(run(*explain, "--json")[1])
    assert len(found["sites"]) > 20
    assert len(found["findings"]) == 2
    for line in found["findings"]:
        assert "product-behind-attention" in line
        assert "Rule: " in line
    # Without smoothing there is no such product.
    assert json.loads(run(*explain, "--json", "--no-smooth")[1])["findings"] == []


@pytest.mark.usefixtures("no_work")
def test_explain_of_a_pattern_without_a_match(
    run: Run, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A recipe that names what the model lacks is refused with what it has."""
    path = tmp_path / "own.yaml"
    path.write_text(
        'name: own\nbase: linear\nrules: [{quantizers: "*.layer.7.*", enable: false}]\n'
    )
    checkpoint = str(tiny_checkpoints["bert"])
    finished = run("build", "--checkpoint", checkpoint, "--explain", "--recipe", path)
    check_one_line(finished, 78, "'*.layer.7.*'", "nearest are called")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_method_is_offered(run: Run, command: str) -> None:
    """What the help names is what the build stage knows."""
    _, out, _ = run(command, "--help")
    words = out.replace(",", " ").replace(".", " ").split()
    for method in Method.__args__:
        assert (f"{method}-N" if method == "percentile" else method) in words


def choose(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Calibrator:
    """The calibrator that a build with these arguments gets."""
    seen: list[Calibrator] = []

    def fake(options: BuildOptions) -> BuildOutcome:
        seen.append(options.calibrator)
        return make_outcome(cached=True)

    monkeypatch.setattr(pipeline, "build_repository", fake)
    code, _, err = run("build", *arguments)
    assert code == 0, err
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "calibrator"),
    [
        ((), Calibrator()),
        (("--calibrator", "percentile"), Calibrator()),
        (("--percentile", "99.9"), Calibrator("percentile", 99.9)),
        (
            ("--calibrator", "percentile", "--percentile", "99.9"),
            Calibrator("percentile", 99.9),
        ),
        (("--calibrator", "percentile-99.99"), Calibrator("percentile", 99.99)),
        # Both, and of one mind.
        (
            ("--calibrator", "percentile-99.90", "--percentile", "99.9"),
            Calibrator("percentile", 99.9),
        ),
        (("--calibrator", "entropy"), Calibrator("entropy")),
    ],
)
def test_calibrator_of_a_build(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    calibrator: Calibrator,
) -> None:
    """By its method with --percentile, or by the name the other commands take."""
    assert choose(run, monkeypatch, *arguments) == calibrator


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--calibrator", "average"), ("average", "known are max")),
        (("--calibrator", "percentile-x"), ("percentile-x", "percentile-99.99")),
        (("--calibrator", "percentile-5"), ("percentile is 5.0", "above 50")),
        (
            ("--calibrator", "percentile-99.99", "--percentile", "99.9"),
            ("99.9 contradicts", "percentile-99.99", "only one of them"),
        ),
        (
            ("--calibrator", "max", "--percentile", "99.9"),
            ("99.9 contradicts", "max", "only one of them"),
        ),
        # Looked at before the tensors are listed, too.
        (("--explain", "--calibrator", "average"), ("average",)),
    ],
    ids=" ".join,
)
def test_calibrator_that_is_none(
    run: Run, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    """A slip on the command line: EX_USAGE, with what was given and what is known."""
    code, out, err = run("build", *arguments)
    assert (code, out) == (64, "")
    message = " ".join(err.replace("│", " ").split())
    for part in parts:
        assert part in message


def choose_plans(
    run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> PlanOptions | None:
    """The plan options that a build with these arguments gets."""
    seen: list[BuildOptions] = []

    def fake(options: BuildOptions) -> BuildOutcome:
        seen.append(options)
        return make_outcome(cached=True)

    monkeypatch.setattr(pipeline, "build_repository", fake)
    code, _, err = run("build", *arguments)
    assert code == 0, err
    return seen[0].plans


@pytest.mark.parametrize(
    ("arguments", "plans"),
    [
        ((), None),
        (("--target", "openvino"), None),
        (("--target", "tensorrt-rtx"), PlanOptions(Flavour.RTX, RTX_CAPABILITIES)),
        (
            ("--target", "tensorrt-rtx", "--compute-capability", "sm80,sm89"),
            PlanOptions(Flavour.RTX, ("sm80", "sm89")),
        ),
        (
            ("--target", "tensorrt"),
            PlanOptions(timing_cache=Path("cache/int8qa/tensorrt")),
        ),
        (
            (
                *("--target", "tensorrt", "--timing-cache", "times"),
                *("--version-compatible", "--hardware-compatible"),
            ),
            PlanOptions(
                timing_cache=Path("times"),
                version_compatible=True,
                hardware_compatible=True,
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plans_of_a_build(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    plans: PlanOptions | None,
) -> None:
    """OpenVINO has none; TensorRT keeps its timings; RTX builds for five kinds of GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert choose_plans(run, monkeypatch, *arguments) == plans


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("--compute-capability", "sm80"),
            ("--compute-capability", "only --target tensorrt-rtx takes it", "openvino"),
        ),
        (("--timing-cache", "x"), ("--timing-cache", "only --target tensorrt takes")),
        (("--version-compatible",), ("only --target tensorrt takes it",)),
        (("--hardware-compatible",), ("only --target tensorrt takes it",)),
        (
            ("--target", "tensorrt", "--compute-capability", "sm80"),
            ("builds for the GPU it runs on", "use --target tensorrt-rtx"),
        ),
        (
            ("--target", "tensorrt-rtx", "--timing-cache", "x"),
            ("has no timing cache",),
        ),
        (
            ("--target", "tensorrt-rtx", "--compute-capability", "8.0"),
            ("'8.0' is no compute capability", "sm80 (A100)"),
        ),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_options_of_another_target(
    run: Run, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    """A slip on the command line: EX_USAGE, and which target would take it."""
    code, out, err = run("build", *arguments)
    assert (code, out) == (64, "")
    message = " ".join(err.replace("│", " ").split())
    for part in parts:
        assert part in message


def test_tensorrt_without_tensorrt(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line before any work: what is missing, how to get it, what works here."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    finished = run(
        "build", "--target", "tensorrt", "--model-repository", tmp_path / "m"
    )
    check_one_line(
        finished,
        69,
        *("an NVIDIA GPU", "tritonserver image", "--gpus all"),
        *("--target tensorrt-rtx", "--target openvino"),
    )
    assert not (tmp_path / "m").exists()
