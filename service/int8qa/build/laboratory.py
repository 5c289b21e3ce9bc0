"""Calibrators and recipes side by side: accuracy, speed, size, and why.

In: a checkpoint, questions, recipes, calibrators. Out: one JSON-ready result that the
terminal table and the page are made from. Histograms are collected once and the graph
is exported once per weight set; every variant is a projection of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from int8qa.build.accuracy import (
    DEFAULT_GATE,
    Accuracy,
    Answers,
    compare_answers,
    passes_gate,
    share_equal,
)
from int8qa.build.calibration import Calibrator, Ranges
from int8qa.build.census import take_census
from int8qa.build.checkpoint import demo_checkpoint_directory, resolve_checkpoint
from int8qa.build.engines.openvino import (
    OpenVinoEngine,
    check_execution,
    compile_graph,
)
from int8qa.build.export import export_onnx
from int8qa.build.graph import clean_graph
from int8qa.build.latency import Latency, medians, name_shape, time_engines
from int8qa.build.parity import HALF, check_parity
from int8qa.build.pipeline import (
    LATENCY_SHAPES,
    MAX_BATCH_TOKENS,
    describe_recipe,
    read_versions,
)
from int8qa.build.projection import QuantizedGraph
from int8qa.build.quantization import RECIPES, Plan, Recipe
from int8qa.build.quantized import QuantizedReader
from int8qa.build.report import BuildProgress, geometric_mean
from int8qa.build.sensitivity import FindingCache, list_units, measure_sensitivity
from int8qa.build.subject import (
    QuestionSources,
    Subject,
    data_name,
    load_subject,
    spread_evenly,
)
from int8qa.build.verdict import write_verdict
from int8qa.contract import TOKENIZER_FILENAME, Precision
from int8qa.errors import BuildError

FORMAT_VERSION = 1
ALL_CALIBRATORS = (
    Calibrator("max"),
    Calibrator("percentile", 99.9),
    Calibrator("percentile", 99.99),
    Calibrator("percentile", 99.999),
    Calibrator("percentile", 99.9999),
    Calibrator("mse"),
    Calibrator("entropy"),
    Calibrator("search"),
)
SMOOTHED_CALIBRATORS = (Calibrator("percentile", 99.999), Calibrator("search"))
"""What SmoothQuant is tried with: the default and the search."""
GRID_BATCHES = (1, 2, 4, 8)
GRID_LENGTHS = (32, 64, 128, 192, 256, 384)
LATENCY_BUDGET_S = 3.0
"""Per shape and variant; half of it goes to FP16, which takes turns."""
HISTOGRAM_BINS = 256
NEARLY_AS_FAST = 0.95
"""A variant this near to the fastest counts as fast as it: less is noise."""


@dataclass(frozen=True, slots=True)
class LaboratoryOptions:
    """What is compared, on what."""

    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    sources: QuestionSources = field(default_factory=QuestionSources)
    recipes: tuple[Recipe, ...] = tuple(RECIPES.values())
    calibrators: tuple[Calibrator, ...] = ALL_CALIBRATORS
    smooth: bool = True
    """Also with SmoothQuant."""
    gate: float = DEFAULT_GATE
    sensitivity_questions: int = 100
    """Evenly spaced over the evaluation questions; 0 leaves sensitivity out."""
    cache: Path | None = None
    """Directory of the sensitivity's findings; None: by XDG_CACHE_HOME."""

    def check(self) -> None:
        """Refuse what cannot work before anything slow begins."""
        self.sources.check()
        if not self.recipes or not self.calibrators:
            raise BuildError("nothing to compare: give a recipe and a calibrator")
        if len({recipe.name for recipe in self.recipes}) < len(self.recipes):
            raise BuildError("two recipes have the same name; rename one of them")
        names = [calibrator.name for calibrator in self.calibrators]
        for name in names:
            if names.count(name) > 1:
                raise BuildError(f"the calibrator {name} is given twice; once will do")


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
    groups = len(options.recipes) if options.smooth else 0
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
class _Group:
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
        self.floats: dict[Precision, OpenVinoEngine] = {}
        self.answers: dict[Precision, Answers] = {}
        self.sizes: dict[Precision, int] = {}
        self.shapes = list(
            dict.fromkeys(
                (batch, min(length, self.subject.max_window_tokens))
                for batch, length in LATENCY_SHAPES
            )
        )
        self.variants: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All stages in order."""
        options = self.options
        self.measure_floats()
        plain = self.prepare(options.recipes, options.calibrators, smooth=False)
        count = len(options.recipes) * len(options.calibrators)
        with self.progress.stage("measure variants", steps=count) as tick:
            for name, calibrator_name in plain.ranges:
                self._measure_variant(plain, name, calibrator_name)
                tick()
        histograms = describe_histograms(plain, options.calibrators)
        if options.smooth:
            for recipe in options.recipes:
                group = self.prepare([recipe], SMOOTHED_CALIBRATORS, smooth=True)
                with self.progress.stage(
                    f"measure {recipe.name} with SmoothQuant", steps=len(group.ranges)
                ) as tick:
                    for name, calibrator_name in group.ranges:
                        self._measure_variant(group, name, calibrator_name)
                        tick()
        sensitivity = None
        if options.sensitivity_questions:
            widest = options.recipes[-1]
            calibrator = next(
                (c for c in options.calibrators if c.method == "search"),
                options.calibrators[0],
            )
            sensitivity = self.measure_sensitivity(plain, widest, calibrator)
        self._mark_pareto()
        best = self._choose_best()
        grid = self._measure_grid(best)
        return {
            "format_version": FORMAT_VERSION,
            "provenance": self.provenance(),
            "floats": self._describe_floats(),
            "variants": [
                {key: value for key, value in variant.items() if key != "graph"}
                for variant in self.variants
            ],
            "histograms": histograms,
            "sensitivity": sensitivity,
            "grid": grid,
            "best": {key: best[key] for key in ("recipe", "calibrator", "smooth")},
            "verdict": self._write_verdict(best),
        }

    def provenance(self) -> dict[str, Any]:
        """Where and on what this was measured."""
        engine = self.floats[Precision.FP32]
        sources = self.options.sources
        arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
        return {
            "command": shlex.join(arguments),
            "started_at": self.started_at,
            "seconds": round(time.monotonic() - self.begin, 1),
            "device": engine.execution.device,
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
        subject = self.subject
        with self.progress.stage(
            "answer in FP32 and FP16", steps=2 * len(subject.evaluation)
        ) as tick:
            graph = clean_graph(export_onnx(subject.load_reader(), subject.inputs))
            for precision in (Precision.FP32, Precision.FP16):
                self.floats[precision], self.sizes[precision] = self._compile(
                    graph, precision
                )
                check_execution(
                    self.floats[precision].execution, precision, quantized_gemms=0
                )
                self.answers[precision] = subject.answer(
                    self.floats[precision].infer, on_question=tick
                )
            check_parity(
                HALF,
                self.answers[Precision.FP32],
                self.answers[Precision.FP16],
                subject.questions,
            )
            self.float_latency = time_engines(
                {str(name): engine.infer for name, engine in self.floats.items()},
                self.shapes,
                subject.inputs,
                budget_s=LATENCY_BUDGET_S,
            )

    def prepare(
        self,
        recipes: Sequence[Recipe],
        calibrators: Sequence[Calibrator],
        *,
        smooth: bool,
    ) -> _Group:
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
        return _Group(quantized, graph, ranges, smooth)

    def _compile(self, graph: Any, precision: Precision) -> tuple[OpenVinoEngine, int]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            return compile_graph(graph, Path(directory), precision)

    def _engine_of(
        self, group: _Group, plan: Plan, ranges: Ranges
    ) -> tuple[OpenVinoEngine, int]:
        """The verified INT8 engine of one plan, and its bytes."""
        graph = group.graph.project(plan, ranges)
        take_census(graph, plan, group.quantized.sites, ranges)
        engine, size_bytes = self._compile(graph, Precision.INT8)
        check_execution(
            engine.execution, Precision.INT8, quantized_gemms=plan.quantized_gemms
        )
        return engine, size_bytes

    def _measure_variant(self, group: _Group, recipe: str, calibrator: str) -> None:
        plan = group.quantized.plans[recipe]
        ranges = group.ranges[recipe, calibrator]
        engine, size_bytes = self._engine_of(group, plan, ranges)
        found = self.subject.answer(engine.infer)
        accuracy = compare_answers(
            self.answers[Precision.FP32], found, self.subject.questions
        )
        timed = time_engines(
            {
                "int8": engine.infer,
                "fp16": self.floats[Precision.FP16].infer,
            },
            self.shapes,
            self.subject.inputs,
            budget_s=LATENCY_BUDGET_S,
        )
        self.variants.append(
            {
                "recipe": recipe,
                "calibrator": calibrator,
                "smooth": group.smooth,
                "label": calibrator + (" + SmoothQuant" if group.smooth else ""),
                **_describe_accuracy(accuracy),
                "agreement_fp32": accuracy.agreement,
                "agreement_fp16": share_equal(found, self.answers[Precision.FP16]),
                "latency_ms": {
                    shape: {
                        "p50": by_name["int8"].p50_ms,
                        "p99": by_name["int8"].p99_ms,
                        "p50_fp16": by_name["fp16"].p50_ms,
                        "runs": by_name["int8"].runs,
                    }
                    for shape, by_name in timed.items()
                },
                "size_bytes": size_bytes,
                "execution": engine.execution.summary,
                "quantized_gemms": plan.quantized_gemms,
                "passes_gate": passes_gate(accuracy, self.options.gate),
                "pareto": False,
                "graph": (group, plan, ranges, accuracy),
            }
        )

    def measure_sensitivity(
        self, group: _Group, recipe: Recipe, calibrator: Calibrator
    ) -> dict[str, Any]:
        """Every unit of ``recipe`` quantized alone, and left out alone."""
        subject = self.subject
        plan = group.quantized.plans[recipe.name]
        ranges = group.ranges[recipe.name, calibrator.name]
        sample = spread_evenly(subject.evaluation, self.options.sensitivity_questions)
        questions = [item.question for item in sample]
        reference = subject.answer(self.floats[Precision.FP32].infer, sample)

        def measure(part: Plan) -> Accuracy:
            graph = group.graph.project(part, ranges)
            engine, _ = self._compile(graph, Precision.INT8)
            return compare_answers(
                reference, subject.answer(engine.infer, sample), questions
            )

        key = hashlib.sha256(
            json.dumps(
                [
                    self.files.sha256,
                    sorted(question.id for question in questions),
                    {name: _round(amax) for name, amax in ranges.items()},
                    group.smooth,
                    read_versions(),
                    self.floats[Precision.FP32].execution.device,
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()
        directory = self.options.cache or default_cache()
        cache = FindingCache(directory / f"sensitivity-{key[:16]}.jsonl", key)
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
            "units": [
                {
                    "name": unit.name,
                    "layer": unit.layer,
                    "kernel": unit.kernel,
                    "tensor_class": unit.tensor_class,
                    "group": unit.group,
                    "only": asdict(unit.only),
                    "all_but": asdict(unit.all_but),
                }
                for unit in units
            ],
        }

    def _describe_floats(self) -> dict[str, Any]:
        described = {}
        for precision, engine in self.floats.items():
            accuracy = self._float_accuracy(precision)
            described[str(precision)] = {
                "f1": accuracy.f1,
                "exact_match": accuracy.exact_match,
                "f1_ratio": accuracy.f1_ratio,
                "agreement_fp32": accuracy.agreement,
                "rms_logit_error": accuracy.rms_logit_error,
                "size_bytes": self.sizes[precision],
                "execution": engine.execution.summary,
                "latency_ms": {
                    shape: _describe_latency(by_name[str(precision)])
                    for shape, by_name in self.float_latency.items()
                },
            }
        return described

    def _float_accuracy(self, precision: Precision) -> Accuracy:
        return compare_answers(
            self.answers[Precision.FP32],
            self.answers[precision],
            self.subject.questions,
        )

    def _mark_pareto(self) -> None:
        """No other variant, FP32 and FP16 included, is both faster and better."""
        points = [(gain_of(v), v["f1_ratio"]) for v in self.variants]
        floats = [
            (self._gain_of_float(precision), self._float_accuracy(precision).f1_ratio)
            for precision in self.floats
        ]
        for variant, (gain, ratio) in zip(self.variants, points, strict=True):
            variant["pareto"] = not any(
                (g >= gain and r > ratio) or (g > gain and r >= ratio)
                for g, r in points + floats
            )

    def _gain_of_float(self, precision: Precision) -> float:
        """Speed against FP16, as :func:`gain_of`."""
        times = self.float_latency.values()
        return geometric_mean(
            [time["fp16"].p50_ms / time[str(precision)].p50_ms for time in times]
        )

    def _choose_best(self) -> dict[str, Any]:
        """Of the variants nearly as fast as the fastest that passes: the truest.

        By the logits' error, not by F1: between good variants F1 differs by chance.
        """
        passing = [v for v in self.variants if v["passes_gate"]] or self.variants
        fastest = max(gain_of(variant) for variant in passing)
        fast = [v for v in passing if gain_of(v) >= NEARLY_AS_FAST * fastest]
        best: dict[str, Any] = min(fast, key=lambda v: v["rms_logit_error"])
        return best

    def _measure_grid(self, best: dict[str, Any]) -> dict[str, Any]:
        """INT8, FP16 and FP32 over batch and length."""
        lengths = [n for n in GRID_LENGTHS if n <= self.subject.max_window_tokens]
        shapes = [
            (batch, length)
            for batch in GRID_BATCHES
            for length in lengths
            if batch * length <= MAX_BATCH_TOKENS
        ]
        engine, _ = self._engine_of(*best["graph"][:3])
        infers = {"int8": engine.infer} | {
            str(name): other.infer for name, other in self.floats.items()
        }
        with self.progress.stage("latency grid", steps=len(shapes)) as tick:
            table = medians(
                time_engines(infers, shapes, self.subject.inputs, on_shape=tick)
            )
        return {
            "variant": f"{best['recipe']}, {best['label']}",
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

    def _write_verdict(self, best: dict[str, Any]) -> str:
        latency = {
            shape: {
                "int8": times["p50"],
                "fp16": times["p50_fp16"],
                # FP32 was timed against FP16, not against this variant.
                "fp32": times["p50_fp16"]
                * self.float_latency[shape]["fp32"].p50_ms
                / self.float_latency[shape]["fp16"].p50_ms,
            }
            for shape, times in best["latency_ms"].items()
        }
        accuracies = {
            "int8": best["graph"][3],
            "fp16": self._float_accuracy(Precision.FP16),
            "fp32": self._float_accuracy(Precision.FP32),
        }
        return write_verdict(
            latency,
            accuracies,
            recipe=best["recipe"],
            calibrator=best["label"],
            device=self.floats[Precision.FP32].execution.device,
            gate=self.options.gate,
        ).text


def gain_of(variant: dict[str, Any]) -> float:
    """Speed against FP16: the geometric mean over the shapes."""
    times = variant["latency_ms"].values()
    return geometric_mean([time["p50_fp16"] / time["p50"] for time in times])


def describe_histograms(
    group: _Group, calibrators: Sequence[Calibrator]
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


def default_cache() -> Path:
    """Where findings are kept: ``$XDG_CACHE_HOME/int8qa``, else ``~/.cache/int8qa``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "int8qa"


def _describe_accuracy(accuracy: Accuracy) -> dict[str, float]:
    return {
        "f1": accuracy.f1,
        "exact_match": accuracy.exact_match,
        "f1_ratio": accuracy.f1_ratio,
        "f1_ratio_margin": accuracy.f1_ratio_margin,
        "rms_logit_error": accuracy.rms_logit_error,
        "max_logit_deviation": accuracy.max_logit_deviation,
    }


def _describe_latency(latency: Latency) -> dict[str, float]:
    return {"p50": latency.p50_ms, "p99": latency.p99_ms, "runs": latency.runs}


def _round(amax: Any) -> float:
    """One number that tells ranges apart, per-channel ones by their sum."""
    return round(amax if isinstance(amax, float) else float(amax.sum()), 6)
