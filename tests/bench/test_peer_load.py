"""The closed loop over HTTP: what is counted, and what is no answer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from int8qa.bench.peer_load import Outcome, PeerSpec, load_service, read_answer
from tests.bench.peer_fakes import CONTEXT, serve_answers, write_items


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"answer": "four"}', "four"),
        (b'{"answer": {"text": "four", "start": 0}}', "four"),
        (b'{"answer": null}', ""),
        (b'{"detail": "broken"}', None),
        (b'{"answer": {"start": 0}}', None),
        (b"[1]", None),
        (b"four", None),
    ],
)
def test_answers_of_every_service(body: bytes, text: str | None) -> None:
    """int8qa's object and the peers' plain text; no answer is one, nonsense is none."""
    assert read_answer(body) == text


def make_spec(tmp_path: Path, url: str, **changes: object) -> PeerSpec:
    values = {
        "url": url,
        "questions": str(write_items(tmp_path, 7)),
        "outcome": str(tmp_path / "outcome.json"),
        "repository": str(tmp_path),
        "concurrency": 3,
        "warm_up": 2,
    }
    return PeerSpec(**values | changes)  # type: ignore[arg-type]


async def test_every_question_once(tmp_path: Path) -> None:
    """After the warm-up, with the fields asked for, never more at once than allowed."""
    with serve_answers() as server:
        spec = make_spec(tmp_path, server.url, fields={"precision": "int8"})
        outcome = await load_service(spec)
    assert outcome.answers == {f"q{i}": f"answer {i}" for i in range(7)}
    assert len(outcome.latency_ms) == 7
    assert outcome.seconds > 0
    assert outcome.failures == {}
    assert len(server.bodies) == 2 + 7
    # Asked side by side, the two may reach the server in either order.
    warm_up = sorted(server.bodies[:2], key=lambda body: body["question"])
    assert warm_up == [
        {"question": question, "context": CONTEXT, "precision": "int8"}
        for question in ("Question 0?", "Question 1?")
    ]
    assert 1 <= server.most_at_once <= 3


async def test_failures_are_counted_by_kind(tmp_path: Path) -> None:
    """Nothing is asked twice, and what failed has no latency."""
    with serve_answers(broken={"Question 1?": 503, "Question 4?": 200}) as server:
        outcome = await load_service(make_spec(tmp_path, server.url, warm_up=0))
    assert outcome.failures == {"HTTP 503": 1, "not an answer": 1}
    assert sorted(outcome.answers) == ["q0", "q2", "q3", "q5", "q6"]
    assert len(outcome.latency_ms) == 5
    assert len(server.bodies) == 7


def test_as_a_process(tmp_path: Path) -> None:
    """A line in, a file out."""
    with serve_answers() as server:
        spec = make_spec(tmp_path, server.url)
        subprocess.run(
            [sys.executable, "-m", "int8qa.bench.peer_load"],
            input=json.dumps(asdict(spec)) + "\n",
            text=True,
            check=True,
        )
    outcome = Outcome(**json.loads(Path(spec.outcome).read_text()))
    assert len(outcome.answers) == 7
    assert outcome.cpu_s > 0
