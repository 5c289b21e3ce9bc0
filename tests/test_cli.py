"""The command line as a shell sees it: what it prints where, and how it exits."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from int8qa import __version__, cli, errors
from tests.build.builds import make_outcome
from tests.command_line import Finished, Run, check_one_line
from tests.stub_gateway import Reply, answer_reply, problem_reply, run_gateway

COMMANDS = (
    *(
        "build",
        "calibrate-compare",
        "sensitivity",
        "up",
        "serve",
        "triton",
        "ask",
        "evaluate",
        "check",
        "gpu-check",
        "train",
        "keys",
        "bench",
        "plan",
    ),
)
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The key hangs behind the bar.",
                    "qas": [
                        {
                            "id": str(n),
                            "question": f"Where is the key, {n}?",
                            "answers": [{"text": "behind the bar", "answer_start": 14}],
                        }
                        for n in range(3)
                    ],
                }
            ]
        }
    ]
}


@pytest.fixture(autouse=True)
def _logging_is_put_back(run: Run) -> Iterator[None]:
    """``serve`` sets it up for its process. No variable of this machine counts."""
    del run
    root = logging.getLogger()
    before = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    structlog.configure(**before[2])


@pytest.fixture
def context_file(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_text("The key hangs behind the bar. ☕\n", encoding="utf-8")
    return path


@pytest.fixture
def squad_file(tmp_path: Path) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    return path


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str, option: str) -> None:
    """Each command explains itself and exits with 0."""
    finished = run(command, option)
    assert finished.code == 0
    assert f"int8qa {command}" in finished.out
    assert "--help" in finished.out


def test_root_help(run: Run) -> None:
    """The root lists all commands and says what the exit codes are."""
    finished = run("--help")
    assert finished.code == 0
    assert all(command in finished.out for command in COMMANDS)
    assert "sysexits.h" in finished.out


def test_version(run: Run) -> None:
    """The version, and nothing else."""
    assert run("--version") == Finished(0, f"int8qa {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--no-such-option"),
        ("no-such-command",),
        ("ask",),
        ("ask", "q"),
        ("build", "--gate", "2"),
        ("build", "--percentile", "101"),
        ("build", "--calibrator", "average"),
        ("build", "--weights", "per-row"),
        ("build", "--calibration-limit", "0"),
        ("build", "--target", "coreml"),
        ("calibrate-compare", "--limit", "0"),
        ("calibrate-compare", "--sensitivity-questions", "-1"),
        ("sensitivity", "--limit", "0"),
        ("evaluate", "--data", "x", "--precision", "int4"),
        ("evaluate", "--data", "x", "--concurrency", "0"),
        ("up", "--model-repository"),
    ],
    ids=" ".join,
)
def test_usage_error(run: Run, arguments: tuple[str, ...]) -> None:
    """A slip on the command line is EX_USAGE, explained on standard error."""
    finished = run(*arguments)
    assert finished.code == 64
    assert finished.out == ""
    assert "Error" in finished.err


@pytest.mark.parametrize("command", ["build", "up", "serve", "triton"])
@pytest.mark.parametrize(
    ("name", "value"), [("INT8QA_PROT", "1"), ("INT8QA_PORT", "99999")]
)
def test_wrong_setting(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str
) -> None:
    """A wrong environment is EX_CONFIG, before anything else is done."""
    monkeypatch.setenv(name, value)
    check_one_line(run(command), 78, name)


def write_plans(repository: Path, library: str) -> None:
    """A repository whose manifest says that its engines are TensorRT's."""
    lock = {
        "library": library,
        "version": "10.13.3.9",
        "compute_capabilities": ["sm89"],
    }
    manifest = {"demo": False, "tensorrt": {"lock": lock}}
    (repository / "manifest.json").write_text(json.dumps(manifest))
    contract = {
        "build_id": "0",
        "checkpoint": "acme/reader",
        "tokenizer_sha256": "0" * 64,
        "pad_token_id": 0,
        "inputs": ["input_ids", "attention_mask"],
        "max_window_tokens": 384,
        "sequence_buckets": [384],
        "batch_sizes": [1],
        "max_batch_tokens": 384,
        "models": {},
    }
    (repository / "contract.json").write_text(json.dumps(contract))


