"""The bad days of a fleet, rehearsed on one machine under steady load.

In: one build of a model, and perhaps a newer one. Out: a JSON-ready result; its
``problems`` say which requests failed and what did not come back. Starts three Tritons
and two gateways, and troubles them one after the other: docs/scaling.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8qa.bench.gateway_metrics import CounterChange
from int8qa.bench.provenance import describe_run, remark_load
from int8qa.bench.rehearsal_clients import Clients
from int8qa.bench.rehearsal_fleet import GATEWAYS, TRITONS, Fleet, prepare_builds
from int8qa.bench.rehearsal_result import (
    Phase,
    Record,
    build_result,
    count_windows,
    measure_triton,
    read_sent_again,
)
from int8qa.build.subject import data_name, questions_file
from int8qa.contract import load_contract
from int8qa.gateway.waiting import finish_within
from int8qa.reader.squad import load_questions
from int8qa.settings import EmbeddedSettings
from int8qa.stack import cancelled_by_signals

PACKAGES = ("nvidia-pytriton", "openvino", "grpcio", "tritonclient", "uvicorn")
RUSH, UNDISTURBED = "rush", "undisturbed"
"""The phases in which nothing happens to a Triton, so that its counters count."""
RUSH_S = 10.0
RUSH_CLIENTS = 32
"""Enough for batches of both gateways to meet in every Triton."""
SAMPLE_S = 0.5
PRE_STOP_S = 0.5
"""Between a gateway's last new request and its SIGTERM."""
BURST_S = 1.0
"""That much work a gateway has when it is told to end."""
RECOVERY_TIMEOUT_S = 120.0
KILLED, FROZEN, REPLACED = range(TRITONS)
"""Which Triton meets what."""
DRAINED = 1
"""Which gateway is drained."""
_GAUGE = "int8qa_tritons"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RehearsalOptions:
    """What ``int8qa bench rehearsal`` was told."""

    repository: Path
    output: Path
    """Directory for what the processes say."""
    embedded: EmbeddedSettings
    newer: Path | None = None
    """A newer build; None: the same engines under another id."""
    load: float = 0.25
    """Share of what the rush answers, which comes first."""
    rate: float | None = None
    """Questions a second, instead."""
    phase_s: float = 20.0
    """Length of each phase, and more where something takes longer to come back."""
    data: Path = field(default_factory=lambda: questions_file("evaluation"))
    seed: int = 1


def run_rehearsal(options: RehearsalOptions, say: Say = lambda _: None) -> Any:
    """Start everything, trouble it, end everything.

    Returns:
        The result, of JSON types only.

    Raises:
        ContractError: no complete model repository, or the same build twice.
        MissingDependencyError: there is no Triton to run here.
        EmbeddedTritonError: a Triton did not become ready.
        GatewayRequestError: a gateway did not become ready.
        DataFileError: the questions cannot be read.
        KeyboardInterrupt: SIGINT or SIGTERM; nothing is left running.
    """
    provenance = describe_run(PACKAGES)
    questions = load_questions(options.data)
    bodies = [{"question": one.question, "context": one.context} for one in questions]

    async def run(builds: list[Path]) -> dict[str, Any]:
        with cancelled_by_signals():
            async with Fleet(
                *builds, embedded=options.embedded, logs=options.output
            ) as fleet:
                urls = [gateway.url for gateway in fleet.gateways]
                clients = Clients(urls, bodies, seed=options.seed)
                rehearsal = Rehearsal(fleet, clients, options, say)
                await rehearsal.run()
            return build_result(rehearsal.record) | {
                "builds": [load_contract(path).build_id for path in builds],
                "addresses": fleet.addresses,
            }

    with tempfile.TemporaryDirectory(prefix="int8qa-rehearsal-") as place:
        builds = prepare_builds(options.repository, options.newer, Path(place))
        say(f"starting {TRITONS} Tritons and {GATEWAYS} gateways")
        try:
            result = asyncio.run(run(builds))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    result["remarks"] = remark_load(provenance) + result["remarks"]
    data = {"data": data_name(options.data, "evaluation"), "questions": len(questions)}
    return result | {"provenance": provenance | data}


