"""The build stage from end to end: checkpoint in, model repository out.

In: :class:`BuildOptions`. Out: a published repository and its manifest. The order of
the calls is the order the data flows; every conversion is held to the one before it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa import __version__
from int8qa.build.accuracy import (
    DEFAULT_GATE,
    Accuracy,
    Answers,
    check_gate,
    compare_answers,
    share_equal,
)
from int8qa.build.calibration import Calibrator, Ranges
from int8qa.build.census import Census, take_census
from int8qa.build.checkpoint import (
    CheckpointFiles,
    demo_checkpoint_directory,
    resolve_checkpoint,
)
from int8qa.build.engines.openvino import (
    PRECISION_HINTS,
    OpenVinoEngine,
    check_execution,
    compile_graph,
)
from int8qa.build.export import export_onnx, wrap_model
from int8qa.build.graph import clean_graph
from int8qa.build.latency import medians, time_engines
from int8qa.build.mixed import MixedPlan, MixedStep, find_mixed_plan, rank_units
from int8qa.build.parity import COMPILE, EXPORT, HALF, check_parity
from int8qa.build.quantization import RECIPES, Plan, Recipe
from int8qa.build.quantized import QuantizedReader
from int8qa.build.range_search import LogitProbe
from int8qa.build.report import BuildProgress
from int8qa.build.repository import (
    StagedRepository,
    find_current,
    hash_file,
    read_manifest,
    stage_repository,
)
from int8qa.build.subject import QuestionSources, data_name, load_subject
from int8qa.build.triton_config import openvino_model_config
from int8qa.build.verdict import Verdict, write_verdict
from int8qa.contract import (
    TOKENIZER_FILENAME,
    Contract,
    ModelRecord,
    Precision,
)
from int8qa.errors import BuildError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

    from int8qa.build.projection import QuantizedGraph

MANIFEST_VERSION = 2
BATCH_SIZES = (1, 2, 4, 8)
MAX_BATCH_TOKENS = 1024
"""A CPU gains nothing from larger batches: its cores are full, and they only wait."""
LATENCY_SHAPES = ((1, 128), (1, 384), (8, 128))
LATENCY_BUDGET_S = 1.0
PARITY_QUESTIONS = 16
"""Questions the export parity is measured on; the engines get all of them."""
_VERSIONED = ("torch", "transformers", "nvidia-modelopt", "onnx", "openvino")
_CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything a build depends on besides the code and the machine."""

    model_repository: Path = Path("model_repository")
    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    recipe: Recipe = RECIPES["linear"]
    calibrator: Calibrator = field(default_factory=Calibrator)
    sources: QuestionSources = field(default_factory=QuestionSources)
    smooth: bool = True
    """SmoothQuant before calibration; see smoothing.py."""
    gate: float = DEFAULT_GATE
    mixed: bool = False
    """Leave the most sensitive kernels in float until the gate is reached."""
    force: bool = False
    """Rebuild even if the repository is current."""

    @property
    def is_default(self) -> bool:
        """Whether nothing was chosen but the place."""
        plain = BuildOptions(model_repository=self.model_repository, force=self.force)
        return self == plain


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
        MissingDependencyError: torch, ModelOpt or OpenVINO is not installed.
    """
    begin = time.monotonic()
    _check_options(options)
    files = resolve_checkpoint(options.checkpoint, revision=options.revision)
    build_id, identity = _identify(options, files)
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
        staged.publish(contract, manifest)
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
    return 10 + options.smooth + search + options.mixed


def _choices(options: BuildOptions, files: CheckpointFiles) -> dict[str, Any]:
    """What a user chose, apart from what the files and the machine made of it."""
    sources = options.sources
    return {
        "checkpoint": files.name,
        "recipe": describe_recipe(options.recipe),
        "calibrator": options.calibrator.name,
        "smooth": options.smooth,
        "mixed": options.mixed,
        "calibration_limit": sources.calibration_limit,
        "calibration_data": data_name(sources.calibration, "calibration"),
        "evaluation_limit": sources.evaluation_limit,
        "evaluation_data": data_name(sources.evaluation, "evaluation"),
        "gate": options.gate,
        "target": "openvino",
    }


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the manifest keeps it."""
    return {
        "name": recipe.name,
        "weights": "per-channel" if recipe.per_channel else "per-tensor",
        "share_qkv": recipe.share_qkv,
        "unsigned_softmax": recipe.unsigned_softmax,
        "rules": [
            {
                "subject": rule.subject,
                "enable": rule.enable,
                "per_channel": rule.per_channel,
            }
            for rule in recipe.rules
        ],
    }


def _check_options(options: BuildOptions) -> None:
    if not 0.0 <= options.gate <= 1.0:
        raise BuildError(
            f"the gate is {options.gate}; allowed: 0 (off) to 1, a share of FP32's F1"
        )
    options.sources.check()


