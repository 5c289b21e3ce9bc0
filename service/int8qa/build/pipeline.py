"""The build stage from end to end: checkpoint in, model repository out.

In: :class:`BuildOptions`. Out: a published repository and its manifest. The order of
the calls is the order the data flows; every conversion is held to the one before it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa import __version__
from int8qa.build.accuracy import (
    Accuracy,
    Answers,
    Infer,
    check_gate,
    compare_answers,
)
from int8qa.build.calibration import Ranges
from int8qa.build.census import Census, take_census
from int8qa.build.checkpoint import CheckpointFiles, resolve_checkpoint
from int8qa.build.costs import TIMED_ROUNDS, tabulate_costs, time_batches
from int8qa.build.engines.openvino import (
    OpenVinoEngine,
    check_execution,
    compile_graph,
)
from int8qa.build.engines.tensorrt import check_builder
from int8qa.build.engines.tensorrt_lock import MANIFEST_KEY
from int8qa.build.engines.tensorrt_options import PlanOptions
from int8qa.build.export import export_onnx, wrap_model
from int8qa.build.float_parts import Int8Compiler
from int8qa.build.graph import clean_graph
from int8qa.build.identity import identify_build
from int8qa.build.latency import (
    Latency,
    fit_shapes,
    medians,
    time_engines,
)
from int8qa.build.manifest import (
    MANIFEST_VERSION,
    ServedEngine,
    describe_latencies,
    describe_mixed,
    describe_models,
    describe_recipe,
    describe_trained,
)
from int8qa.build.mixed import MixedPlan, MixedStep, find_mixed_plan, rank_units
from int8qa.build.options import BuildOptions, list_advice
from int8qa.build.parity import COMPILE, EXPORT, HALF, check_parity
from int8qa.build.plans import (
    MeasuredGraph,
    PlanSet,
    build_plans,
    choose_unsmoothed,
    describe_changes,
    describe_plans,
    describe_target,
    sign_softmax,
    summarize_findings,
    tell_seldom,
)
from int8qa.build.quantization import Plan, Recipe
from int8qa.build.quantized import QuantizedReader
from int8qa.build.range_search import LogitProbe
from int8qa.build.reference import run_onnx, run_torch
from int8qa.build.report import BuildProgress
from int8qa.build.repository import (
    StagedRepository,
    find_current,
    read_manifest,
    stage_repository,
)
from int8qa.build.sites import TensorClass
from int8qa.build.stored_ranges import TRAINED, StoredRanges, choose_stored
from int8qa.build.subject import load_subject
from int8qa.build.triton_config import openvino_model_config
from int8qa.build.triton_tensorrt_config import BATCH_SIZES as PLAN_BATCH_SIZES
from int8qa.build.triton_tensorrt_config import MAX_BATCH_TOKENS as PLAN_BATCH_TOKENS
from int8qa.build.verdict import Verdict, write_unmeasured_verdict, write_verdict
from int8qa.contract import (
    TOKENIZER_FILENAME,
    Contract,
    ModelRecord,
    Precision,
)
from int8qa.errors import BuildError

if TYPE_CHECKING:
    import onnx

    from int8qa.build.projection import QuantizedGraph

__all__ = ["BuildOptions", "BuildOutcome", "build_repository", "is_demo"]

BATCH_SIZES = (1, 2, 4, 8)
MAX_BATCH_TOKENS = 1024
"""A CPU gains nothing from larger batches: its cores are full, and they only wait."""
LATENCY_BUDGET_S = 1.0
SERVED = (Precision.INT8, Precision.FP16, Precision.FP32)
"""What OpenVINO serves, in the order of reports."""
MEASURED = "measured"
"""Folder of OpenVINO's models of a build for TensorRT, gone before it is published."""
PARITY_QUESTIONS = 16
"""Questions the export parity is measured on; the engines get all of them."""


