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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa import __version__
from int8qa.build.accuracy import (
    DEFAULT_GATE,
    Accuracy,
    Answers,
    EncodedQuestion,
    answer_questions,
    check_gate,
    compare_answers,
    encode_questions,
)
from int8qa.build.calibration import Calibrator, calibrate
from int8qa.build.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    demo_checkpoint_directory,
    load_checkpoint,
    resolve_checkpoint,
)
from int8qa.build.engines.openvino import (
    PRECISION_HINTS,
    OpenVinoEngine,
    check_execution,
    median_latencies,
    save_ir,
)
from int8qa.build.export import export_onnx, model_inputs, wrap_model
from int8qa.build.graph import GraphCensus, clean_graph, take_census
from int8qa.build.parity import COMPILE, EXPORT, HALF, check_parity
from int8qa.build.quantization import RECIPES, insert_quantizers
from int8qa.build.report import BuildProgress, write_verdict
from int8qa.build.repository import (
    StagedRepository,
    find_current,
    hash_file,
    read_manifest,
    stage_repository,
)
from int8qa.build.smoothing import smooth_activations
from int8qa.build.triton_config import openvino_model_config
from int8qa.contract import (
    TOKENIZER_FILENAME,
    Contract,
    ModelRecord,
    Precision,
)
from int8qa.errors import (
    BuildError,
    CheckpointError,
    DataFileError,
    MissingDependencyError,
)
from int8qa.reader.squad import SquadQuestion, load_questions
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import DOC_STRIDE_TOKENS, MAX_WINDOW_TOKENS

if TYPE_CHECKING:
    import onnx

MANIFEST_VERSION = 1
BUCKET_STEP = 32
"""Padded lengths are multiples of this. OpenVINO compiles primitives for each new
shape: with raw lengths INT8 ran at 19 questions/s, rounded up to 32 at 65."""
BATCH_SIZES = (1, 2, 4, 8)
MAX_BATCH_TOKENS = 1024
"""A CPU gains nothing from larger batches: its cores are full, and they only wait."""
LATENCY_SHAPES = ((1, 128), (1, 384), (8, 128))
CALIBRATION_WINDOWS = 128
"""Most windows used, evenly spaced over the calibration questions. Ranges settle
early, and each window costs a float inference and a histogram per tensor."""
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