def _identify(
    options: BuildOptions, files: CheckpointFiles
) -> tuple[str, dict[str, Any]]:
    """Hash over all that shapes the outcome, and the parts by name."""
    versions = read_versions()
    identity = {
        **_choices(options, files),
        "manifest_version": MANIFEST_VERSION,
        "checkpoint_sha256": files.sha256,
        "calibration_sha256": hash_file(options.sources.calibration),
        "evaluation_sha256": hash_file(options.sources.evaluation),
        "versions": versions,
        "code_sha256": _hash_code(),
        "machine": f"{platform.machine()} {' '.join(cpu_features())}",
    }
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), identity


def read_versions() -> dict[str, str]:
    """Versions of what shapes a build.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        return {"int8qa": __version__} | {
            package: metadata.version(package) for package in _VERSIONED
        }
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the build stage needs {error.name}: run `make install` in the checkout, "
            f"or pip install -e '.[build,cpu]'"
        ) from error


def _hash_code() -> str:
    """Hash of the build stage's own source: a changed pass is a changed build."""
    root = Path(str(resources.files("int8qa")))
    digest = hashlib.sha256()
    for path in sorted(
        [*(root / "build").rglob("*.py"), *(root / "reader").glob("*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cpu_features() -> list[str]:
    """The instruction sets that decide which kernels run (Linux; else none)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next(
        (line for line in text.splitlines() if line.startswith("flags")), ""
    ).split()
    return [flag for flag in _CPU_FLAGS if flag in flags]


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
        self.staged = staged
        self.progress = progress
        self.remarks: list[str] = []
        self.engines: dict[Precision, OpenVinoEngine] = {}
        self.sizes: dict[Precision, int] = {}

    def run(self, build_id: str) -> tuple[Contract, dict[str, Any]]:
        with self.progress.stage(f"load {self.files.name}"):
            subject = load_subject(
                self.files,
                self.options.sources,
                self.staged.directory / TOKENIZER_FILENAME,
            )
        self.subject = subject
        reader = wrap_model(subject.checkpoint.model)
        with self.progress.stage("export to ONNX"):
            float_graph = clean_graph(export_onnx(reader, subject.inputs))
        with self.progress.stage("hold ONNX to torch"):
            torch_answers, deviation = self._hold_export(reader, float_graph)
        quantized, ranges, alphas = self._quantize(reader)
        with self.progress.stage("export Q/DQ to ONNX"):
            exported = quantized.export(ranges)
        with self.progress.stage("compile for OpenVINO"):
            self._compile(Precision.FP32, float_graph)
            self._compile(Precision.FP16, float_graph)
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
        with self.progress.stage("time the engines"):
            latencies = time_engines(
                infers,
                list(
                    dict.fromkeys(
                        (batch, min(length, subject.max_window_tokens))
                        for batch, length in LATENCY_SHAPES
                    )
                ),
                subject.inputs,
                budget_s=LATENCY_BUDGET_S,
            )
        plan = quantized.plan if mixed is None else mixed.plan
        int8 = accuracies[Precision.INT8]
        self.remarks += check_gate(
            int8, gate=self.options.gate, advice=list_advice(self.options)
        )
        latency_ms = medians(latencies)
        verdict = write_verdict(
            latency_ms,
            {str(name): accuracy for name, accuracy in accuracies.items()},
            recipe=self.options.recipe.name,
            calibrator=self.options.calibrator.name,
            device=self.engines[Precision.INT8].execution.device,
            gate=self.options.gate,
        )
        with self.progress.stage("write the model repository"):
            self._write_models()
        models = self._model_records(accuracies)
        contract = self._contract(build_id, models, verdict)
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
            "recipe": describe_recipe(self.options.recipe),
            "calibrator": self.options.calibrator.name,
            "gate": self.options.gate,
            "calibration_questions": len(subject.calibration),
            "calibration_windows": len(quantized.windows),
            "evaluation_questions": len(subject.evaluation),
            "max_logit_deviation": {EXPORT.conversion: deviation, **deviations},
            "census": asdict(census),
            "smoothing_alpha": alphas,
            "activation_amax": {
                site.name: ranges[site.name] for site in plan.activations
            },
            "searched": quantized.chosen,
            "mixed": _describe_mixed(mixed, latency_ms),
            "models": {
                str(precision): {
                    "accuracy": asdict(accuracies[precision])
                    | {
                        "agreement_fp16": share_equal(
                            answers[precision], answers[Precision.FP16]
                        )
                    },
                    "execution": record.execution,
                    "gemms": self.engines[precision].execution.gemms,
                    "attentions": self.engines[precision].execution.attentions,
                    "size_bytes": record.size_bytes,
                }
                for precision, record in models.items()
            },
            "latency_ms": latency_ms,
            "latency": {
                shape: {name: asdict(latency) for name, latency in by_name.items()}
                for shape, by_name in latencies.items()
            },
            "recommended": verdict.recommended,
            "verdict": verdict.text,
            "remarks": self.remarks,
        }
        return contract, manifest

    def _quantize(
        self, reader: Any
    ) -> tuple[QuantizedReader, Ranges, dict[str, float]]:
        """Quantizers into the model: ranges by site, smoothing strengths by GEMM."""
        options = self.options
        windows = self.subject.calibration_windows
        quantized = QuantizedReader(
            reader, windows, self.subject.inputs, [options.recipe]
        )
        alphas: dict[str, float] = {}
        if options.smooth:
            with self.progress.stage("smooth outliers", steps=len(windows)) as tick:
                alphas = quantized.smooth(options.calibrator, tick)
        with self.progress.stage(
            f"calibrate ({options.recipe.name}, {options.calibrator.name})",
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

    def _hold_export(
        self, reader: Any, graph: onnx.ModelProto
    ) -> tuple[Answers, float]:
        """Torch's answers to a sample, and ONNX's largest deviation from them."""
        import onnxruntime
        import torch

        # ONNX Runtime, not the engine we compile for: an independent reading of the
        # graph tells a wrong export from a wrong compilation.
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        inputs = self.subject.inputs

        def run_torch(feed: Any) -> Any:
            with torch.no_grad():
                start, end = reader(*(torch.from_numpy(feed[n]) for n in inputs))
            return start.numpy(), end.numpy()

        def run_onnx(feed: Any) -> Any:
            return tuple(session.run(None, dict(feed)))

        sample = self.subject.evaluation[:PARITY_QUESTIONS]
        expected = self.subject.answer(run_torch, sample)
        found = self.subject.answer(run_onnx, sample)
        questions = [item.question for item in sample]
        return expected, check_parity(EXPORT, expected, found, questions)

    def _compile(self, precision: Precision, graph: onnx.ModelProto) -> None:
        directory = self.staged.model_directory(precision.model_name)
        self.engines[precision], self.sizes[precision] = compile_graph(
            graph, directory, precision
        )

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
        self._compile(Precision.INT8, graph)
        for precision, engine in self.engines.items():
            remarks = check_execution(
                engine.execution, precision, quantized_gemms=plan.quantized_gemms
            )
            self.remarks += [text for text in remarks if text not in self.remarks]
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
                engine, _ = compile_graph(
                    exported.project(plan, ranges), scratch, Precision.INT8
                )
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
                on_step=tell,
            )
            return mixed, by_plan[mixed.plan.names]

    def _model_records(
        self, accuracies: dict[Precision, Accuracy]
    ) -> dict[Precision, ModelRecord]:
        def record(precision: Precision) -> ModelRecord:
            int8 = precision is Precision.INT8
            recipe = self.options.recipe.name + ("+mixed" if self.options.mixed else "")
            return ModelRecord(
                name=precision.model_name,
                engine="openvino",
                calibrator=self.options.calibrator.name if int8 else "none",
                recipe=recipe if int8 else "none",
                f1=round(accuracies[precision].f1, 3),
                exact_match=round(accuracies[precision].exact_match, 3),
                size_bytes=self.sizes[precision],
                execution=self.engines[precision].execution.summary,
            )

        return {
            precision: record(precision)
            for precision in (Precision.INT8, Precision.FP16, Precision.FP32)
        }

    def _write_models(self) -> None:
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
                    inference_precision_hint=PRECISION_HINTS[precision],
                ),
            )

    def _contract(
        self,
        build_id: str,
        models: dict[Precision, ModelRecord],
        verdict: Verdict,
    ) -> Contract:
        subject = self.subject
        return Contract(
            build_id=build_id,
            checkpoint=self.files.name,
            tokenizer_sha256=subject.tokenizer.fingerprint,
            pad_token_id=subject.checkpoint.pad_token_id,
            inputs=subject.inputs,
            max_window_tokens=subject.max_window_tokens,
            sequence_buckets=subject.buckets,
            batch_sizes=BATCH_SIZES,
            max_batch_tokens=MAX_BATCH_TOKENS,
            models=models,
            recommended=Precision(verdict.recommended),
            verdict=verdict.text,
        )


def list_advice(options: BuildOptions) -> list[str]:
    """What to try when INT8 loses too much, the most promising first."""
    advice = []
    if options.recipe.name == "full":
        advice.append("--recipe linear keeps attention and residual adds in float")
    if not options.smooth:
        advice.append("--smooth moves outlier channels into the weights")
    if options.calibrator.method != "search":
        advice.append("--calibrator search chooses each range by its logit error")
    if not options.recipe.per_channel:
        advice.append("--weights per-channel")
    if not options.mixed:
        advice.append("--mixed leaves the most sensitive kernels in float")
    advice.append("calibrate on text of your own (--calibration-data)")
    advice.append("`int8qa sensitivity` shows which tensors cost what")
    return advice


def _describe_mixed(
    mixed: MixedPlan | None, latency_ms: dict[str, dict[str, float]]
) -> dict[str, Any] | None:
    """What runs in float and what that costs, for the manifest."""
    if mixed is None:
        return None
    speed = {
        shape: round(by_name["pure int8"] / by_name["int8"], 3)
        for shape, by_name in latency_ms.items()
        if "pure int8" in by_name
    }
    return {
        "moved": list(mixed.moved),
        "speed_of_pure_int8": speed,
        "steps": [asdict(step) for step in mixed.steps],
    }