@pytest.mark.parametrize("command", ["up", "triton", "check"])
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_plans_for_another_machine(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    library: str,
) -> None:
    """No Triton is started for plans that it could not load: one line, both sides."""
    from int8qa.build.engines import tensorrt_lock

    write_plans(tmp_path, library)
    monkeypatch.setenv("INT8QA_PORT", "0")
    monkeypatch.setattr("int8qa.embedded.locate_triton", lambda: None)
    here = tensorrt_lock.EngineLock(library, None)
    monkeypatch.setattr(tensorrt_lock, "read_lock", lambda flavour: here)
    finished = run(command, "--model-repository", tmp_path)
    check_one_line(finished, 69, f"plans of {library} 10.13.3.9 for sm89", "cannot be")
    here = tensorrt_lock.EngineLock(library, "11.1.0.2")
    finished = run(command, "--model-repository", tmp_path)
    check_one_line(finished, 78, f"with {library} 10.13.3.9, this server has 11.1.0.2")


@pytest.mark.parametrize("command", ["up", "triton"])
def test_plans_that_fit_but_for_the_backend(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """Triton's wheel has no TensorRT backend, whatever GPU is here."""
    from int8qa.build.engines import tensorrt_lock

    write_plans(tmp_path, "tensorrt")
    monkeypatch.setenv("INT8QA_PORT", "0")
    monkeypatch.setattr("int8qa.embedded.locate_triton", lambda: None)
    here = tensorrt_lock.EngineLock("tensorrt", "10.13.3.9", None, ("sm89",))
    monkeypatch.setattr(tensorrt_lock, "read_lock", lambda flavour: here)
    finished = run(command, "--model-repository", tmp_path)
    check_one_line(finished, 69, "has no TensorRT backend", "int8qa serve")
    finished = run("check", "--model-repository", tmp_path)
    assert finished == Finished(
        0,
        "",
        f"{tmp_path}: plans of tensorrt 10.13.3.9 for sm89 can be loaded here\n",
    )


def test_gpu_check_without_a_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is missing is said before anything is built: TensorRT, Triton, a place."""
    from int8qa import gpu_check
    from int8qa.build.engines import tensorrt

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    check_one_line(run("gpu-check"), 69, "an NVIDIA GPU", "tritonserver image")
    monkeypatch.setattr(tensorrt, "check_builder", lambda plans: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_IMAGE_SERVER", tmp_path / "none")
    check_one_line(run("gpu-check"), 69, "finds none on PATH", "profile gpu")
    monkeypatch.setattr(gpu_check, "find_server", lambda: Path("tritonserver"))
    finished = run("gpu-check", "--report", tmp_path / "none" / "r.json")
    check_one_line(finished, 73, "no such directory for the report")
    assert not list(tmp_path.iterdir())


def test_gpu_check(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every option reaches the check; a line per shape, and where the report is."""
    from int8qa import gpu_check
    from int8qa.build.engines import tensorrt

    seen: list[gpu_check.GpuCheck] = []

    def fake(check: gpu_check.GpuCheck, say: Any) -> dict[str, Any]:
        seen.append(check)
        row = {"int8": {"p50_ms": 1.0}, "fp16": {"p50_ms": 1.5}, "int8_over_fp16": 1.5}
        return {"latency": {"8x128": row}}

    monkeypatch.setattr(tensorrt, "check_builder", lambda plans: None)
    monkeypatch.setattr(gpu_check, "find_server", lambda: Path("tritonserver"))
    monkeypatch.setattr(gpu_check, "check_gpu", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finished = run("gpu-check")
    assert finished == Finished(
        0,
        "8x128: INT8 1.00 ms, FP16 1.50 ms, 1.50×\n",
        "report: int8qa-gpu-check.json\n",
    )
    assert seen[0].options.model_repository == tmp_path / "int8qa/gpu-check"
    assert seen[0].options.target == "tensorrt"
    run(
        *("gpu-check", "--checkpoint", "acme/x", "--model-repository", tmp_path / "m"),
        *("--report", "r.json", "--evaluation-limit", 7, "--gate", 0.5),
    )
    options = seen[1].options
    assert (options.checkpoint, options.gate) == ("acme/x", 0.5)
    assert options.model_repository == tmp_path / "m"
    assert options.sources.evaluation_limit == 7
    assert seen[1].report == Path("r.json")


def test_check_without_plans(run: Run, tmp_path: Path) -> None:
    """A CPU's repository passes; where there is none, that is said."""
    finished = run("check", "--model-repository", tmp_path)
    check_one_line(finished, 78, "has no contract.json")
    write_plans(tmp_path, "tensorrt")
    (tmp_path / "manifest.json").write_text("{}")
    finished = run("check", "--model-repository", tmp_path)
    assert finished.code == 0
    assert "no TensorRT plans, nothing to compare" in finished.err


def test_serve_without_a_repository(run: Run, tmp_path: Path) -> None:
    """A gateway without a repository says how to build one."""
    finished = run("serve", "--model-repository", tmp_path / "none")
    check_one_line(finished, 78, "int8qa build --model-repository")


def test_up_on_a_taken_port(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is tried before a build of minutes."""
    monkeypatch.setattr(
        cli, "_ensure_repository", lambda settings: pytest.fail("built")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("INT8QA_PORT", str(taken.getsockname()[1]))
        check_one_line(run("up"), 78, "cannot listen on 127.0.0.1", "INT8QA_PORT")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--calibration-data", "none.json"), "no such file: none.json"),
        (("--evaluation-data", "."), "no such file"),
        (("--checkpoint", "./none"), "no such checkpoint directory: ./none"),
    ],
)
def test_build_without_its_input(
    run: Run, arguments: tuple[str, ...], part: str
) -> None:
    """What is missing is named, with EX_NOINPUT."""
    check_one_line(run("build", *arguments), 66, part)


def test_build_over_foreign_files(run: Run, tmp_path: Path) -> None:
    """A directory of somebody else is EX_CANTCREAT."""
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.txt").write_text("")
    finished = run("build", "--model-repository", target)
    check_one_line(finished, 73, "thesis.txt", "give an empty directory")


def test_ask(run: Run, context_file: Path) -> None:
    """The answer on standard output, times on standard error, the request as asked."""
    with run_gateway(lambda body: answer_reply("behind the bar")) as gateway:
        finished = run(
            *("ask", "Where?", "--context-file", context_file, "--url", gateway.url),
            *("--top-k", 2, "--precision", "fp16", "--allow-no-answer"),
        )
    assert finished.code == 0
    assert finished.out == "behind the bar  [3:17] score 0.750\n"
    assert "1 window(s), engine 2.0 ms, total 4.0 ms" in finished.err
    assert gateway.requests == [
        {
            "question": "Where?",
            "context": "The key hangs behind the bar. ☕\n",
            "precision": "fp16",
            "top_k": 2,
            "allow_no_answer": True,
            "null_score_diff_threshold": 0.0,
        }
    ]


def test_ask_json(run: Run, context_file: Path) -> None:
    """With --json the gateway's reply, and nothing else."""
    reply = answer_reply("behind the bar ☕")
    with run_gateway(lambda body: reply) as gateway:
        finished = run(
            "ask", "?", "--context-file", context_file, "--url", gateway.url, "--json"
        )
    assert json.loads(finished.out) == reply.body
    assert finished.err == ""
    # The service knows its default: what its own build recommends.
    assert "precision" not in gateway.requests[0]


def test_ask_without_an_answer(run: Run, context_file: Path) -> None:
    """No answer is a result."""
    with run_gateway(lambda body: answer_reply(None)) as gateway:
        finished = run("ask", "?", "--context-file", context_file, "--url", gateway.url)
    assert (finished.code, finished.out) == (0, "(no answer in this text)\n")


def test_ask_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` is standard input, as bytes of UTF-8."""
    text = "Ærlig talt\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with run_gateway(lambda body: answer_reply("x")) as gateway:
        assert run("ask", "?", "--context-file", "-", "--url", gateway.url).code == 0
    assert gateway.requests[0]["context"] == text


def test_ask_waits_for_an_overloaded_gateway(run: Run, context_file: Path) -> None:
    """Refused twice, answered the third time: nobody has to know."""

    def answer(body: dict[str, Any]) -> Reply:
        if len(gateway.requests) < 3:
            status = 429 if len(gateway.requests) == 1 else 503
            return problem_reply(status, "full", Retry_After="0")
        return answer_reply("x")

    with run_gateway(answer) as gateway:
        finished = run("ask", "?", "--context-file", context_file, "--url", gateway.url)
    assert finished.code == 0
    assert len(gateway.requests) == 3


def test_ask_refused(run: Run, context_file: Path) -> None:
    """The gateway's own words, in one line."""
    refusal = problem_reply(422, "precision is fp64; served are int8 and fp16")
    with run_gateway(lambda body: refusal) as gateway:
        finished = run("ask", "?", "--context-file", context_file, "--url", gateway.url)
    check_one_line(finished, 69, "HTTP 422: precision is fp64; served are")


@pytest.mark.parametrize("command", ["ask", "evaluate"])
def test_no_gateway(
    run: Run, context_file: Path, squad_file: Path, command: str
) -> None:
    """Nobody listens: EX_UNAVAILABLE, and how to start one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    given = {"ask": ("?", "--context-file", context_file)}
    arguments = given.get(command, ("--data", squad_file))
    finished = run(command, *arguments, "--url", url)
    check_one_line(finished, 69, f"no gateway answers at {url}", "int8qa up")


def test_no_context_file(run: Run, tmp_path: Path) -> None:
    """A context that cannot be read is EX_NOINPUT, whether absent or a directory."""
    check_one_line(run("ask", "?", "--context-file", "none.txt"), 66, "none.txt")
    check_one_line(run("ask", "?", "--context-file", tmp_path), 66, str(tmp_path))


def test_context_that_is_no_utf8(run: Run, context_file: Path) -> None:
    """Latin-1 is named for what it is, with the byte and without the text."""
    context_file.write_bytes(b"secret caf\xe9")
    finished = run("ask", "?", "--context-file", context_file)
    check_one_line(finished, 66, "not UTF-8 (byte 10)")
    assert "secret" not in finished.err


@pytest.mark.parametrize("content", [None, "{", '{"data": []}', '{"data": 1}'])
def test_evaluate_without_data(run: Run, tmp_path: Path, content: str | None) -> None:
    """A missing or malformed file is found before the gateway is asked."""
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content)
    check_one_line(run("evaluate", "--data", path), 66, str(path))


def test_evaluate(run: Run, squad_file: Path) -> None:
    """A row per precision, INT8 against the float, and the share of equal answers."""

    def answer(body: dict[str, Any]) -> Reply:
        wrong = body["precision"] == "int8" and body["question"].endswith("1?")
        return answer_reply("key" if wrong else "behind the bar")

    with run_gateway(answer) as gateway:
        finished = run("evaluate", "--data", squad_file, "--url", gateway.url)
    assert finished.code == 0
    assert "acme/reader, squad.json: 3 questions" in finished.out
    rows = {
        cells[0]: cells[1:]
        for line in finished.out.splitlines()
        if (cells := [cell.strip() for cell in line.strip("│").split("│")])[0]
        in {"int8", "fp16"}
    }
    assert rows["fp16"] == ["100.00", "100.00", "2.0", "4.0", "4.0"]
    assert rows["int8"][:2] == ["66.67", "66.67"]
    assert "INT8 keeps 66.67 % of FP16's F1" in finished.out
    assert "same answer, int8/fp16: 66.67 %" in finished.out


def test_evaluate_json(run: Run, squad_file: Path) -> None:
    """With --json standard output is JSON, of the precisions asked for."""
    with run_gateway(lambda body: answer_reply("behind the bar")) as gateway:
        finished = run(
            *("evaluate", "--data", squad_file, "--url", gateway.url, "--json"),
            *("--precision", "int8", "--precision", "fp32", "--limit", 2),
        )
    report = json.loads(finished.out)
    assert report["questions"] == 2
    assert list(report["results"]) == ["int8", "fp32"]
    assert report["agreement"] == {"int8/fp32": 1.0}
    assert {body["precision"] for body in gateway.requests} == {"int8", "fp32"}


@pytest.mark.parametrize(
    ("has_contract", "demo", "builds"),
    [(False, False, True), (True, True, True), (True, False, False)],
    ids=["nothing", "demo", "own"],
)
def test_up_builds_only_the_demo(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_contract: bool,
    demo: bool,
    builds: bool,
) -> None:
    """A repository of the user's own choices is served as it is."""
    from int8qa.build import pipeline

    if has_contract:
        (tmp_path / "contract.json").write_text("{}")
    built: list[Path] = []

    def fake(options: Any) -> Any:
        built.append(options.model_repository)
        return make_outcome(cached=False)

    monkeypatch.setattr(pipeline, "build_repository", fake)
    monkeypatch.setattr(pipeline, "is_demo", lambda repository: demo)
    cli._ensure_repository(cli._settings(tmp_path))
    assert built == ([tmp_path] if builds else [])


@pytest.mark.parametrize("has_contract", [True, False])
def test_up_without_the_build_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_contract: bool
) -> None:
    """A serving machine needs no torch; with nothing to serve it says what it needs."""
    monkeypatch.setitem(sys.modules, "int8qa.build.pipeline", None)
    settings = cli._settings(tmp_path)
    if has_contract:
        (tmp_path / "contract.json").write_text("{}")
        cli._ensure_repository(settings)
    else:
        with pytest.raises(errors.MissingDependencyError, match="make install"):
            cli._ensure_repository(settings)


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is 130, without a trace."""

    def interrupt(settings: Any, on_ready: Any) -> None:
        raise KeyboardInterrupt

    from int8qa.gateway import app

    monkeypatch.setattr(app, "serve", interrupt)
    finished = run("serve")
    assert finished.code == 130
    assert "Traceback" not in finished.err


def test_announcement(capsys: pytest.CaptureFixture[str]) -> None:
    """The first request to try is a shell command that holds valid JSON."""
    import shlex

    cli._announce("http://127.0.0.1:8080")
    captured = capsys.readouterr()
    assert captured.out == ""
    command = next(
        line for line in captured.err.splitlines() if line.startswith("curl ")
    )
    words = shlex.split(command)
    body = json.loads(words[words.index("-d") + 1])
    assert body["precision"] == "both"
    assert body["question"] == cli.SAMPLE_QUESTION
    assert "1887" in body["context"]


@pytest.mark.parametrize("arguments", [(), ("build", "--help"), ("ask", "--help")])
def test_answers_before_anything_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    """Neither importing the command line nor its help loads what only builds need."""
    script = (
        "import sys; from int8qa import cli\n"
        f"sys.argv = ['int8qa', *{arguments!r}]\n"
        "try:\n"
        "    if len(sys.argv) > 1: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'modelopt', 'onnx', 'onnxruntime', 'openvino', 'plotly',\n"
        "         'transformers', 'numpy', 'tritonclient', 'fastapi'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert finished.stderr == "[]\n"