def questions_file(split: str) -> Path:
    """The project's own questions: ``calibration`` or ``evaluation``."""
    root = Path(str(resources.files("int8qa")))
    return root / "data" / "questions" / f"{split}.json"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything a build depends on besides the code and the machine."""

    model_repository: Path = Path("model_repository")
    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    recipe: str = "linear"
    calibrator: Calibrator = field(default_factory=Calibrator)
    calibration_data: Path = field(
        default_factory=lambda: questions_file("calibration")
    )
    evaluation_data: Path = field(default_factory=lambda: questions_file("evaluation"))
    calibration_limit: int | None = None
    """Questions used for calibration; all by default."""
    smooth: bool = True
    """SmoothQuant before calibration; see smoothing.py."""
    evaluation_limit: int | None = None
    gate: float = DEFAULT_GATE
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
    progress = progress or BuildProgress(stages=11 if options.smooth else 10)
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


def _choices(options: BuildOptions, files: CheckpointFiles) -> dict[str, Any]:
    """What a user chose, apart from what the files and the machine made of it."""
    return {
        "checkpoint": files.name,
        "recipe": options.recipe,
        "calibrator": options.calibrator.name,
        "smooth": options.smooth,
        "calibration_limit": options.calibration_limit,
        "calibration_data": _data_name(options.calibration_data, "calibration"),
        "evaluation_limit": options.evaluation_limit,
        "evaluation_data": _data_name(options.evaluation_data, "evaluation"),
        "gate": options.gate,
        "target": "openvino",
    }


def _data_name(path: Path, split: str) -> str:
    """``own`` for the project's questions, else the file's name."""
    own = questions_file(split)
    return "own" if path.resolve() == own.resolve() else path.name


def _check_options(options: BuildOptions) -> None:
    if options.recipe not in RECIPES:
        raise BuildError(
            f"unknown recipe {options.recipe}; known are {', '.join(RECIPES)}"
        )
    if not 0.0 <= options.gate <= 1.0:
        raise BuildError(
            f"the gate is {options.gate}; allowed: 0 (off) to 1, a share of FP32's F1"
        )
    for path in (options.calibration_data, options.evaluation_data):
        if not path.is_file():
            raise DataFileError(f"no such file: {path}; give a SQuAD-format JSON file")


def _identify(
    options: BuildOptions, files: CheckpointFiles
) -> tuple[str, dict[str, Any]]:
    """Hash over all that shapes the outcome, and the parts by name."""
    versions = {"int8qa": __version__}
    try:
        versions |= {package: metadata.version(package) for package in _VERSIONED}
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the build stage needs {error.name}: run `make install` in the checkout, "
            f"or pip install -e '.[build,cpu]'"
        ) from error
    identity = {
        **_choices(options, files),
        "manifest_version": MANIFEST_VERSION,
        "checkpoint_sha256": files.sha256,
        "calibration_sha256": hash_file(options.calibration_data),
        "evaluation_sha256": hash_file(options.evaluation_data),
        "versions": versions,
        "code_sha256": _hash_code(),
        "machine": f"{platform.machine()} {' '.join(_cpu_features())}",
    }
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), identity


def _hash_code() -> str:
    """Hash of the build stage's own source: a changed pass is a changed build."""
    root = Path(str(resources.files("int8qa")))
    digest = hashlib.sha256()
    for path in sorted(
        [*(root / "build").rglob("*.py"), *(root / "reader").glob("*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_features() -> list[str]:
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

    def run(self, build_id: str) -> tuple[Contract, dict[str, Any]]:
        with self.progress.stage(f"load {self.files.name}"):
            checkpoint = load_checkpoint(self.files)
            self._prepare(checkpoint)
        reader = wrap_model(checkpoint.model)
        with self.progress.stage("export to ONNX"):
            float_graph = clean_graph(export_onnx(reader, self.inputs))
        with self.progress.stage("hold ONNX to torch"):
            torch_answers, deviation = self._hold_export(reader, float_graph)
        alphas, ranges = self._quantize(checkpoint, reader)
        with self.progress.stage("export Q/DQ to ONNX"):
            quantized_graph = clean_graph(export_onnx(reader, self.inputs))
            census = take_census(quantized_graph)
        graphs = {
            Precision.FP32: float_graph,
            Precision.FP16: float_graph,
            Precision.INT8: quantized_graph,
        }
        with self.progress.stage("compile for OpenVINO"):
            engines, sizes = self._compile(graphs, census)
        accuracies, deviations = self._hold_engines(engines, torch_answers)
        with self.progress.stage("time the engines"):
            shapes = dict.fromkeys(
                (batch, min(length, self.max_window_tokens))
                for batch, length in LATENCY_SHAPES
            )
            latency_ms = median_latencies(engines, list(shapes), self.inputs)
        int8 = accuracies[Precision.INT8]
        recommended, verdict = write_verdict(
            latency_ms, int8.f1_ratio, int8.f1_ratio_margin
        )
        self.remarks += check_gate(int8, gate=self.options.gate)
        with self.progress.stage("write the model repository"):
            self._write_models()
        models = {
            precision: ModelRecord(
                name=precision.model_name,
                engine="openvino",
                calibrator=(
                    self.options.calibrator.name
                    if precision is Precision.INT8
                    else "none"
                ),
                recipe=(self.options.recipe if precision is Precision.INT8 else "none"),
                f1=round(accuracies[precision].f1, 3),
                exact_match=round(accuracies[precision].exact_match, 3),
                size_bytes=sizes[precision],
                execution=engines[precision].execution.summary,
            )
            for precision in (Precision.INT8, Precision.FP16, Precision.FP32)
        }
        contract = self._contract(build_id, models, checkpoint, verdict)
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "build_id": build_id,
            "demo": self.options.is_default,
            "int8qa": __version__,
            "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "checkpoint": {"name": self.files.name, "sha256": self.files.sha256},
            "device": engines[Precision.INT8].execution.device,
            "capabilities": list(engines[Precision.INT8].execution.capabilities),
            "recipe": self.options.recipe,
            "calibrator": self.options.calibrator.name,
            "calibration_questions": len(self.calibration),
            "calibration_windows": self.calibration_windows,
            "evaluation_questions": len(self.evaluation),
            "max_logit_deviation": {EXPORT.conversion: deviation, **deviations},
            "census": asdict(census),
            "smoothing_alpha": alphas,
            "activation_amax": ranges,
            "models": {
                str(precision): {
                    "accuracy": asdict(accuracies[precision]),
                    "execution": record.execution,
                    "gemms": engines[precision].execution.gemms,
                    "size_bytes": record.size_bytes,
                }
                for precision, record in models.items()
            },
            "latency_ms": latency_ms,
            "recommended": recommended,
            "verdict": verdict,
            "remarks": self.remarks,
        }
        return contract, manifest

    def _quantize(
        self, checkpoint: Checkpoint, reader: Any
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Quantizers into the model: smoothing strengths and ``amax`` by tensor."""
        options = self.options
        windows = [window for item in self.calibration for window in item.windows]
        windows = windows[:: -(-len(windows) // CALIBRATION_WINDOWS)]
        self.calibration_windows = len(windows)
        insert_quantizers(checkpoint.model, RECIPES[options.recipe])
        alphas: dict[str, float] = {}
        if options.smooth:
            with self.progress.stage("smooth outliers", steps=len(windows)) as tick:
                alphas = smooth_activations(
                    reader,
                    windows,
                    self.inputs,
                    keep=options.calibrator.kept_share,
                    on_window=tick,
                )
        with self.progress.stage(
            f"calibrate ({options.recipe}, {options.calibrator.name})",
            steps=len(windows),
        ) as tick:
            ranges = calibrate(
                reader, windows, options.calibrator, self.inputs, on_window=tick
            )
        return alphas, ranges

    def _prepare(self, checkpoint: Checkpoint) -> None:
        self.inputs = model_inputs(takes_token_types=checkpoint.takes_token_types)
        self.max_window_tokens = min(MAX_WINDOW_TOKENS, checkpoint.max_positions)
        self.buckets = tuple(
            range(BUCKET_STEP, self.max_window_tokens + 1, BUCKET_STEP)
        )
        if not self.buckets:
            raise CheckpointError(
                f"{self.files.name} reads at most {checkpoint.max_positions} tokens; "
                f"at least {BUCKET_STEP} are needed"
            )
        self.max_window_tokens = self.buckets[-1]
        self.pad_token_id = checkpoint.pad_token_id
        tokenizer_path = self.staged.directory / TOKENIZER_FILENAME
        tokenizer_path.write_bytes(checkpoint.tokenizer_json)
        self.tokenizer = ReaderTokenizer.from_file(tokenizer_path)
        self.calibration = self._encode(
            self.options.calibration_data, self.options.calibration_limit
        )
        self.evaluation = self._encode(
            self.options.evaluation_data, self.options.evaluation_limit
        )
        self.sample = self.evaluation[:PARITY_QUESTIONS]
        shared = {_key(item.question) for item in self.calibration} & {
            _key(item.question) for item in self.evaluation
        }
        if shared:
            raise DataFileError(
                f"{len(shared)} questions are in both the calibration and the "
                f"evaluation data; the accuracy measured would be too good. Split them"
            )

    def _encode(self, path: Path, limit: int | None) -> list[EncodedQuestion]:
        questions = [q for q in load_questions(path) if not q.is_impossible]
        if not questions:
            raise DataFileError(f"{path} has no answerable question")
        return encode_questions(
            self.tokenizer,
            questions[:limit],
            max_window_tokens=self.max_window_tokens,
            doc_stride=min(DOC_STRIDE_TOKENS, self.max_window_tokens // 2),
        )

    def _answer(
        self, infer: Any, encoded: Sequence[EncodedQuestion], tick: Any
    ) -> Answers:
        return answer_questions(
            infer,
            encoded,
            self.inputs,
            bucket_for=lambda size: next(b for b in self.buckets if b >= size),
            pad_token_id=self.pad_token_id,
            on_question=tick,
        )

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

        def run_torch(feed: Any) -> Any:
            with torch.no_grad():
                start, end = reader(*(torch.from_numpy(feed[n]) for n in self.inputs))
            return start.numpy(), end.numpy()

        def run_onnx(feed: Any) -> Any:
            return tuple(session.run(None, dict(feed)))

        expected = self._answer(run_torch, self.sample, lambda: None)
        found = self._answer(run_onnx, self.sample, lambda: None)
        return expected, check_parity(EXPORT, expected, found, _bare(self.sample))

    def _hold_engines(
        self, engines: dict[Precision, OpenVinoEngine], torch_answers: Answers
    ) -> tuple[dict[Precision, Accuracy], dict[str, float]]:
        """Every engine's accuracy against FP32, and the deviations of the floats."""
        with self.progress.stage("hold engines to torch"):
            compiled = self._answer(
                engines[Precision.FP32].infer, self.sample, lambda: None
            )
            deviations = {
                COMPILE.conversion: check_parity(
                    COMPILE, torch_answers, compiled, _bare(self.sample)
                )
            }
        with self.progress.stage(
            "answer the evaluation questions",
            steps=len(engines) * len(self.evaluation),
        ) as tick:
            answers = {
                precision: self._answer(engine.infer, self.evaluation, tick)
                for precision, engine in engines.items()
            }
        questions = _bare(self.evaluation)
        reference = answers[Precision.FP32]
        deviations[HALF.conversion] = check_parity(
            HALF, reference, answers[Precision.FP16], questions
        )
        accuracies = {
            precision: compare_answers(reference, found, questions)
            for precision, found in answers.items()
        }
        return accuracies, deviations

    def _compile(
        self, graphs: dict[Precision, onnx.ModelProto], census: GraphCensus
    ) -> tuple[dict[Precision, OpenVinoEngine], dict[Precision, int]]:
        engines: dict[Precision, OpenVinoEngine] = {}
        sizes: dict[Precision, int] = {}
        for precision, graph in graphs.items():
            directory = self.staged.model_directory(precision.model_name)
            path, sizes[precision] = save_ir(graph, directory, precision)
            engines[precision] = OpenVinoEngine(path, precision)
            self.remarks += check_execution(
                engines[precision].execution,
                precision,
                quantized_gemms=census.quantized_matmuls,
            )
        return engines, sizes

    def _write_models(self) -> None:
        source = Path(str(resources.files("int8qa.build.engines")))
        for precision in Precision:
            directory = self.staged.model_directory(precision.model_name)
            shutil.copyfile(source / "triton_openvino_model.py", directory / "model.py")
            self.staged.write_config(
                precision.model_name,
                openvino_model_config(
                    precision,
                    inputs=self.inputs,
                    sequence_buckets=self.buckets,
                    batch_sizes=BATCH_SIZES,
                    inference_precision_hint=PRECISION_HINTS[precision],
                ),
            )

    def _contract(
        self,
        build_id: str,
        models: dict[Precision, ModelRecord],
        checkpoint: Checkpoint,
        verdict: str,
    ) -> Contract:
        return Contract(
            build_id=build_id,
            checkpoint=self.files.name,
            tokenizer_sha256=self.tokenizer.fingerprint,
            pad_token_id=checkpoint.pad_token_id,
            inputs=self.inputs,
            max_window_tokens=self.max_window_tokens,
            sequence_buckets=self.buckets,
            batch_sizes=BATCH_SIZES,
            max_batch_tokens=MAX_BATCH_TOKENS,
            models=models,
            verdict=verdict,
        )


def _bare(encoded: Sequence[EncodedQuestion]) -> list[SquadQuestion]:
    return [item.question for item in encoded]


def _key(question: SquadQuestion) -> tuple[str, str]:
    return question.question, question.context
