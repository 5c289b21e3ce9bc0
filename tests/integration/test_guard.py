"""An INT8 model that went bad under live traffic: noticed, replaced, trusted again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from int8qa.build.subject import questions_file
from int8qa.reader.squad import load_questions
from tests.integration.conftest import Service, free_port, group_of, start_service

pytestmark = pytest.mark.triton
PAIRS = 20
LIMIT_S = 120.0


def reverse_weights(model: Path) -> None:
    """Turn every INT8 weight tensor back to front: finite logits, and nonsense."""
    text = model.read_text(encoding="utf-8")
    weights = model.with_suffix(".bin")
    data = bytearray(weights.read_bytes())
    spans = re.findall(
        r'<data element_type="i8"[^>]* offset="(\d+)" size="(\d+)"', text
    )
    assert spans, "no INT8 weights in the model"
    for offset, size in spans:
        low, high = int(offset), int(offset) + int(size)
        data[low:high] = data[low:high][::-1]
    weights.write_bytes(data)


@pytest.fixture
def repository(demo_repository: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model_repository"
    shutil.copytree(demo_repository, copy, ignore=shutil.ignore_patterns("__pycache__"))
    reverse_weights(copy / "qa_int8" / "1" / "model.xml")
    return copy


@pytest.fixture
def guarded(repository: Path) -> Iterator[Service]:
    running = start_service(
        free_port(),
        # As it is: `up` would mend it.
        command=[sys.executable, "-m", "int8qa.cli", "up", "--no-build"],
        INT8QA_MODEL_REPOSITORY=str(repository),
        INT8QA_DEFAULT_PRECISION="int8",
        INT8QA_COMPARISON__FRACTION="1",
        INT8QA_COMPARISON__CAPACITY_SHARE="1",
        INT8QA_COMPARISON__GUARD="fallback",
        INT8QA_COMPARISON__GUARD_PAIRS=str(PAIRS),
        # The few questions that INT8 and FP16 answer differently are no accident.
        INT8QA_COMPARISON__GUARD_AGREEMENT="0.6",
    )
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def ask_until(service: Service, serving: str) -> list[int]:
    """Ask without naming a precision until ``serving`` answers; every status seen."""
    loaded = load_questions(questions_file("evaluation"))
    questions = [question for question in loaded if question.answers]
    statuses = []
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        question = questions[len(statuses) % len(questions)]
        # One window around the answer: many pairs in little time.
        middle = question.answer_starts[0]
        context = question.context[max(0, middle - 200) : middle + 200]
        body = {"question": question.question, "context": context}
        status, answer = service.post("/v1/answer", body)
        statuses.append(status)
        if status == 200 and answer["precision"] == serving:
            return statuses
        # Replays happen in the pauses between requests.
        time.sleep(0.03)
    pytest.fail(f"{serving} never answered; statuses {set(statuses)}")


def test_traffic_leaves_a_corrupted_int8_and_comes_back(
    guarded: Service, repository: Path, demo_repository: Path
) -> None:
    """FP16 takes over when INT8 disagrees, until a sound INT8 agrees again."""
    statuses = ask_until(guarded, "fp16")
    assert set(statuses) == {200}
    report = json.loads(guarded.get_text("/v1/comparison"))
    assert report["guard"]["state"] == "tripped"
    assert report["guard"]["agreement"] < 0.6
    assert report["disagreements"]
    assert "int8qa_guard_tripped 1.0" in guarded.get_text("/metrics")

    sound = demo_repository / "qa_int8" / "1" / "model.bin"
    shutil.copyfile(sound, repository / "qa_int8" / "1" / "model.bin")
    for pid in group_of(guarded):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "tritonserver":
            os.kill(pid, signal.SIGKILL)
    statuses = ask_until(guarded, "int8")
    assert set(statuses) <= {200, 503}
    # Most of the window is from the sound model by now, and stays so.
    for _ in range(PAIRS):
        ask_until(guarded, "int8")
    report = json.loads(guarded.get_text("/v1/comparison"))
    assert report["guard"]["state"] == "ok"
    lines = "".join(guarded.lines)
    assert "guard_tripped" in lines
    assert "guard_recovered" in lines
