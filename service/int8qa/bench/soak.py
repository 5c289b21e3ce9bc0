"""Mixed traffic for a long while, and whether the service is then what it was.

In: a running gateway, its process id, a duration and a rate. Out: a JSON-ready result;
its ``problems`` say what was lost and what grew. Speaks HTTP alone and measures no
speed: ``int8qa bench gateway`` does.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from int8qa.bench.processes import Watch
from int8qa.bench.provenance import describe_run
from int8qa.client import build_key_headers
from int8qa.errors import GatewayRequestError

FORMAT_VERSION = 1
PACKAGES = ("httpx", "fastapi", "uvicorn", "uvloop", "tritonclient")
MAX_GROWTH = 0.05
"""Of the resident memory after warm-up, median of the last quarter to the first."""
MAX_DESCRIPTORS_MORE = 8
GRACE_S = 1.0
"""How long after its deadline a request may be answered."""
DEADLINE_S = 10.0
SAMPLE_S = 1.0
WARM_UP_SHARE = 0.2
CALIBRATION_S = 10.0
CALIBRATION_CLIENTS = 16

_SENTENCE = (
    "Work on the Norrvik lighthouse began in 1884. It was finished in May 1887 and "
    "cost 41,200 crowns. "
)
_QUESTION = "When was the lighthouse finished?"
_BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"question": 1}',
    b'{"question": "?", "context": ""}',
    b'{"question": "?", "question": "?", "context": "x"}',
    b"[" * 100_000,
)


@dataclass
class Tally:
    """What became of every request."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    lost: int = 0
    """No response, or one that is not well-formed."""
    late: int = 0
    """Answered, but more than ``GRACE_S`` after the deadline."""
    worst_lateness_s: float = 0.0


class Soak:
    """One run against one gateway."""

    def __init__(self, client: httpx.AsyncClient, watch: Watch, seed: int) -> None:
        self._client = client
        self.watch = watch
        self._draw = random.Random(seed)  # noqa: S311 - the mix, no secret
        self._kinds: tuple[tuple[str, float, Callable[[], Awaitable[None]]], ...] = (
            ("short", 0.60, self._ask_short),
            ("long", 0.10, self._ask_long),
            ("items", 0.10, self._ask_items),
            ("lines", 0.05, self._ask_lines),
            ("cancelled", 0.08, self._leave),
            ("bad", 0.07, self._ask_badly),
        )
        self.tally = Tally()
        self.answered: list[int] = []
        """Responses so far, at each of the watch's samples."""

    async def measure_capacity(self) -> float:
        """Requests a second of the mix's sound kinds, answered back to back."""
        until = time.monotonic() + CALIBRATION_S
        done = 0

        async def ask_on() -> None:
            nonlocal done
            while time.monotonic() < until:
                await self._pick(answered_only=True)
                done += 1

        await asyncio.gather(*(ask_on() for _ in range(CALIBRATION_CLIENTS)))
        if self.tally.lost:
            raise GatewayRequestError(
                f"{self.tally.lost} of the first {sum(self.tally.sent.values())} "
                f"requests got no well-formed answer; nothing was measured. Is this an "
                f"int8qa gateway that is ready, and is INT8QA_API_KEY its key?"
            )
        self.tally = Tally()
        return done / CALIBRATION_S

    async def run(
        self,
        duration_s: float,
        rate: float,
        on_second: Callable[[float], None] = lambda _elapsed_s: None,
    ) -> None:
        """Send at ``rate`` with Poisson arrivals, whatever comes back when."""
        sampler = asyncio.create_task(self._sample(on_second))
        tasks: set[asyncio.Task[None]] = set()
        start = due = time.monotonic()
        while due < start + duration_s:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._pick())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self._draw.expovariate(rate)
        if tasks:
            await asyncio.wait(tasks, timeout=DEADLINE_S + 10)
        self.tally.lost += len(tasks)
        await asyncio.sleep(2 * SAMPLE_S)
        sampler.cancel()

    async def _pick(self, *, answered_only: bool = False) -> None:
        kinds = self._kinds[:4] if answered_only else self._kinds
        shares = [share for _, share, _ in kinds]
        name, _, ask = self._draw.choices(kinds, shares)[0]
        self.tally.sent[name] += 1
        await ask()

    async def _sample(self, on_second: Callable[[float], None]) -> None:
        start = time.monotonic()
        while True:
            elapsed_s = time.monotonic() - start
            self.watch.sample(elapsed_s)
            self.answered.append(sum(self.tally.statuses.values()))
            on_second(elapsed_s)
            await asyncio.sleep(SAMPLE_S)

    # The mix.

    async def _ask_short(self) -> None:
        await self._post(self._build_question(self._draw.randint(1, 12)))

    async def _ask_long(self) -> None:
        await self._post(self._build_question(self._draw.randint(40, 150)))

    async def _ask_items(self) -> None:
        await self._post(self._build_items(), path="/v1/answers")

    async def _ask_lines(self) -> None:
        accept = {"Accept": "application/x-ndjson"}
        await self._post(self._build_items(), path="/v1/answers", headers=accept)

    async def _ask_badly(self) -> None:
        await self._post(self._draw.choice(_BAD_BODIES), expect_refusal=True)

    async def _leave(self) -> None:
        request = asyncio.create_task(self._send(self._build_question(100)))
        await asyncio.wait({request}, timeout=self._draw.uniform(0.0, 0.2))
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        self.tally.cancelled += 1

    def _build_question(self, sentences: int) -> bytes:
        precision = self._draw.choice(["int8", "int8", "fp16"])
        return json.dumps(
            {
                "question": _QUESTION,
                "context": _SENTENCE * sentences,
                "precision": precision,
            }
        ).encode()

    def _build_items(self) -> bytes:
        items = [{"question": _QUESTION, "context": _SENTENCE * n} for n in (1, 3, 9)]
        return json.dumps({"items": items}).encode()

    async def _send(
        self, body: bytes, path: str = "/v1/answer", **headers: str
    ) -> httpx.Response:
        return await self._client.post(
            path,
            content=body,
            headers={
                "Content-Type": "application/json",
                "X-Request-Timeout": str(DEADLINE_S),
                **headers,
            },
        )

    async def _post(
        self,
        body: bytes,
        *,
        path: str = "/v1/answer",
        headers: dict[str, str] | None = None,
        expect_refusal: bool = False,
    ) -> None:
        started = time.monotonic()
        try:
            response = await self._send(body, path, **(headers or {}))
            sound = _is_well_formed(response, expect_refusal=expect_refusal)
        except (httpx.HTTPError, ValueError, KeyError):
            self.tally.lost += 1
            return
        lateness_s = time.monotonic() - started - DEADLINE_S
        self.tally.worst_lateness_s = max(self.tally.worst_lateness_s, lateness_s)
        self.tally.late += lateness_s > GRACE_S
        self.tally.lost += not sound
        self.tally.statuses[str(response.status_code)] += 1