@dataclass(frozen=True, slots=True)
class BuildOutcome:
    """What a build left behind."""

    contract: Contract
    manifest: dict[str, Any]
    cached: bool
    """True if the repository was current and nothing was built."""


def build_repository(
    options: BuildOptions, progress: BuildProgress | None = None
) -> BuildOutcome:
    """Build the model repository unless it is current.

    Raises:
        BuildError: any stage failed; the target is as it was.
        MissingDependencyError: torch, ModelOpt or OpenVINO is not installed, or the
            TensorRT that is to build.
    """
    begin = time.monotonic()
    options.check()
    if options.plans is not None:
        check_builder(options.plans)
    files = resolve_checkpoint(options.checkpoint, revision=options.revision)
    build_id, identity = identify_build(options, files)
    if not options.force:
        current = find_current(options.model_repository, build_id)
        if current is not None:
            manifest = read_manifest(options.model_repository)
            return BuildOutcome(current, manifest, cached=True)
    progress = progress or BuildProgress(stages=count_stages(options))
    with stage_repository(options.model_repository) as staged:
        builder = _Build(options, files, staged, progress)
        contract, manifest = builder.run(build_id)
        manifest["inputs"] = identity
        manifest["seconds"] = round(time.monotonic() - begin, 1)
        contract = staged.publish(contract, manifest, beside=options.beside)
    return BuildOutcome(contract, manifest, cached=False)


def is_demo(repository: Path) -> bool:
    """Whether ``repository`` came from default options, of whatever version.

    Such a one may be rebuilt without asking; any other is its owner's.
    """
    try:
        return read_manifest(repository).get("demo") is True
    except BuildError:
        return False


def count_stages(options: BuildOptions) -> int:
    """Stages of a build, for its progress."""
    search = options.calibrator.method == "search"
    # OpenVINO's engines are timed twice over; a plan is built instead, and not timed.
    timing = 1 if options.plans is not None else 2
    return 9 + timing + options.smooth + search + options.mixed


