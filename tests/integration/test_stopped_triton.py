"""A real Triton that is stopped and goes on, without ever having died."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from int8qa.cli import SAMPLE_CONTEXT, SAMPLE_QUESTION
from tests.integration.conftest import Service, group_of

pytestmark = pytest.mark.triton
SAMPLE = {"question": SAMPLE_QUESTION, "context": SAMPLE_CONTEXT}
DEADLINE_S = 2.0


def ask(service: Service, deadline_s: float = DEADLINE_S) -> int:
    """One question with a deadline; the response must be what it says it is."""
    request = urllib.request.Request(
        f"{service.url}/v1/answer",
        data=json.dumps(SAMPLE).encode(),
        headers={
            "Content-Type": "application/json",
            "X-Request-Timeout": str(deadline_s),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, body = int(response.status), json.loads(response.read())
    except urllib.error.HTTPError as error:
        status, body = error.code, json.loads(error.read())
    if status == 200:
        assert body["answer"]["text"] == "May 1887"
    else:
        assert body["status"] == status
    return status


def test_a_stopped_triton_costs_deadlines_and_goes_on(service: Service) -> None:
    """Stopped: each request ends at its deadline or is refused. Resumed: answers."""
    (triton,) = [
        pid
        for pid in group_of(service)
        if Path(f"/proc/{pid}/comm").read_text().strip() == "tritonserver"
    ]
    assert ask(service) == 200
    os.kill(triton, signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            statuses = set(pool.map(lambda _: ask(service), range(24)))
    finally:
        os.kill(triton, signal.SIGCONT)
    assert statuses <= {503, 504}
    assert 504 in statuses
    service.wait_ready(60)
    limit = time.monotonic() + 30
    while ask(service) != 200:
        assert time.monotonic() < limit
        time.sleep(0.2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        # The pace of the stopped time still counts, and refuses what is in a hurry.
        patient = pool.map(lambda _: ask(service, 30.0), range(16))
        assert set(patient) == {200}
    assert triton in group_of(service)
    assert not any("restarts so far" in line for line in service.lines)