def _is_well_formed(response: httpx.Response, *, expect_refusal: bool) -> bool:
    if response.headers["content-type"].startswith("application/x-ndjson"):
        lines = response.text.splitlines()
        return {json.loads(line)["index"] for line in lines} == {0, 1, 2}
    body = response.json()
    if response.status_code == 200:
        return not expect_refusal and ("answer" in body or len(body["items"]) == 3)
    return bool(body["status"] == response.status_code) and (
        400 <= response.status_code < 500
        if expect_refusal
        else response.status_code in (429, 503, 504)
    )


def judge_growth(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter of what follows the warm-up; else 0."""
    steady = values[int(len(values) * WARM_UP_SHARE) :] or [0]
    quarter = max(1, len(steady) // 4)
    first, last = sorted(steady[:quarter]), sorted(steady[-quarter:])
    return first[len(first) // 2], last[len(last) // 2]


def build_result(soak: Soak, *, duration_s: float, rate: float) -> dict[str, Any]:
    """Figures, and what failed, in words; nothing failed where that is empty."""
    tally = soak.tally
    problems = []
    if tally.lost:
        problems.append(f"{tally.lost} requests without a well-formed response")
    if tally.late:
        problems.append(f"{tally.late} responses over {GRACE_S:g} s late")
    processes = []
    for curve in soak.watch.curves:
        rss_first, rss_last = judge_growth(curve.rss_mib)
        fd_first, fd_last = judge_growth(curve.descriptors)
        if curve.ended:
            problems.append(f"{curve.name} ended")
        if rss_last > rss_first * (1 + MAX_GROWTH):
            problems.append(
                f"{curve.name}: memory grew from {rss_first} to {rss_last} MiB"
            )
        if fd_last > fd_first + MAX_DESCRIPTORS_MORE:
            problems.append(
                f"{curve.name}: descriptors grew from {fd_first} to {fd_last}"
            )
        processes.append(
            {
                "name": curve.name,
                "rss_mib": {"after_warm_up": rss_first, "end": rss_last},
                "descriptors": {"after_warm_up": fd_first, "end": fd_last},
                "samples": {"rss_mib": curve.rss_mib, "descriptors": curve.descriptors},
            }
        )
    return {
        "kind": "soak",
        "format_version": FORMAT_VERSION,
        "duration_s": duration_s,
        "rate": round(rate, 2),
        "deadline_s": DEADLINE_S,
        "sent": dict(tally.sent),
        "statuses": dict(tally.statuses),
        "cancelled": tally.cancelled,
        "lost": tally.lost,
        "late": tally.late,
        "worst_lateness_s": round(tally.worst_lateness_s, 3),
        "processes": processes,
        "time_s": soak.watch.time_s,
        "answered": soak.answered,
        "problems": problems,
        "remarks": [],
    }


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """What ``int8qa bench soak`` was told."""

    url: str
    pid: int
    """Of the gateway; its children are watched with it."""
    duration_s: float = 1200.0
    load: float = 0.8
    """Share of the capacity that is measured first."""
    rate: float | None = None
    """Requests a second, instead."""
    seed: int = 1


def run_soak(
    options: SoakOptions, on_second: Callable[[float, float], None]
) -> dict[str, Any]:
    """Measure the capacity, load, judge.

    Args:
        options: see there.
        on_second: called with the seconds since the start and the rate.

    Raises:
        GatewayRequestError: no such process, no gateway, or one that does not answer.
    """
    watch = Watch(options.pid)
    provenance = describe_run(PACKAGES)
    return asyncio.run(_run(options, watch, on_second)) | {"provenance": provenance}


async def _run(
    options: SoakOptions, watch: Watch, on_second: Callable[[float, float], None]
) -> dict[str, Any]:
    # More connections than the gateway will ever see waiting: a request must not
    # queue in the client.
    limits = httpx.Limits(max_connections=2048, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=options.url,
        limits=limits,
        timeout=DEADLINE_S + 20,
        headers=build_key_headers(),
        trust_env=False,
    ) as client:
        soak = Soak(client, watch, options.seed)
        rate = options.rate
        if rate is None:
            rate = options.load * await soak.measure_capacity()
        await soak.run(options.duration_s, rate, lambda at_s: on_second(at_s, rate))
        return build_result(soak, duration_s=options.duration_s, rate=rate)