class _Build:
    """One build under way: what later stages need from earlier ones."""

    def __init__(
        self,
        options: BuildOptions,
        files: CheckpointFiles,
        staged: StagedRepository,
        progress: BuildProgress,
    ) -> None:
        self.options = options
        self.files = files
        self.asked = options.choose_recipe(files.directory)
        self.staged = staged
        self.progress = progress
        self.remarks: list[str] = []
        self.trained: StoredRanges | None = None
        """Ranges that the checkpoint brought, if they are used."""
        self.engines: dict[Precision, OpenVinoEngine] = {}
        self.sizes: dict[Precision, int] = {}
        self.graphs: dict[Precision, MeasuredGraph] = {}
        """What the engines were compiled from; kept for TensorRT alone."""

    def run(self, build_id: str) -> tuple[Contract, dict[str, Any]]:
        with self.progress.stage(f"load {self.files.name}"):
            subject = load_subject(
                self.files,
                self.options.sources,
                self.staged.directory / TOKENIZER_FILENAME,
                bucket_step=self.options.bucket_step,
            )
        self.subject = subject
        self.int8 = Int8Compiler(subject.inputs, subject.max_window_tokens)
        reader = wrap_model(subject.checkpoint.model)
        with self.progress.stage("export to ONNX"):
            float_graph = clean_graph(export_onnx(reader, subject.inputs))
        with self.progress.stage("hold ONNX to torch"):
            torch_answers, deviation = self._hold_export(reader, float_graph)
        quantized, ranges, alphas = self._quantize(reader)
        with self.progress.stage("export Q/DQ to ONNX"):
            exported = quantized.export(ranges)
        with self.progress.stage("compile for OpenVINO"):
            for precision in (Precision.FP32, Precision.FP16):
                self._compile(precision, float_graph)
                self._keep(precision, float_graph, quantized_gemms=0)
            census = self._compile_int8(exported, quantized, quantized.plan, ranges)
        answers, deviations = self._hold_engines(torch_answers)
        accuracies = {
            precision: compare_answers(
                answers[Precision.FP32], found, subject.questions
            )
            for precision, found in answers.items()
        }
        infers = {str(name): engine.infer for name, engine in self.engines.items()}
        mixed: MixedPlan | None = None
        if self.options.mixed:
            mixed, answers[Precision.INT8] = self._mix(
                quantized, exported, ranges, answers, accuracies
            )
            accuracies[Precision.INT8] = mixed.accuracy
            if mixed.moved:
                census = self._compile_int8(exported, quantized, mixed.plan, ranges)
                infers["pure int8"] = infers["int8"]
                infers["int8"] = self.engines[Precision.INT8].infer
        latencies = self._time(infers) if self.options.plans is None else {}
        plan = quantized.plan if mixed is None else mixed.plan
        int8 = accuracies[Precision.INT8]
        advice = list_advice(self.options, self.asked)
        self.remarks += check_gate(int8, gate=self.options.gate, advice=advice)
        latency_ms = medians(latencies)
        verdict = self._judge(latency_ms, accuracies)
        built = None
        if self.options.plans is not None:
            built = self._build_plans(self.options.plans)
        with self.progress.stage("write the model repository"):
            self._write_models()
        served = self._list_served(built)
        models = self._model_records(served, accuracies)
        contract, cost_ms = self._time_batches(
            self._contract(build_id, models, verdict)
        )
        execution = self.engines[Precision.INT8].execution
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "build_id": build_id,
            "demo": self.options.is_default,
            "int8qa": __version__,
            "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "checkpoint": {"name": self.files.name, "sha256": self.files.sha256},
            "device": execution.device,
            "capabilities": list(execution.capabilities),
            "recipe": describe_recipe(self.recipe),
            "calibrator": self.calibrator,
            "trained": describe_trained(self.trained),
            "gate": self.options.gate,
            "calibration_questions": 0 if self.trained else len(subject.calibration),
            "calibration_windows": 0 if self.trained else len(quantized.windows),
            "evaluation_questions": len(subject.evaluation),
            "max_logit_deviation": {EXPORT.conversion: deviation, **deviations},
            "census": asdict(census),
            "smoothing_alpha": alphas,
            "activation_amax": {
                site.name: ranges[site.name] for site in plan.activations
            },
            "searched": quantized.chosen,
            "mixed": describe_mixed(mixed, latency_ms),
            "models": describe_models(served, accuracies, answers),
            "float_parts": None if self.int8.parts is None else asdict(self.int8.parts),
            "latency_ms": latency_ms,
            "latency": describe_latencies(latencies),
            "cost_ms": cost_ms,
            "recommended": verdict.recommended,
            "verdict": verdict.text,
            "remarks": self.remarks,
        }
        if built is not None and self.options.plans is not None:
            manifest[MANIFEST_KEY] = describe_plans(
                built, self.options.plans, measured_on=execution.device
            )
        return contract, manifest

    @property
    def recipe(self) -> Recipe:
        """The recipe on grids that the target has."""
        return self.asked if self.options.plans is None else sign_softmax(self.asked)

    @property
    def calibrator(self) -> str:
        """Where the ranges come from."""
        return TRAINED if self.trained else self.options.calibrator.name

    def _quantize(
        self, reader: Any
    ) -> tuple[QuantizedReader, Ranges, dict[str, float]]:
        """Quantizers into the model: ranges by site, smoothing strengths by GEMM."""
        options = self.options
        windows = self.subject.calibration_windows
        quantized = QuantizedReader(reader, windows, self.subject.inputs, [self.recipe])
        leave_out: frozenset[TensorClass] = frozenset()
        if options.plans is not None:
            leave_out = choose_unsmoothed(quantized.plan.sites)
        self.trained = self._find_trained(quantized.plan, leave_out)
        if options.plans is not None:
            self.remarks += describe_changes(
                self.asked,
                quantized.plan,
                smooth=options.smooth and not self.trained,
            )
        if self.trained is not None:
            ranges = self._take_trained(self.trained, reader)
            return quantized, ranges, {}
        alphas: dict[str, float] = {}
        if options.smooth:
            with self.progress.stage("smooth outliers", steps=len(windows)) as tick:
                alphas = quantized.smooth(options.calibrator, tick, leave_out=leave_out)
        with self.progress.stage(
            f"calibrate ({self.asked.name}, {options.calibrator.name})",
            steps=len(windows),
        ) as tick:
            quantized.collect(tick)
            if options.calibrator.method != "search":
                ranges = quantized.choose(options.calibrator)
        if options.calibrator.method == "search":
            with self.progress.stage(
                "search ranges by logit error", steps=quantized.count_tensors()
            ) as tick:
                ranges = quantized.choose(options.calibrator, on_tensor=tick)
        return quantized, ranges, alphas

    def _find_trained(
        self, plan: Plan, leave_out: frozenset[TensorClass]
    ) -> StoredRanges | None:
        """The ranges the checkpoint was trained with, if they are for this build."""
        options = self.options
        stored, difference = choose_stored(
            self.files.directory,
            plan,
            calibrator=None if options.keep_trained else options.calibrator.name,
            smooth=options.smooth,
            leave_out=leave_out,
        )
        if difference:
            remark = (
                f"the ranges {self.files.name} was trained with are left aside, and "
                f"new ones calibrated: {difference}"
            )
            self.progress.say(f"      {remark}")
            self.remarks.append(remark)
        return stored

    def _take_trained(self, trained: StoredRanges, reader: Any) -> Ranges:
        search = self.options.calibrator.method == "search"
        self.progress.skip(self.options.smooth + search)
        with self.progress.stage(
            f"take the ranges it was trained with ({trained.recipe}, "
            f"{trained.calibrator})"
        ):
            trained.apply(reader.model)
        return trained.ranges

    def _hold_export(
        self, reader: Any, graph: onnx.ModelProto
    ) -> tuple[Answers, float]:
        """Torch's answers to a sample, and ONNX's largest deviation from them."""
        subject = self.subject
        sample = subject.evaluation[:PARITY_QUESTIONS]
        expected = subject.answer(run_torch(reader, subject.inputs), sample)
        found = subject.answer(run_onnx(graph), sample)
        questions = [item.question for item in sample]
        return expected, check_parity(EXPORT, expected, found, questions)

    def _compile(
        self, precision: Precision, graph: onnx.ModelProto, plan: Plan | None = None
    ) -> None:
        """The engine of ``precision``, held to what it was asked for."""
        directory = self._engine_directory(precision)
        if precision is Precision.INT8:
            engine, size_bytes = self.int8.compile(graph, directory)
        else:
            engine, size_bytes = compile_graph(graph, directory, precision)
        self.remarks += check_execution(
            engine.execution,
            precision,
            quantized_gemms=plan.quantized_gemms if plan else 0,
            quantized_attentions=plan.quantized_attentions if plan else 0,
        )
        self.engines[precision], self.sizes[precision] = engine, size_bytes

    def _engine_directory(self, precision: Precision) -> Path:
        """Where OpenVINO's model goes: to be served, or only to be measured."""
        if self.options.plans is None:
            return self.staged.model_directory(precision.model_name)
        directory = self.staged.directory / MEASURED / precision.model_name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _keep(
        self, precision: Precision, graph: onnx.ModelProto, *, quantized_gemms: int
    ) -> None:
        """Remember what was measured, if a plan is to be built of it."""
        if self.options.plans is not None:
            self.graphs[precision] = MeasuredGraph(graph, quantized_gemms)

    def _compile_int8(
        self,
        exported: QuantizedGraph,
        quantized: QuantizedReader,
        plan: Plan,
        ranges: Ranges,
    ) -> Census:
        """The INT8 engine of ``plan``, its graph verified first."""
        graph = exported.project(plan, ranges)
        census = take_census(graph, plan, quantized.sites, ranges)
        self._compile(Precision.INT8, graph, plan)
        self._keep(Precision.INT8, graph, quantized_gemms=census.quantized_matmuls)
        return census

    def _hold_engines(
        self, torch_answers: Answers
    ) -> tuple[dict[Precision, Answers], dict[str, float]]:
        """Every engine's answers, and the deviations of the floats."""
        subject = self.subject
        sample = subject.evaluation[:PARITY_QUESTIONS]
        with self.progress.stage("hold engines to torch"):
            compiled = subject.answer(self.engines[Precision.FP32].infer, sample)
            questions = [item.question for item in sample]
            deviations = {
                COMPILE.conversion: check_parity(
                    COMPILE, torch_answers, compiled, questions
                )
            }
        with self.progress.stage(
            "answer the evaluation questions",
            steps=len(self.engines) * len(subject.evaluation),
        ) as tick:
            answers = {
                precision: subject.answer(engine.infer, on_question=tick)
                for precision, engine in self.engines.items()
            }
        deviations[HALF.conversion] = check_parity(
            HALF,
            answers[Precision.FP32],
            answers[Precision.FP16],
            subject.questions,
        )
        return answers, deviations

    def _mix(
        self,
        quantized: QuantizedReader,
        exported: QuantizedGraph,
        ranges: Ranges,
        answers: dict[Precision, Answers],
        accuracies: dict[Precision, Accuracy],
    ) -> tuple[MixedPlan, Answers]:
        """Kernels back to float until the gate is reached, and what it then answers."""
        subject, gate = self.subject, self.options.gate
        scratch = self.staged.directory / "mixed"
        by_plan = {quantized.plan.names: answers[Precision.INT8]}

        def measure(plan: Plan) -> Accuracy:
            scratch.mkdir(exist_ok=True)
            try:
                engine, _ = self.int8.compile(exported.project(plan, ranges), scratch)
                found = subject.answer(engine.infer)
            finally:
                shutil.rmtree(scratch)
            by_plan[plan.names] = found
            return compare_answers(answers[Precision.FP32], found, subject.questions)

        def tell(step: MixedStep) -> None:
            self.progress.say(
                f"      {step.units_in_float} units in float, the last {step.added}: "
                f"{100 * step.f1_ratio:.2f} % of FP32's F1"
            )

        with self.progress.stage("mix precisions"):
            start = accuracies[Precision.INT8]
            if start.f1_ratio >= gate:
                return MixedPlan(quantized.plan, (), start, ()), answers[Precision.INT8]
            probe = LogitProbe(
                quantized.reader, quantized.windows, quantized.plan, subject.inputs
            )
            ranked = rank_units(probe, quantized.plan, ranges)
            mixed = find_mixed_plan(
                quantized.plan,
                [unit for unit, _ in ranked],
                measure,
                gate=gate,
                start=start,
                advice=list_advice(self.options, self.asked),
                on_step=tell,
            )
            return mixed, by_plan[mixed.plan.names]

    def _time(self, infers: Mapping[str, Infer]) -> dict[str, dict[str, Latency]]:
        with self.progress.stage("time the engines"):
            return time_engines(
                infers,
                fit_shapes(self.subject.max_window_tokens),
                self.subject.inputs,
                budget_s=LATENCY_BUDGET_S,
            )

    def _time_batches(
        self, contract: Contract
    ) -> tuple[Contract, dict[str, dict[str, float]]]:
        """The contract with what batches cost, and the medians that it comes from."""
        if self.options.plans is not None:
            return contract, {}
        with self.progress.stage("time the batches", steps=TIMED_ROUNDS) as tick:
            engines = {str(name): one.infer for name, one in self.engines.items()}
            cost_ms = time_batches(contract, engines, on_round=tick)
        batch_ms = tabulate_costs(contract, cost_ms)
        document = contract.model_dump() | {"batch_ms": batch_ms}
        return Contract.model_validate(document), cost_ms

    def _judge(
        self,
        latency_ms: dict[str, dict[str, float]],
        accuracies: dict[Precision, Accuracy],
    ) -> Verdict:
        named = {str(name): accuracy for name, accuracy in accuracies.items()}
        facts: dict[str, Any] = {
            "recipe": self.asked.name,
            "calibrator": self.calibrator,
            "device": self.engines[Precision.INT8].execution.device,
            "gate": self.options.gate,
        }
        if self.options.plans is None:
            return write_verdict(latency_ms, named, **facts)
        return write_unmeasured_verdict(
            named, target=describe_target(self.options.plans), **facts
        )

    def _build_plans(self, options: PlanOptions) -> PlanSet:
        with self.progress.stage(f"build for {describe_target(options)}"):
            built = build_plans(
                self.graphs,
                self.staged,
                self.subject,
                options,
                on_step=lambda precision: tell_seldom(
                    self.progress.say, str(precision)
                ),
            )
        self.remarks += summarize_findings(built.findings)
        return built

    def _list_served(self, built: PlanSet | None) -> dict[Precision, ServedEngine]:
        if built is not None:
            return {
                name: ServedEngine(
                    plan.census.summary, plan.census.gemms, plan.size_bytes
                )
                for name, plan in built.plans.items()
            }
        executions = {name: self.engines[name].execution for name in SERVED}
        return {
            name: ServedEngine(one.summary, one.gemms, self.sizes[name], one.attentions)
            for name, one in executions.items()
        }

    def _model_records(
        self,
        served: Mapping[Precision, ServedEngine],
        accuracies: Mapping[Precision, Accuracy],
    ) -> dict[Precision, ModelRecord]:
        def record(precision: Precision, engine: ServedEngine) -> ModelRecord:
            int8 = precision is Precision.INT8
            recipe = self.asked.name + ("+mixed" if self.options.mixed else "")
            return ModelRecord(
                name=precision.model_name,
                engine=self.options.target,
                calibrator=self.calibrator if int8 else "none",
                recipe=recipe if int8 else "none",
                f1=round(accuracies[precision].f1, 3),
                exact_match=round(accuracies[precision].exact_match, 3),
                size_bytes=engine.size_bytes,
                execution=engine.execution,
            )

        return {name: record(name, engine) for name, engine in served.items()}

    def _write_models(self) -> None:
        if self.options.plans is not None:  # plans are already in their places
            shutil.rmtree(self.staged.directory / MEASURED)
            return
        source = Path(str(resources.files("int8qa.build.engines")))
        for precision in Precision:
            directory = self.staged.model_directory(precision.model_name)
            shutil.copyfile(source / "triton_openvino_model.py", directory / "model.py")
            self.staged.write_config(
                precision.model_name,
                openvino_model_config(
                    precision,
                    inputs=self.subject.inputs,
                    sequence_buckets=self.subject.buckets,
                    batch_sizes=BATCH_SIZES,
                    max_batch_tokens=MAX_BATCH_TOKENS,
                ),
            )

    def _contract(
        self,
        build_id: str,
        models: dict[Precision, ModelRecord],
        verdict: Verdict,
    ) -> Contract:
        subject = self.subject
        on_cpu = self.options.plans is None
        return Contract(
            build_id=build_id,
            checkpoint=self.files.name,
            tokenizer_sha256=subject.tokenizer.fingerprint,
            pad_token_id=subject.checkpoint.pad_token_id,
            inputs=subject.inputs,
            max_window_tokens=subject.max_window_tokens,
            sequence_buckets=subject.buckets,
            batch_sizes=BATCH_SIZES if on_cpu else PLAN_BATCH_SIZES,
            max_batch_tokens=MAX_BATCH_TOKENS if on_cpu else PLAN_BATCH_TOKENS,
            models=models,
            recommended=None
            if verdict.recommended is None
            else Precision(verdict.recommended),
            verdict=verdict.text,
        )
