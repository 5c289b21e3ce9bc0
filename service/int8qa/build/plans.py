"""TensorRT's plans, from the very graphs whose accuracy was measured on the CPU.

In: float32 graphs with and without Q/DQ, a staged repository, plan options. Out: plans
with their configurations in it, and what the manifest says of them. Also what a recipe
must leave to suit TensorRT, and where a graph still does not. Runs no plan.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa.build.calibration import Calibrator
from int8qa.build.engines.tensorrt import BuiltPlan, OnStep, build_plan
from int8qa.build.engines.tensorrt_census import check_network
from int8qa.build.engines.tensorrt_lock import read_builder_lock
from int8qa.build.engines.tensorrt_options import (
    Flavour,
    PlanOptions,
    Profile,
    choose_profiles,
)
from int8qa.build.export import wrap_model
from int8qa.build.fusion import Finding, lint_graph
from int8qa.build.half_graph import make_half_graph
from int8qa.build.parity import check_halved
from int8qa.build.quantization import Plan, Recipe
from int8qa.build.quantized import QuantizedReader
from int8qa.build.reference import run_onnx
from int8qa.build.repository import StagedRepository
from int8qa.build.sites import Site, TensorClass
from int8qa.build.subject import Subject
from int8qa.build.triton_tensorrt_config import (
    BATCH_SIZES,
    rtx_model_config,
    tensorrt_model_config,
)
from int8qa.contract import Precision

if TYPE_CHECKING:
    import onnx

PRECISIONS = (Precision.INT8, Precision.FP16)
"""What is built. FP32 is the reference, measured on the CPU; SM75 has no such GEMMs in
a strongly typed network, and nobody serves it on a GPU."""
HELD_QUESTIONS = 8
"""Questions the float16 graphs are held to: a CPU without float16 takes a second for
each window of a small model."""
EXPLAIN_WINDOWS = 4
"""Calibration windows for a graph that is only looked at: its numbers do not matter."""
TELL_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class MeasuredGraph:
    """A float32 graph whose accuracy is known."""

    model: onnx.ModelProto
    quantized_gemms: int
    """MatMuls that read INT8 on both sides (census.Census.quantized_matmuls)."""


def sign_softmax(recipe: Recipe) -> Recipe:
    """The recipe on grids that TensorRT has: it knows no unsigned INT8."""
    return replace(recipe, unsigned_softmax=False)


def choose_unsmoothed(sites: Sequence[Site]) -> frozenset[TensorClass]:
    """What SmoothQuant must leave alone for TensorRT to fuse INT8 attention.

    A smoothed context has a product before its quantizer; only with a float value does
    it fold into the value GEMM. Source: docs/tensorrt.md.
    """
    quantizes_value = any(site.tensor_class is TensorClass.VALUE for site in sites)
    return frozenset({TensorClass.CONTEXT} if quantizes_value else ())


def describe_changes(recipe: Recipe, plan: Plan, *, smooth: bool) -> list[str]:
    """Remarks on what a build for TensorRT does otherwise than asked.

    Args:
        recipe: as asked for.
        plan: of it, for this model.
        smooth: whether SmoothQuant was asked for.
    """
    remarks = []
    classes = {site.tensor_class for site in plan.sites}
    if recipe.unsigned_softmax and TensorClass.SOFTMAX in classes:
        remarks.append(
            "TensorRT has no unsigned INT8: softmax is quantized to -127 … 127 "
            "(unsigned_softmax: false), at twice the step"
        )
    if smooth and choose_unsmoothed(plan.sites) & classes:
        remarks.append(
            "attention's context is left out of SmoothQuant: smoothed, it would keep "
            "TensorRT from fusing INT8 attention"
        )
    return remarks


def list_fusion_blocks(
    subject: Subject, recipe: Recipe, *, smooth: bool
) -> list[Finding]:
    """What a build for TensorRT would find in the way of fusions; changes the reader.

    Args:
        subject: its checkpoint gets quantizers.
        recipe: as asked for.
        smooth: whether SmoothQuant is part of the build.
    """
    quantized = QuantizedReader(
        wrap_model(subject.checkpoint.model),
        subject.calibration_windows[:EXPLAIN_WINDOWS],
        subject.inputs,
        [sign_softmax(recipe)],
    )
    calibrator = Calibrator("max")
    if smooth:
        quantized.smooth(calibrator, leave_out=choose_unsmoothed(quantized.plan.sites))
    quantized.collect()
    ranges = quantized.choose(calibrator)
    graph = quantized.export(ranges).project(quantized.plan, ranges)
    return lint_graph(make_half_graph(graph), max_tokens=subject.max_window_tokens)


@dataclass(frozen=True, slots=True)
class PlanSet:
    """The plans of one build."""

    plans: Mapping[Precision, BuiltPlan]
    half_errors: Mapping[str, float]
    """RMS error of float16's logits over their spread, by precision."""
    findings: tuple[Finding, ...]
    """Where INT8 keeps TensorRT from fusing."""
    profiles: tuple[Profile, ...]


