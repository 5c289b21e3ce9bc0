"""The whole service: HTTP, gateway, batcher, gRPC, a real Triton, OpenVINO."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient

from int8qa.build.subject import questions_file
from int8qa.cli import SAMPLE_CONTEXT, SAMPLE_QUESTION
from int8qa.reader.squad import load_questions
from tests.integration.conftest import (
    Service,
    free_port,
    group_of,
    start_service,
)

pytestmark = pytest.mark.triton
SAMPLE = {"question": SAMPLE_QUESTION, "context": SAMPLE_CONTEXT}


def test_answers_in_both_precisions_and_compares_them(service: Service) -> None:
    """`precision: both` gives two right answers with a timing each."""
    status, body = service.post("/v1/answer", {**SAMPLE, "precision": "both"})
    assert status == 200
    assert body["answer"]["text"] == "May 1887"
    for precision in ("int8", "fp16"):
        part = body["comparison"][precision]
        assert part["answer"]["text"] == "May 1887"
        assert part["timing_ms"]["inference"] > 0


def test_the_printed_curl_line_works_as_pasted(service: Service) -> None:
    """What start-up prints is a command a shell runs, and its answer is right."""
    line = next(text for text in service.lines if text.startswith("curl "))
    output = subprocess.run(
        line, shell=True, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert json.loads(output)["answer"]["text"] == "May 1887"


def test_the_hugging_face_client_works_unchanged(service: Service) -> None:
    """`InferenceClient.question_answering` gets one answer, or `top_k` of them."""
    client = InferenceClient(model=service.url)
    one = client.question_answering(question=SAMPLE_QUESTION, context=SAMPLE_CONTEXT)
    three = client.question_answering(
        question=SAMPLE_QUESTION, context=SAMPLE_CONTEXT, top_k=3
    )
    first = one[0] if isinstance(one, list) else one
    assert first.answer == "May 1887"
    assert SAMPLE_CONTEXT[first.start : first.end] == first.answer
    assert len(three) == 3
    assert three[0].answer == "May 1887"


def test_long_documents_are_answered_from_any_window(service: Service) -> None:
    """The answer is found when it lies many windows deep, with exact offsets."""
    filler = "The harbour was dredged again that year, and the quay repaired. " * 150
    context = f"{filler}{SAMPLE_CONTEXT} {filler}"
    status, body = service.post("/v1/answer", {**SAMPLE, "context": context})
    assert status == 200
    assert body["windows"] > 8
    answer = body["answer"]
    assert answer["text"] == "May 1887"
    assert context[answer["start"] : answer["end"]] == "May 1887"


def test_evaluation_questions_reach_the_f1_of_the_build(service: Service) -> None:
    """F1 through the service is what the build measured for the same questions."""
    output = subprocess.run(
        [
            *_cli("evaluate"),
            "--data",
            str(questions_file("evaluation")),
            "--precision",
            "int8",
            "--precision",
            "fp16",
            "--limit",
            "120",
            "--url",
            service.url,
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    report = json.loads(output)
    assert report["agreement"]["int8/fp16"] > 0.75
    int8 = report["results"]["int8"]["scores"]["f1"]
    fp16 = report["results"]["fp16"]["scores"]["f1"]
    assert int8 > 0.95 * fp16


def test_metrics_have_latencies_of_both_precisions(service: Service) -> None:
    """Histograms of both precisions hold what was asked, with sane sums."""
    service.post("/v1/answer", {**SAMPLE, "precision": "both"})
    text = service.get_text("/metrics")
    for precision in ("int8", "fp16"):
        pattern = (
            r"int8qa_stage_seconds_(sum|count)\{"
            rf'[^}}]*precision="{precision}"[^}}]*stage="inference"[^}}]*\}} (\S+)'
        )
        found = dict(re.findall(pattern, text))
        assert float(found["count"]) >= 1
        assert 0 < float(found["sum"]) / float(found["count"]) < 5


def test_a_killed_triton_comes_back_and_nobody_hangs(service: Service) -> None:
    """Triton killed under load: answers or 503 for everybody, then ready by itself."""
    questions = [
        question
        for question in load_questions(questions_file("evaluation"))
        if len(question.context) < 2000
    ]
    stop_at = time.monotonic() + 25

    def ask(index: int) -> set[int]:
        seen = set()
        while time.monotonic() < stop_at:
            question = questions[index % len(questions)]
            index += 7
            status, _ = service.post(
                "/v1/answer",
                {"question": question.question, "context": question.context},
                timeout_s=20,
            )
            seen.add(status)
            if status != 200:
                time.sleep(0.05)
        return seen

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(ask, index) for index in range(6)]
        time.sleep(2)
        victims = [
            pid
            for pid in group_of(service)
            if Path(f"/proc/{pid}/comm").read_text().strip() == "tritonserver"
        ]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
        # .result() raises if a request hung or broke off.
        statuses = set().union(*(worker.result() for worker in workers))
    assert 200 in statuses
    assert statuses <= {200, 503}
    service.wait_ready(60)
    assert any("restarts so far: 1" in line for line in service.lines)
    assert victims[0] not in group_of(service)
    assert service.post("/v1/answer", SAMPLE)[0] == 200


def test_a_second_service_on_the_port_is_refused_clearly(service: Service) -> None:
    """The second one ends at once with one line that names port and setting."""
    second = subprocess.run(
        _cli("up"),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "INT8QA_PORT": str(service.port)},
        check=False,
    )
    assert second.returncode == 78
    assert str(service.port) in second.stderr
    assert "INT8QA_PORT" in second.stderr
    assert "Traceback" not in second.stderr
    assert service.get_status("/ready") == 200


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_signals_stop_everything(demo_repository: object, number: int) -> None:
    """After Ctrl-C or SIGTERM no Triton, stub or port is left."""
    running = start_service(free_port())
    try:
        running.wait_ready()
        assert group_of(running)
        running.stop(number)
        assert not any("Traceback" in line for line in running.lines)
        assert not group_of(running)
        assert running.get_status("/live") == 0
    finally:
        running.stop(signal.SIGKILL)


def _cli(command: str) -> list[str]:
    return [sys.executable, "-m", "int8qa.cli", command]
