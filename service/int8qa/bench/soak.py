"""Mixed traffic for a long while, and whether the gateway is then what it was.

In: a running gateway, its process id, a duration and a rate. Out: a JSON report and a
page with the curves; the exit status says whether nothing was lost and nothing grew.
Speaks HTTP alone and measures no speed: `int8qa bench` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

MAX_GROWTH = 0.05
"""Of the resident memory after warm-up, median of the last quarter to the first."""
MAX_DESCRIPTORS_MORE = 8
GRACE_S = 1.0
"""How long after its deadline a request may be answered."""
DEADLINE_S = 10.0
SAMPLE_S = 1.0
WARM_UP_SHARE = 0.2
CALIBRATION_S = 5.0
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


@dataclass
class Samples:
    """The process over time."""

    time_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)


class Soak:
    """One run against one gateway."""

    def __init__(self, client: httpx.AsyncClient, pid: int, seed: int) -> None:
        self._client = client
        self._process = Path(f"/proc/{pid}")
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
        self.samples = Samples()

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
        return done / CALIBRATION_S

    async def run(self, duration_s: float, rate: float) -> None:
        """Send at ``rate`` with Poisson arrivals, whatever comes back when."""
        sampler = asyncio.create_task(self._sample())
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

    async def _sample(self) -> None:
        start = time.monotonic()
        while True:
            status = (self._process / "status").read_text()
            rss_kib = int(status.partition("VmRSS:")[2].split()[0])
            self.samples.time_s.append(round(time.monotonic() - start, 1))
            self.samples.rss_mib.append(round(rss_kib / 1024, 2))
            descriptors = len(list((self._process / "fd").iterdir()))
            self.samples.descriptors.append(descriptors)
            self.samples.answered.append(sum(self.tally.statuses.values()))
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


def judge_growth(values: list[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter of what follows the warm-up."""
    steady = values[int(len(values) * WARM_UP_SHARE) :]
    quarter = max(1, len(steady) // 4)
    first, last = sorted(steady[:quarter]), sorted(steady[-quarter:])
    return first[len(first) // 2], last[len(last) // 2]


def build_report(soak: Soak, *, duration_s: float, rate: float) -> dict[str, Any]:
    """Figures, and what failed, in words; nothing failed where that is empty."""
    tally, samples = soak.tally, soak.samples
    rss_first, rss_last = judge_growth(samples.rss_mib)
    fd_first, fd_last = judge_growth([float(n) for n in samples.descriptors])
    failures = []
    if tally.lost:
        failures.append(f"{tally.lost} requests without a well-formed response")
    if tally.late:
        failures.append(f"{tally.late} responses over {GRACE_S} s late")
    if rss_last > rss_first * (1 + MAX_GROWTH):
        failures.append(f"memory grew from {rss_first} to {rss_last} MiB")
    if fd_last > fd_first + MAX_DESCRIPTORS_MORE:
        failures.append(f"descriptors grew from {fd_first:.0f} to {fd_last:.0f}")
    return {
        "duration_s": duration_s,
        "rate": round(rate, 2),
        "sent": dict(tally.sent),
        "statuses": dict(tally.statuses),
        "cancelled": tally.cancelled,
        "lost": tally.lost,
        "late": tally.late,
        "worst_lateness_s": round(tally.worst_lateness_s, 3),
        "rss_mib": {"after_warm_up": rss_first, "end": rss_last},
        "descriptors": {"after_warm_up": fd_first, "end": fd_last},
        "failures": failures,
        "samples": vars(samples),
    }


def write_page(report: dict[str, Any], path: Path) -> None:
    """Memory, descriptors and answers over time, on one self-contained page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    curves = {
        "rss_mib": "resident memory, MiB",
        "descriptors": "open descriptors",
        "answered": "responses so far",
    }
    samples = report["samples"]
    figure = make_subplots(
        rows=len(curves),
        cols=1,
        shared_xaxes=True,
        subplot_titles=list(curves.values()),
    )
    for row, name in enumerate(curves, 1):
        curve = go.Scatter(x=samples["time_s"], y=samples[name], name=curves[name])
        figure.add_trace(curve, row=row, col=1)
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="seconds", row=len(curves), col=1)
    outcome = "; ".join(report["failures"]) or "nothing lost, nothing grew"
    figure.update_layout(title=f"Soak: {outcome}", showlegend=False, height=800)
    figure.write_html(path, include_plotlyjs=True)


async def run_soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, run, judge."""
    # More connections than the gateway will ever see waiting: a request must not
    # queue in the client.
    limits = httpx.Limits(max_connections=2048, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=arguments.url, limits=limits, timeout=DEADLINE_S + 20
    ) as client:
        soak = Soak(client, arguments.pid, arguments.seed)
        rate = arguments.rate
        if rate is None:
            rate = arguments.load * await soak.measure_capacity()
            soak.tally = Tally()
        sys.stderr.write(f"{rate:.1f} requests/s for {arguments.duration:.0f} s\n")
        await soak.run(arguments.duration, rate)
        return build_report(soak, duration_s=arguments.duration, rate=rate)


def main(argv: list[str] | None = None) -> int:
    """Run as ``python -m int8qa.bench.soak``; 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pid", type=int, required=True, help="of the gateway")
    parser.add_argument("--duration", type=float, default=1200.0, help="seconds")
    parser.add_argument(
        "--load", type=float, default=0.8, help="share of the measured capacity"
    )
    parser.add_argument("--rate", type=float, help="requests a second, instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("soak"))
    arguments = parser.parse_args(argv)
    report = asyncio.run(run_soak(arguments))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "soak.json").write_text(json.dumps(report, indent=1))
    write_page(report, arguments.output / "soak.html")
    shown = {name: value for name, value in report.items() if name != "samples"}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