def build_plans(
    graphs: Mapping[Precision, MeasuredGraph],
    staged: StagedRepository,
    subject: Subject,
    options: PlanOptions,
    *,
    on_step: Callable[[Precision], OnStep],
) -> PlanSet:
    """Halve, hold, build and configure each of ``PRECISIONS`` in ``staged``.

    Args:
        graphs: by precision, cleaned.
        staged: gets a model directory each.
        subject: whose graphs they are.
        options: how to build.
        on_step: what to tell of a precision's progress.

    Raises:
        ExportError: a graph cannot be halved, parsed or built.
        ParityError: float16 changed the answers.
        EnginePrecisionError: the network has other types than asked for.
    """
    profiles = choose_profiles(
        options.flavour, sequence_buckets=subject.buckets, batch_sizes=BATCH_SIZES
    )
    plans: dict[Precision, BuiltPlan] = {}
    errors: dict[str, float] = {}
    findings: list[Finding] = []
    for precision in PRECISIONS:
        graph = graphs[precision]
        half = make_half_graph(graph.model)
        errors[str(precision)] = _hold_half(graph.model, half, subject)
        if precision is Precision.INT8:
            findings = lint_graph(half, max_tokens=subject.max_window_tokens)
        plan = build_plan(
            half,
            staged.model_directory(precision.model_name),
            profiles,
            options,
            on_step(precision),
        )
        check_network(plan.census, precision, quantized_gemms=graph.quantized_gemms)
        plans[precision] = plan
        _configure(precision, staged, subject, options.flavour, profiles)
    return PlanSet(plans, errors, tuple(findings), profiles)


def _hold_half(
    whole: onnx.ModelProto, half: onnx.ModelProto, subject: Subject
) -> float:
    """What float16 moves in the logits, in ONNX Runtime on the CPU."""
    items = subject.evaluation[:HELD_QUESTIONS]
    expected, found = (
        subject.answer(run_onnx(graph), items) for graph in (whole, half)
    )
    return check_halved(expected, found)


def _configure(
    precision: Precision,
    staged: StagedRepository,
    subject: Subject,
    flavour: Flavour,
    profiles: Sequence[Profile],
) -> None:
    """``config.pbtxt``, and for RTX the code that Triton runs."""
    shapes: dict[str, Any] = {
        "inputs": subject.inputs,
        "sequence_buckets": subject.buckets,
        "batch_sizes": BATCH_SIZES,
    }
    if flavour is Flavour.TENSORRT:
        config = tensorrt_model_config(precision, profiles=profiles, **shapes)
    else:
        config = rtx_model_config(precision, **shapes)
        source = Path(str(resources.files("int8qa.build.engines")))
        shutil.copyfile(
            source / "triton_tensorrt_rtx_model.py",
            staged.model_directory(precision.model_name) / "model.py",
        )
    staged.write_config(precision.model_name, config)


def describe_plans(
    built: PlanSet, options: PlanOptions, *, measured_on: str
) -> dict[str, Any]:
    """The manifest's part about plans, of JSON types.

    Args:
        built: the plans.
        options: how they were built.
        measured_on: the CPU that the graphs' accuracy was measured on.
    """
    return {
        "lock": read_builder_lock(options).describe(),
        "accuracy": f"of the same graphs in OpenVINO on {measured_on}: evidence for "
        f"the graphs. No plan was run, no speed measured",
        "profiles": [asdict(profile) for profile in built.profiles],
        "findings": [str(finding) for finding in built.findings],
        "models": {
            str(precision): {
                "seconds": round(plan.seconds, 1),
                "size_bytes": plan.size_bytes,
                "activation_bytes": plan.activation_bytes,
                "half_error": round(built.half_errors[str(precision)], 4),
                "network": asdict(plan.census),
            }
            for precision, plan in built.plans.items()
        },
    }


def describe_target(options: PlanOptions) -> str:
    """For people: ``tensorrt-rtx 1.7.1 on sm80, sm89``."""
    lock = read_builder_lock(options)
    capabilities = ", ".join(lock.compute_capabilities)
    where = lock.gpu if options.flavour is Flavour.TENSORRT else capabilities
    return f"{lock.library} {lock.version} on {where or capabilities or 'this GPU'}"


def summarize_findings(findings: Sequence[Finding]) -> list[str]:
    """One remark on what keeps TensorRT from fusing; none if nothing does."""
    if not findings:
        return []
    rules = sorted({finding.rule.name for finding in findings})
    remark = (
        f"{len(findings)} places in the INT8 graph may keep TensorRT from fusing "
        f"({', '.join(rules)}): `int8qa build --explain --target …` lists them"
    )
    return [remark]


def tell_seldom(say: Callable[[str], None], label: str) -> OnStep:
    """Pass on a builder's steps, at most one each ``TELL_EVERY_S`` seconds."""
    last = time.monotonic()

    def tell(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TELL_EVERY_S:
            last = now
            say(f"      {label}: {phase}, {done}/{total}")

    return tell
