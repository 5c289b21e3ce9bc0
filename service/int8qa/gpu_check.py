"""A whole build for the GPU at hand, served by a real Triton, measured, in one report.

In: what to build and where `tritonserver` is. Out: one JSON file to attach to an issue:
versions, plans, answers held to PyTorch's in float32, times of INT8 and FP16 taking
turns, MLPerf's scenarios through a gateway, and Triton's complaints; LoadGen's own
files lie beside it. What ``int8qa gpu-check`` runs. A step that fails ends it, and the
report says which and why. Texts of questions are not in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa import __version__
from int8qa.bench.gateway_process import run_gateway, stop_process
from int8qa.bench.scenarios import LoadOptions, Rules, bench_gateway, check_loadgen
from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision
from int8qa.embedded.launch import pick_free_port
from int8qa.errors import (
    EmbeddedTritonError,
    EngineUnavailableError,
    Int8qaError,
    MissingDependencyError,
    ParityError,
)
from int8qa.gateway.tensors import PaddedBatch
from int8qa.gateway.triton import TritonEngine

if TYPE_CHECKING:
    from int8qa.build.accuracy import Accuracy, Infer
    from int8qa.build.options import BuildOptions

PRECISIONS = (Precision.INT8, Precision.FP16)
GRID_BATCHES = (1, 8, 32)
GRID_TOKENS = (64, 128, 384)
READY_TIMEOUT_S = 300.0
"""A plan of BERT-base loads in seconds; warm-up and CUDA graphs take the rest."""
INFER_TIMEOUT_S = 60.0
_IMAGE_SERVER = Path("/opt/tritonserver/bin/tritonserver")
"""Where NVIDIA's images have it."""
_LOG_LINES = 40

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """What to check, and what with."""

    options: BuildOptions
    """Of a build for TensorRT."""
    server: Path
    report: Path
    repeats: int = 30
    """Timed turns of each engine at each shape."""
    ready_timeout_s: float = READY_TIMEOUT_S
    rules: Rules = field(default_factory=Rules)
    """Of the load tests."""


def find_server() -> Path:
    """NVIDIA's `tritonserver`.

    Raises:
        MissingDependencyError: there is none.
    """
    found = shutil.which("tritonserver") or shutil.which(_IMAGE_SERVER)
    if found is None:
        raise MissingDependencyError(
            "gpu-check needs tritonserver with its TensorRT backend and finds none on "
            "PATH: run it in the builder image of docker-compose.yml, profile gpu "
            "(NGC's tritonserver with int8qa in it), with --gpus all"
        )
    return Path(found)


