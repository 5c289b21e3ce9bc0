"""Calibrators and recipes side by side: accuracy, speed, size, and why.

In: a checkpoint, questions, recipes, calibrators. Out: one JSON-ready result that the
terminal table and the page are made from. Histograms are collected once and the graph
is exported once per weight set; every variant is a projection of it.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8qa.build.accuracy import (
    Accuracy,
    compare_answers,
    passes_gate,
    share_equal,
)
from int8qa.build.baseline import measure_baseline
from int8qa.build.calibration import Calibrator, Ranges
from int8qa.build.census import take_census
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.engines.openvino import (
    OpenVinoEngine,
    check_execution,
    compile_graph,
)
from int8qa.build.float_parts import Int8Compiler
from int8qa.build.identity import read_versions
from int8qa.build.latency import (
    fit_shapes,
    medians,
    name_shape,
    time_engines,
)
from int8qa.build.manifest import describe_recipe
from int8qa.build.options import LaboratoryOptions
from int8qa.build.pipeline import MAX_BATCH_TOKENS
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import Plan, Recipe
from int8qa.build.quantized import QuantizedReader
from int8qa.build.report import BuildProgress
from int8qa.build.sensitivity import (
    identify_findings,
    list_units,
    measure_sensitivity,
    open_cache,
)
from int8qa.build.subject import (
    Subject,
    data_name,
    load_subject,
    spread_evenly,
)
from int8qa.build.variants import (
    Variant,
    choose_best,
    describe_variant,
    find_pareto,
)
from int8qa.build.verdict import write_verdict
from int8qa.contract import TOKENIZER_FILENAME, Precision

FORMAT_VERSION = 1
GRID_BATCHES = (1, 2, 4, 8)
GRID_LENGTHS = (32, 64, 128, 192, 256, 384)
LATENCY_BUDGET_S = 3.0
"""Per shape and variant; half of it goes to FP16, which takes turns."""
HISTOGRAM_BINS = 256


def compare_calibrators(
    options: LaboratoryOptions, progress: BuildProgress | None = None
) -> dict[str, Any]:
    """Measure every variant.

    Returns:
        The result, of JSON types only; ``comparison.page`` renders it.

    Raises:
        BuildError: the data, the checkpoint or a conversion is at fault.
    """
    options.check()
    groups = len(options.recipes) if options.smoothed_calibrators else 0
    progress = progress or BuildProgress(
        stages=6 + 3 * groups + bool(options.sensitivity_questions)
    )
    with tempfile.TemporaryDirectory(prefix="int8qa-lab-") as scratch:
        return Laboratory(options, Path(scratch), progress).run()


def measure_one(
    options: LaboratoryOptions,
    calibrator: Calibrator,
    *,
    smooth: bool,
    progress: BuildProgress | None = None,
) -> dict[str, Any]:
    """Only the sensitivity of the first recipe with one calibrator."""
    options.check()
    progress = progress or BuildProgress(stages=5)
    with tempfile.TemporaryDirectory(prefix="int8qa-lab-") as scratch:
        laboratory = Laboratory(options, Path(scratch), progress)
        laboratory.measure_floats()
        group = laboratory.prepare([options.recipes[0]], [calibrator], smooth=smooth)
        found = laboratory.measure_sensitivity(group, options.recipes[0], calibrator)
        return found | {"provenance": laboratory.provenance()}


@dataclass(slots=True)
class Group:
    """Variants that share one set of weights and one exported graph."""

    quantized: QuantizedReader
    graph: QuantizedGraph
    ranges: dict[tuple[str, str], Ranges]
    """By recipe and calibrator."""
    smooth: bool


class Laboratory:
    """One comparison under way."""

    def __init__(
        self, options: LaboratoryOptions, scratch: Path, progress: BuildProgress
    ) -> None:
        self.begin = time.monotonic()
        self.started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.options = options
        self.scratch = scratch
        self.progress = progress
        self.files = resolve_checkpoint(options.checkpoint, revision=options.revision)
        with progress.stage(f"load {self.files.name}"):
            self.subject: Subject = load_subject(
                self.files, options.sources, scratch / TOKENIZER_FILENAME
            )
        self.shapes = fit_shapes(self.subject.max_window_tokens)
        self.int8 = Int8Compiler(self.subject.inputs, self.subject.max_window_tokens)
        self.variants: list[Variant] = []
        self.groups: dict[tuple[str, bool], Group] = {}
        """By recipe, and whether it was smoothed."""

    def run(self) -> dict[str, Any]:
        """All stages in order."""
        options = self.options
        self.measure_floats()
        plain = self.prepare(options.recipes, options.calibrators, smooth=False)
        self._measure_variants(plain, "measure variants")
        histograms = describe_histograms(plain, options.calibrators)
        smoothed = options.smoothed_calibrators
        for recipe in options.recipes if smoothed else ():
            group = self.prepare([recipe], smoothed, smooth=True)
            self._measure_variants(group, f"measure {recipe.name} with SmoothQuant")
        sensitivity = None
        if options.sensitivity_questions:
            widest = options.recipes[-1]
            calibrator = next(
                (c for c in options.calibrators if c.method == "search"),
                options.calibrators[0],
            )
            sensitivity = self.measure_sensitivity(plain, widest, calibrator)
        best = choose_best(self.variants)
        front = find_pareto(self.variants, self.baseline.points)
        grid = self._measure_grid(best)
        return {
            "format_version": FORMAT_VERSION,
            "provenance": self.provenance(),
            "floats": self.baseline.describe(),
            "variants": [
                describe_variant(variant, pareto=pareto)
                for variant, pareto in zip(self.variants, front, strict=True)
            ],
            "histograms": histograms,
            "sensitivity": sensitivity,
            "grid": grid,
            "best": best.key,
            "verdict": self._write_verdict(best),
        }

    def provenance(self) -> dict[str, Any]:
        """Where and on what this was measured."""
        sources = self.options.sources
        arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
        return {
            "command": shlex.join(arguments),
            "started_at": self.started_at,
            "seconds": round(time.monotonic() - self.begin, 1),
            "device": self.baseline.device,
            "cores": len(os.sched_getaffinity(0)),
            "versions": read_versions(),
            "checkpoint": self.files.name,
            "checkpoint_sha256": self.files.sha256,
            "data": data_name(sources.evaluation, "evaluation"),
            "questions": len(self.subject.evaluation),
            "calibration_data": data_name(sources.calibration, "calibration"),
            "calibration_windows": len(self.subject.calibration_windows),
            "gate": self.options.gate,
            "recipes": [describe_recipe(recipe) for recipe in self.options.recipes],
        }

    def measure_floats(self) -> None:
        """FP32, which all is held against, and FP16."""
        steps = 2 * len(self.subject.evaluation)
        with self.progress.stage("answer in FP32 and FP16", steps=steps) as tick:
            self.baseline = measure_baseline(
                self.subject,
                self._compile,
                self.shapes,
                budget_s=LATENCY_BUDGET_S,
                on_question=tick,
            )

    def prepare(
        self,
        recipes: Sequence[Recipe],
        calibrators: Sequence[Calibrator],
        *,
        smooth: bool,
    ) -> Group:
        """Quantizers in, one pass over the calibration windows, one export."""
        subject = self.subject
        windows = subject.calibration_windows
        quantized = QuantizedReader(
            subject.load_reader(), windows, subject.inputs, recipes
        )
        what = f"{recipes[0].name} with SmoothQuant" if smooth else "all recipes"
        steps = len(windows) * (2 if smooth else 1)
        with self.progress.stage(f"collect histograms, {what}", steps=steps) as tick:
            if smooth:
                quantized.smooth(calibrators[0], tick)
            quantized.collect(tick)
        ranges: dict[tuple[str, str], Ranges] = {}
        steps = sum(
            quantized.count_tensors(plan) if calibrator.method == "search" else 1
            for plan in quantized.plans.values()
            for calibrator in calibrators
        )
        with self.progress.stage(f"choose ranges, {what}", steps=steps) as tick:
            for name, plan in quantized.plans.items():
                for calibrator in calibrators:
                    ranges[name, calibrator.name] = quantized.choose(
                        calibrator, plan=plan, on_tensor=tick
                    )
                    if calibrator.method != "search":
                        tick()
            widest = quantized.choose(Calibrator("max"))
            graph = quantized.export(widest)
        group = Group(quantized, graph, ranges, smooth)
        self.groups |= {(recipe.name, smooth): group for recipe in recipes}
        return group

    def _compile(self, graph: Any, precision: Precision) -> tuple[OpenVinoEngine, int]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            if precision is Precision.INT8:
                return self.int8.compile(graph, Path(directory))
            return compile_graph(graph, Path(directory), precision)

    def _engine_of(
        self, group: Group, recipe: str, calibrator: str
    ) -> tuple[OpenVinoEngine, int]:
        """The verified INT8 engine of one variant, and its bytes."""
        plan = group.quantized.plans[recipe]
        ranges = group.ranges[recipe, calibrator]
        graph = group.graph.project(plan, ranges)
        take_census(graph, plan, group.quantized.sites, ranges)
        engine, size_bytes = self._compile(graph, Precision.INT8)
        check_execution(
            engine.execution, Precision.INT8, quantized_gemms=plan.quantized_gemms
        )
        return engine, size_bytes

    def _measure_variants(self, group: Group, title: str) -> None:
        with self.progress.stage(title, steps=len(group.ranges)) as tick:
            for recipe, calibrator in group.ranges:
                self._measure_variant(group, recipe, calibrator)
                tick()

    def _measure_variant(self, group: Group, recipe: str, calibrator: str) -> None:
        plan = group.quantized.plans[recipe]
        engine, size_bytes = self._engine_of(group, recipe, calibrator)
        found = self.subject.answer(engine.infer)
        accuracy = compare_answers(
            self.baseline.fp32.answers, found, self.subject.questions
        )
        timed = time_engines(
            {
                "int8": engine.infer,
                "fp16": self.baseline.fp16.engine.infer,
            },
            self.shapes,
            self.subject.inputs,
            budget_s=LATENCY_BUDGET_S,
        )
        self.variants.append(
            Variant(
                recipe=recipe,
                calibrator=calibrator,
                smooth=group.smooth,
                accuracy=accuracy,
                agreement_fp16=share_equal(found, self.baseline.fp16.answers),
                latency=timed,
                size_bytes=size_bytes,
                execution=engine.execution.summary,
                quantized_gemms=plan.quantized_gemms,
                passes_gate=passes_gate(accuracy, self.options.gate),
            )
        )

    def measure_sensitivity(
        self, group: Group, recipe: Recipe, calibrator: Calibrator
    ) -> dict[str, Any]:
        """Every unit of ``recipe`` quantized alone, and left out alone."""
        subject = self.subject
        plan = group.quantized.plans[recipe.name]
        ranges = group.ranges[recipe.name, calibrator.name]
        sample = spread_evenly(subject.evaluation, self.options.sensitivity_questions)
        questions = [item.question for item in sample]
        reference = subject.answer(self.baseline.fp32.engine.infer, sample)

        def measure(part: Plan) -> Accuracy:
            graph = group.graph.project(part, ranges)
            engine, _ = self._compile(graph, Precision.INT8)
            return compare_answers(
                reference, subject.answer(engine.infer, sample), questions
            )

        key = identify_findings(
            plan,
            ranges,
            checkpoint_sha256=self.files.sha256,
            calibration=[item.question for item in subject.calibration],
            calibrator=calibrator,
            smooth=group.smooth,
            evaluation=questions,
            device=self.baseline.device,
        )
        cache = open_cache(self.options.cache, key)
        with self.progress.stage(
            f"sensitivity of {recipe.name} ({calibrator.name})",
            steps=2 * len(list_units(plan)),
        ) as tick:
            if len(cache):
                self.progress.say(f"      {len(cache)} plans are known already")
            units = measure_sensitivity(plan, measure, cache, on_plan=tick)
        return {
            "recipe": recipe.name,
            "calibrator": calibrator.name,
            "smooth": group.smooth,
            "questions": len(sample),
            "units": [asdict(unit) for unit in units],
        }

    def _measure_grid(self, best: Variant) -> dict[str, Any]:
        """INT8, FP16 and FP32 over batch and length."""
        lengths = [n for n in GRID_LENGTHS if n <= self.subject.max_window_tokens]
        shapes = [
            (batch, length)
            for batch in GRID_BATCHES
            for length in lengths
            if batch * length <= MAX_BATCH_TOKENS
        ]
        group = self.groups[best.recipe, best.smooth]
        engine, _ = self._engine_of(group, best.recipe, best.calibrator)
        infers = {"int8": engine.infer, **self.baseline.infers}
        with self.progress.stage("latency grid", steps=len(shapes)) as tick:
            table = medians(
                time_engines(infers, shapes, self.subject.inputs, on_shape=tick)
            )
        return {
            "variant": f"{best.recipe}, {best.label}",
            "batches": list(GRID_BATCHES),
            "lengths": lengths,
            "ms": {
                name: [
                    [table.get(name_shape((b, n)), {}).get(name) for n in lengths]
                    for b in GRID_BATCHES
                ]
                for name in infers
            },
        }

    def _write_verdict(self, best: Variant) -> str:
        latency = {
            shape: {
                "int8": by_name["int8"].p50_ms,
                "fp16": by_name["fp16"].p50_ms,
                # FP32 was timed against FP16, not against this variant.
                "fp32": self.baseline.scale_fp32(shape, by_name["fp16"].p50_ms),
            }
            for shape, by_name in best.latency.items()
        }
        accuracies = {"int8": best.accuracy} | {
            str(name): model.accuracy for name, model in self.baseline.models.items()
        }
        return write_verdict(
            latency,
            accuracies,
            recipe=best.recipe,
            calibrator=best.label,
            device=self.baseline.device,
            gate=self.options.gate,
        ).text


def describe_histograms(
    group: Group, calibrators: Sequence[Calibrator]
) -> list[dict[str, Any]]:
    """Every calibrated tensor once: counts, peak, and where each calibrator cuts."""
    quantized = group.quantized
    plans = sorted(quantized.plans.values(), key=lambda plan: -len(plan.sites))
    described = []
    seen: set[int] = set()
    for site in quantized.plan.activations:
        histogram = quantized.histograms.by_site[site.name]
        if id(histogram) in seen:
            continue
        seen.add(id(histogram))
        counts, edges = histogram.joined(HISTOGRAM_BINS)
        amax = {}
        for calibrator in calibrators:
            # The widest recipe that has it; neither need hold the other's tensors.
            for plan in plans:
                ranges = group.ranges[plan.recipe, calibrator.name]
                if site.name in ranges:
                    amax[calibrator.name] = float(ranges[site.name])
                    break
        described.append(
            {
                "name": site.name,
                "place": site.place,
                "tensor_class": str(site.tensor_class),
                "layer": site.layer,
                "peak": histogram.peak,
                "upper": float(edges[-1]),
                "counts": [int(count) for count in counts],
                "amax": amax,
            }
        )
    return described
