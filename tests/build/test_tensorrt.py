"""Plans: profiles and options by hand, parsing and building by the real builder."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from int8qa.build.engines import tensorrt as engine
from int8qa.build.engines.tensorrt import (
    build_plan,
    check_builder,
    import_library,
    parse_network,
)
from int8qa.build.engines.tensorrt_census import NetworkCensus, check_network
from int8qa.build.engines.tensorrt_options import (
    Flavour,
    PlanOptions,
    Profile,
    choose_profiles,
)
from int8qa.build.half_graph import make_half_graph
from int8qa.contract import Precision
from int8qa.errors import (
    BuildError,
    EnginePrecisionError,
    ExportError,
    MissingDependencyError,
)
from tests.build.half import (
    TENSORRT_RTX,
    find_node,
    insert_pair,
    project_half,
    remove_pair,
)
from tests.build.tiny import CalibratedReader, Graphs

Calibrated = Callable[[str], CalibratedReader]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason=TENSORRT_RTX
)
CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120")
BUCKETS = tuple(range(32, 385, 32))
QUANTIZED = {"linear": 12, "gemms": 16, "full": 16}
"""GEMMs of the tiny reader in INT8: 6 a layer, with attention's own 8."""
SMALL = [Profile((1, 1), (2, 32), (4, 64))]


def rtx(*capabilities: str) -> PlanOptions:
    return PlanOptions(Flavour.RTX, capabilities)


def test_profiles_by_octave() -> None:
    """TensorRT's profiles end where the next begin, and each takes the largest batch."""
    profiles = choose_profiles(
        Flavour.TENSORRT, sequence_buckets=BUCKETS, batch_sizes=(1, 2, 4, 8, 16, 32)
    )
    assert profiles == (
        Profile((1, 1), (8, 96), (32, 96)),
        Profile((1, 97), (8, 192), (32, 192)),
        Profile((1, 193), (8, 384), (32, 384)),
    )
    for tokens in range(1, 385):
        assert sum(p.covers((32, tokens)) for p in profiles) == 1
    assert not any(p.covers((1, 385)) or p.covers((33, 1)) for p in profiles)


@pytest.mark.parametrize(
    ("flavour", "buckets", "batches", "ends"),
    [
        (Flavour.RTX, BUCKETS, (1, 32), [(8, 384)]),
        (
            Flavour.TENSORRT,
            (32, 64, 96, 128, 512),
            (1, 2),
            [(2, 64), (2, 128), (2, 512)],
        ),
        (Flavour.TENSORRT, (128,), (1,), [(1, 128)]),
    ],
)
def test_other_profiles(
    flavour: Flavour,
    buckets: tuple[int, ...],
    batches: tuple[int, ...],
    ends: list[tuple[int, int]],
) -> None:
    """RTX has one profile; odd buckets and small batches are followed."""
    profiles = choose_profiles(flavour, sequence_buckets=buckets, batch_sizes=batches)
    assert [profile.tuned for profile in profiles] == ends


def test_profile_out_of_order() -> None:
    """A profile whose least is above its most is refused with its numbers."""
    with pytest.raises(BuildError, match=r"\(1, 64\), \(8, 32\)"):
        Profile((1, 64), (8, 32), (8, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(Flavour.RTX, ("7.5",)), "'7.5' is no compute capability"),
        (PlanOptions(Flavour.TENSORRT, ("sm75",)), "builds for the GPU it runs on"),
        (PlanOptions(Flavour.RTX, timing_cache=Path("cache")), "has no timing cache"),
        (PlanOptions(Flavour.RTX, version_compatible=True), "portable as they are"),
    ],
)
def test_options_of_the_other_library(options: PlanOptions, message: str) -> None:
    """What one library has not is refused before anything is built."""
    with pytest.raises(BuildError, match=message):
        options.check()