def check_gpu(check: GpuCheck, say: Say = lambda _: None) -> dict[str, Any]:
    """Build, serve, hold, time; write the report, whatever happens.

    Returns:
        The report.

    Raises:
        Int8qaError: a step failed; the report has its message.
        MissingDependencyError: LoadGen is not installed; nothing was begun.
    """
    check_loadgen()  # before a build of minutes
    report: dict[str, Any] = {
        "int8qa": __version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "passed": False,
        "step": "build",
        "error": None,
    }
    try:
        _run_steps(check, report, say)
        report["passed"] = True
    except Int8qaError as error:
        report["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        text = json.dumps(report, indent=2, ensure_ascii=False)
        check.report.write_text(text + "\n", encoding="utf-8")
    return report


def _run_steps(check: GpuCheck, report: dict[str, Any], say: Say) -> None:
    from int8qa.build.accuracy import check_gate
    from int8qa.build.costs import tabulate_costs, time_batches
    from int8qa.build.latency import time_engines
    from int8qa.build.pipeline import build_repository
    from int8qa.build.repository import record_costs

    options = check.options
    outcome = build_repository(options)
    report["tensorrt"] = outcome.manifest.get("tensorrt")
    report["remarks"] = outcome.manifest["remarks"]
    report["verdict"] = outcome.manifest["verdict"]
    contract = outcome.contract
    report["step"] = "start Triton"
    say("start Triton")
    with _serve(check, contract, report) as (infers, triton_url):
        report["step"] = "hold answers to float32"
        say("hold answers to float32")
        accuracies = _compare(options, infers)
        report["accuracy"] = {name: asdict(one) for name, one in accuracies.items()}
        _check_half(accuracies["fp16"])
        report["step"] = "time the engines"
        say("time the engines")
        latencies = time_engines(
            infers, _choose_shapes(contract), contract.inputs, repeats=check.repeats
        )
        report["latency"] = {
            shape: {name: asdict(one) for name, one in row.items()}
            | {"int8_over_fp16": round(row["fp16"].p50_ms / row["int8"].p50_ms, 3)}
            for shape, row in latencies.items()
        }
        report["step"] = "time the batches"
        say("time the batches")
        cost_ms = time_batches(contract, infers)
        report["cost_ms"] = cost_ms
        record_costs(options.model_repository, tabulate_costs(contract, cost_ms))
        report["step"] = "load a gateway"
        say("load a gateway")
        report["load"] = _load_gateway(check, triton_url, say)
        report["remarks"] += report["load"]["problems"]
    report["step"] = "gate"
    report["remarks"] += check_gate(accuracies["int8"], gate=options.gate)
    report["step"] = "done"


def _choose_shapes(contract: Contract) -> list[tuple[int, int]]:
    """The grid, as far as the contract has its batches and lengths."""
    longest = contract.max_window_tokens
    lengths = dict.fromkeys(min(tokens, longest) for tokens in GRID_TOKENS)
    batches = [size for size in GRID_BATCHES if size in contract.batch_sizes]
    return [
        (batch, contract.bucket_for(tokens)) for tokens in lengths for batch in batches
    ]


def _compare(options: BuildOptions, infers: Mapping[str, Infer]) -> dict[str, Accuracy]:
    """What Triton answers, held to PyTorch's float32 on this machine's CPU."""
    from int8qa.build.accuracy import compare_answers
    from int8qa.build.checkpoint import resolve_checkpoint
    from int8qa.build.export import wrap_model
    from int8qa.build.reference import run_torch
    from int8qa.build.subject import load_subject

    files = resolve_checkpoint(options.checkpoint, revision=options.revision)
    with tempfile.TemporaryDirectory() as scratch:
        subject = load_subject(
            files,
            options.sources,
            Path(scratch) / TOKENIZER_FILENAME,
            bucket_step=options.bucket_step,
        )
    reader = wrap_model(subject.checkpoint.model)
    reference = subject.answer(run_torch(reader, subject.inputs))
    return {
        name: compare_answers(reference, subject.answer(infer), subject.questions)
        for name, infer in infers.items()
    }


def _load_gateway(check: GpuCheck, triton_url: str, say: Say) -> dict[str, Any]:
    """MLPerf's scenarios, through a gateway in front of the Triton that runs."""
    repository = check.options.model_repository
    with run_gateway(
        triton_url, repository, ready_timeout_s=check.ready_timeout_s
    ) as url:
        return bench_gateway(
            LoadOptions(
                url=url,
                output=check.report.with_suffix(""),
                data=check.options.sources.evaluation,
                precisions=PRECISIONS,
                rules=check.rules,
            ),
            say,
        )


def _check_half(fp16: Accuracy) -> None:
    """Refuse an FP16 engine that is not the model: then INT8 is not to blame."""
    from int8qa.build.parity import HALF

    if not fp16.agreement >= HALF.agreement:
        raise ParityError(
            f"TensorRT's FP16 gives {100 * fp16.agreement:.1f} % of PyTorch's float32 "
            f"answers (at least {100 * HALF.agreement:g} %): attach the report to an "
            f"issue"
        )


@contextlib.contextmanager
def _serve(
    check: GpuCheck, contract: Contract, report: dict[str, Any]
) -> Iterator[tuple[dict[str, Infer], str]]:
    """A Triton of our own while the block runs: ways to ask it, and its address."""
    grpc_port = pick_free_port()
    http_port = pick_free_port([grpc_port])
    metrics_port = pick_free_port([grpc_port, http_port])
    command = [
        str(check.server),
        f"--model-repository={check.options.model_repository}",
        "--model-control-mode=none",
        "--exit-on-error=true",
        "--strict-readiness=true",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
    ]
    loop = asyncio.new_event_loop()
    url = f"127.0.0.1:{grpc_port}"
    engine = TritonEngine(url, contract)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            loop.run_until_complete(engine.connect())
            loop.run_until_complete(_wait_ready(engine, process, check.ready_timeout_s))
            infers = {
                str(precision): _make_infer(loop, engine, contract, precision)
                for precision in PRECISIONS
            }
            yield infers, url
        finally:
            loop.run_until_complete(engine.close())
            loop.close()
            stop_process(process)
            report["triton"] = _read_complaints(log)


async def _wait_ready(
    engine: TritonEngine, process: subprocess.Popen[bytes], timeout_s: float
) -> None:
    """Until every model is loaded and is what the contract says.

    Raises:
        EmbeddedTritonError: Triton ended, or took too long.
        ContractError: it serves something else.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(PRECISIONS)
    while waiting:
        if process.poll() is not None:
            raise EmbeddedTritonError(
                f"Triton ended with status {process.returncode} before its models were "
                f"loaded; the report has its last lines"
            )
        if time.monotonic() > deadline:
            raise EmbeddedTritonError(
                f"Triton had not loaded {', '.join(map(str, waiting))} after "
                f"{timeout_s:.0f} s; the report has its last lines"
            )
        with contextlib.suppress(EngineUnavailableError):
            while waiting and await engine.ready(waiting[0]):
                await engine.check_contract(waiting[0])
                waiting.pop(0)
        if waiting:
            await asyncio.sleep(0.2)


def _make_infer(
    loop: asyncio.AbstractEventLoop,
    engine: TritonEngine,
    contract: Contract,
    precision: Precision,
) -> Infer:
    """Windows to logits through Triton, waiting for each batch."""

    def infer(feed: Mapping[str, Any]) -> tuple[Any, Any]:
        blank = feed[contract.inputs[0]] * 0
        batch = PaddedBatch(
            **{
                name: feed.get(name, blank)
                for name in ("input_ids", "attention_mask", "token_type_ids")
            }
        )
        logits = loop.run_until_complete(
            engine.infer(precision, batch, INFER_TIMEOUT_S)
        )
        return logits.start, logits.end

    return infer


def _read_complaints(log: Any) -> list[str]:
    """The last of Triton's errors and warnings; of all it said if there were none."""
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    complaints = [line for line in lines if line[0] in "EWF"]
    return (complaints or lines)[-_LOG_LINES:]