class Rehearsal:
    """One run over a fleet that is ready."""

    def __init__(
        self, fleet: Fleet, clients: Clients, options: RehearsalOptions, say: Say
    ) -> None:
        self._fleet = fleet
        self._clients = clients
        self._options = options
        self._say = say
        self._began = time.time() - clients.now_s()
        self.record = Record()

    async def run(self) -> None:
        """All phases, and what they left in logs and counters."""
        record, clients = self.record, self._clients
        async with _beside(self._watch()):
            await self._run_phase(RUSH, self._rush)
            answered = sum(one.failure is None for one in clients.ended)
            record.capacity = answered / record.phases[0].end_s
            record.rate = self._options.rate or self._options.load * record.capacity
            async with _beside(clients.run_steadily(record.rate)):
                for name, act in (
                    (UNDISTURBED, self._leave_alone),
                    ("Triton killed", self._kill),
                    ("Triton stopped", self._freeze),
                    ("Triton replaced", self._replace),
                    ("gateway drained", self._drain),
                    ("two builds", self._leave_alone),
                ):
                    await self._run_phase(name, act)
            await clients.finish()
        record.asked = clients.ended
        sent = await self._fleet.read_gateway(DRAINED)
        record.newer_windows = {
            "sent": round(CounterChange("", sent).sum("int8qa_batch_windows_sum")),
            "computed": count_windows(await self._fleet.read_triton(REPLACED)),
        }
        for number in range(GATEWAYS):
            text = self._fleet.log_path(number).read_text("utf-8", "replace")
            record.sent_again += read_sent_again(text.splitlines(), number, self._began)

    async def _run_phase(self, name: str, act: Callable[[], Awaitable[None]]) -> None:
        # The others start a Triton again, and it counts from 0.
        counted = name in (RUSH, UNDISTURBED)
        length_s = RUSH_S if name == RUSH else self._options.phase_s
        begin_s = self._clients.now_s()
        before = await self._read_tritons() if counted else []
        await asyncio.gather(act(), asyncio.sleep(length_s))
        after = await self._read_tritons() if counted else []
        for texts in zip(self._fleet.addresses, before, after, strict=False):
            self.record.uses.append(measure_triton(name, *texts))
        end_s = self._clients.now_s()
        self.record.phases.append(Phase(name, begin_s, end_s))

    async def _read_tritons(self) -> list[str]:
        return [await self._fleet.read_triton(number) for number in range(TRITONS)]

    # What happens in the phases.

    async def _rush(self) -> None:
        self._note(f"{RUSH_CLIENTS} clients ask as fast as they are answered")
        await self._clients.rush(RUSH_S, RUSH_CLIENTS)

    async def _leave_alone(self) -> None:
        self._note(f"{self.record.rate:.1f} questions/s, nothing else happens")

    async def _kill(self) -> None:
        self._note(f"Triton {KILLED + 1} is killed")
        try:
            await finish_within(self._fleet.kill(KILLED), RECOVERY_TIMEOUT_S)
        except asyncio.TimeoutError:
            self.record.problems.append(
                f"Triton {KILLED + 1} was not ready {RECOVERY_TIMEOUT_S:g} s after "
                f"its end; tritons.log says why"
            )
            return
        self._note(f"Triton {KILLED + 1} was started again and is ready")
        await self._wait_serving([TRITONS] * GATEWAYS)

    async def _freeze(self) -> None:
        self._note(f"Triton {FROZEN + 1} is stopped (SIGSTOP)")
        self._fleet.freeze(FROZEN)
        await asyncio.sleep(self._options.phase_s / 2)
        self._note(f"Triton {FROZEN + 1} goes on (SIGCONT)")
        self._fleet.resume(FROZEN)
        await self._wait_serving([TRITONS] * GATEWAYS)

    async def _replace(self) -> None:
        self._note(f"Triton {REPLACED + 1} is ended in order")
        await self._fleet.replace(REPLACED)
        self._note(f"Triton {REPLACED + 1} is ready with the newer build")
        await self._wait_serving([TRITONS - 1] * GATEWAYS)

    async def _drain(self) -> None:
        """As Kubernetes ends a pod: first no new requests, then SIGTERM."""
        clients, name = self._clients, f"gateway {DRAINED + 1}"
        for _ in range(round(BURST_S * self.record.capacity)):
            clients.send(DRAINED)
        clients.in_service[DRAINED] = False
        self._note(f"{name} gets no new requests")
        await asyncio.sleep(PRE_STOP_S)
        under_way = self.record.under_way_at_drain = clients.under_way[DRAINED]
        self._note(f"{name} is told to end (SIGTERM), {under_way} requests under way")
        status = await self._fleet.drain(DRAINED)
        self._note(f"{name} has ended")
        if status:
            self.record.problems.append(f"{name} ended with status {status}")
        self.record.newer_since_s = clients.now_s()
        text = await self._fleet.read_triton(REPLACED)
        self.record.early_windows = count_windows(text)
        await self._fleet.start_newer(DRAINED)
        clients.in_service[DRAINED] = True
        self._note(f"{name} is ready for the newer build and takes part again")
        await self._wait_serving([TRITONS - 1, 1])

    async def _wait_serving(self, wanted: list[int]) -> None:
        """Until each gateway uses so many Tritons, or it takes too long."""
        until_s = self._clients.now_s() + RECOVERY_TIMEOUT_S
        while (found := await self._count_serving()) != wanted:
            if self._clients.now_s() >= until_s:
                self.record.problems.append(
                    f"after {RECOVERY_TIMEOUT_S:g} s the gateways use {found} Tritons "
                    f"each, not {wanted}"
                )
                return
            await asyncio.sleep(SAMPLE_S)

    async def _watch(self) -> None:
        while True:
            at_s = self._clients.now_s()
            self.record.serving.append((at_s, await self._count_serving()))
            await asyncio.sleep(SAMPLE_S)

    async def _count_serving(self) -> list[int | None]:
        """The Tritons that each gateway uses; None for a gateway that is away."""
        counts: list[int | None] = []
        for number in range(GATEWAYS):
            lines = (await self._fleet.read_gateway(number)).splitlines()
            # Of twice a second, the rest need not be parsed.
            text = "\n".join(line for line in lines if line.startswith(_GAUGE)) + "\n"
            found = CounterChange("", text).list(_GAUGE, state="serving")
            counts.append(round(min(found)) if found else None)
        return counts

    def _note(self, what: str) -> None:
        at_s = self._clients.now_s()
        self.record.events.append((at_s, what))
        self._say(f"[{at_s:.0f} s] {what}")


@contextlib.asynccontextmanager
async def _beside(work: Any) -> Any:
    """Have something run while the block does; its failure is the block's."""
    task = asyncio.create_task(work)
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