@pytest.mark.parametrize("flavour", Flavour)
def test_missing_library(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: what is missing, how to get it, what can be done now."""

    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(engine.importlib, "import_module", refuse)
    with pytest.raises(MissingDependencyError) as caught:
        import_library(flavour)
    text = str(caught.value)
    assert f"--target {flavour} needs the Python package" in text
    assert "pip install tensorrt-rtx" in text
    assert "--target openvino" in text
    assert "\n" not in text


def test_stub_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that holds no library counts as none."""
    monkeypatch.setattr(
        engine.importlib, "import_module", lambda _: SimpleNamespace(__version__="11")
    )
    with pytest.raises(MissingDependencyError, match="finds no such package"):
        import_library(Flavour.TENSORRT)


class _FakeLibrary:
    """A library whose builder finds no GPU, as TensorRT's without a driver."""

    __version__ = "11.1.0"

    class ILogger:
        Severity = SimpleNamespace(ERROR=1)

    @staticmethod
    def Builder(logger: Any) -> Any:  # noqa: N802 - the library's name
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


@needs_rtx
def test_builder_is_checked() -> None:
    """What RTX cannot build for is known before there is a graph."""
    check_builder(rtx(*CAPABILITIES))
    with pytest.raises(BuildError, match=r"cannot build for sm90; .* sm75, sm80"):
        check_builder(rtx("sm90"))
    with pytest.raises(BuildError, match="is no compute capability"):
        check_builder(rtx("9.0"))


def test_no_gpu(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library without a GPU: one line that tells CUDA's reason and the way out."""
    monkeypatch.setattr(engine, "import_library", lambda _: _FakeLibrary)
    engine._shared_logger.cache_clear()
    model = onnx.load_from_string(graphs.float_clean)
    try:
        with pytest.raises(MissingDependencyError, match=r"error: 35.*tensorrt-rtx"):
            parse_network(model, Flavour.TENSORRT)
        with pytest.raises(MissingDependencyError, match=r"error: 35.*tensorrt-rtx"):
            check_builder(PlanOptions())
    finally:
        engine._shared_logger.cache_clear()


@needs_rtx
@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_network_of_a_recipe(calibrated: Calibrated, name: str, recipe: str) -> None:
    """TensorRT's own parser sees every GEMM of the recipe read INT8 on both sides."""
    census = parse_network(project_half(calibrated(name), recipe), Flavour.RTX)
    # ELECTRA's GEMM between embeddings and encoder is quantized too.
    wanted = QUANTIZED[recipe] + (name == "electra")
    check_network(census, Precision.INT8, quantized_gemms=wanted)
    assert census.strongly_typed
    assert sum(census.gemms.values()) == 17 + (name == "electra")
    assert set(census.softmaxes) == set(census.normalizations) == {"half"}
    assert set(census.inputs.values()) == {"INT32 (-1, -1)"}


@needs_rtx
def test_float_network(graphs: Graphs) -> None:
    """The FP16 graph has all GEMMs in half and none in float."""
    model = make_half_graph(onnx.load_from_string(graphs.float_clean))
    census = parse_network(model, Flavour.RTX)
    check_network(census, Precision.FP16, quantized_gemms=0)
    assert dict(census.gemms) == {"half": 17}
    assert census.summary == "half"


@needs_rtx
def test_float32_is_found(graphs: Graphs) -> None:
    """A graph that was not halved is told from one that was."""
    census = parse_network(onnx.load_from_string(graphs.float_clean), Flavour.RTX)
    with pytest.raises(EnginePrecisionError, match="GEMMs read float besides"):
        check_network(census, Precision.FP16, quantized_gemms=0)


@needs_rtx
def test_lost_gemm_is_found(calibrated: Calibrated) -> None:
    """A GEMM with one pair missing is one too few, and named."""
    model = project_half(calibrated("bert"), "linear")
    remove_pair(model, "layer.1/output/dense/input_quantizer")
    census = parse_network(model, Flavour.RTX)
    with pytest.raises(
        EnginePrecisionError, match=r"11 GEMMs read INT8.*recipe has 12"
    ):
        check_network(census, Precision.INT8, quantized_gemms=12)
    assert any("layer.1/output/dense" in name for name in census.other_gemms)


GOOD = NetworkCensus(
    library="11.1.0",
    layers=9,
    strongly_typed=True,
    gemms={"int8": 2, "half": 1},
    softmaxes={"half": 1},
    normalizations={"half": 1},
    other_gemms=("head",),
    inputs={"input_ids": "INT32 (-1, -1)", "attention_mask": "INT32 (-1, -1)"},
    outputs={"start_logits": "FLOAT (-1, -1)", "end_logits": "FLOAT (-1, -1)"},
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strongly_typed": False}, "not strongly typed"),
        ({"gemms": {"half": 3}}, "0 GEMMs read INT8 on both sides, the recipe has 2"),
        ({"gemms": {"int8": 2, "int8+half": 1}}, r"GEMMs read int8\+half"),
        ({"inputs": {"input_ids": "INT64 (-1, -1)"}}, "not INT32"),
        ({"outputs": {"start_logits": "HALF (-1, -1)"}}, "not float logits"),
    ],
)
def test_wrong_network(change: dict[str, Any], message: str) -> None:
    """Each departure is refused by name."""
    check_network(GOOD, Precision.INT8, quantized_gemms=2)
    with pytest.raises(EnginePrecisionError, match=message):
        check_network(
            dataclasses.replace(GOOD, **change), Precision.INT8, quantized_gemms=2
        )


@needs_rtx
def test_parser_errors_name_the_node(calibrated: Calibrated) -> None:
    """An operator TensorRT does not know is named with its node."""
    model = project_half(calibrated("bert"), "linear")
    node = find_node(model, "Erf", "layer.0")
    node.op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"cannot parse.*Erf \(NoSuchOperator\)"):
        parse_network(model, Flavour.RTX)


@needs_rtx
@pytest.mark.parametrize(
    ("recipe", "capabilities"),
    [("float", CAPABILITIES), ("linear", CAPABILITIES), ("full", ("sm75",))],
)
def test_builds(
    calibrated: Calibrated,
    graphs: Graphs,
    recipe: str,
    capabilities: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """Both recipes and FP16 build without a GPU; five capabilities take one builder."""
    model = (
        make_half_graph(onnx.load_from_string(graphs.float_clean))
        if recipe == "float"
        else project_half(calibrated("bert"), recipe)
    )
    steps: list[tuple[str, int, int]] = []
    plan = build_plan(
        model, tmp_path, SMALL, rtx(*capabilities), lambda *step: steps.append(step)
    )
    assert plan.path == tmp_path / "model.plan"
    assert plan.size_bytes == plan.path.stat().st_size
    weights = len(model.SerializeToString())
    assert weights < plan.size_bytes < weights + 8_000_000, "kernels take little"
    assert plan.activation_bytes
    assert steps
    assert all(0 <= done <= max(total, done) for _, done, total in steps)
    assert plan.census.gemms.get("int8", 0) == QUANTIZED.get(recipe, 0)


@needs_rtx
def test_unknown_capability(graphs: Graphs, tmp_path: Path) -> None:
    """A capability this library cannot build for is refused with those it can."""
    model = make_half_graph(onnx.load_from_string(graphs.float_clean))
    with pytest.raises(BuildError, match=r"cannot build for sm60; it can for .*sm75"):
        build_plan(model, tmp_path, SMALL, rtx("sm60"))
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_builder_errors(graphs: Graphs, tmp_path: Path) -> None:
    """What the builder cannot do comes with its own reason: float32 GEMMs on Turing."""
    model = onnx.load_from_string(graphs.float_clean)
    with pytest.raises(ExportError, match=r"for sm75.*FP32 GEMM is not supported"):
        build_plan(model, tmp_path, SMALL, rtx("sm75"))


@needs_rtx
@pytest.mark.parametrize("recipe", ["linear", "gemms", "full"])
def test_attention_fuses(calibrated: Calibrated, recipe: str) -> None:
    """By the builder's own figures, attention keeps no scores in memory."""
    model = project_half(calibrated("bert"), recipe)
    assert engine.measure_growth(model, rtx("sm86"), batch=32, tokens=128) < 2.2


@pytest.mark.parametrize("stated", [(10, 40), (None, 40)])
def test_growth(
    stated: tuple[int | None, int], monkeypatch: pytest.MonkeyPatch, graphs: Graphs
) -> None:
    """Growth compares twice the length; a builder that states no memory is an error."""
    built: list[Profile] = []

    def build(_model: Any, _path: Path, profiles: list[Profile], _options: Any) -> Any:
        built.extend(profiles)
        return SimpleNamespace(activation_bytes=stated[len(built) - 1])

    monkeypatch.setattr(engine, "build_plan", build)
    model = onnx.load_from_string(graphs.float_clean)
    if stated[0] is None:
        with pytest.raises(ExportError, match="states no activation memory"):
            engine.measure_growth(model, rtx())
        return
    assert engine.measure_growth(model, rtx(), batch=4, tokens=64) == 4.0
    assert [profile.most for profile in built] == [(4, 64), (4, 128)]


@needs_rtx
def test_extra_pair_still_builds(calibrated: Calibrated, tmp_path: Path) -> None:
    """A graph the linter complains of is no broken graph: TensorRT builds it."""
    model = project_half(calibrated("bert"), "linear")
    insert_pair(
        model, find_node(model, "MatMul", "layer.0/output/dense").output[0], "x"
    )
    assert build_plan(model, tmp_path, SMALL, rtx("sm89")).size_bytes > 0
