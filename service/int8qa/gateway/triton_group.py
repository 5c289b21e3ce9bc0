"""Several Tritons as one engine.

In: batches of one contract's build. Out: logits of whichever is next in turn among the
Tritons that serve that build, and an error once none does. gRPC balances, reconnects
and retries; here is what it cannot know: who is of the build, and who has taken a batch
and will never answer. Why it is so: docs/decisions/0018-many-tritons.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from int8qa.contract import Contract, Precision
from int8qa.errors import EngineUnavailableError
from int8qa.gateway.engine import Engine
from int8qa.gateway.logs import get_logger
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.gateway.tracing import NO_TRACING, Tracing
from int8qa.gateway.triton import CHANNEL_ARGUMENTS, TritonEngine
from int8qa.gateway.triton_addresses import DNS_SCHEME, build_target, names_several
from int8qa.gateway.triton_members import Round, TritonMembers

LATE_S = 0.25
"""A batch that takes longer has the Tritons probed, and again whenever it has taken
twice as long. Where all of them answer that is all: slow is not lost."""

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.2s",
                "backoffMultiplier": 2,
                # A batch changes nothing in Triton: it may run twice.
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
"""Source: gRPC's proposals A2 and A6. No healthCheckConfig (A17): Triton answers Check
but not Watch, whereupon gRPC takes it for healthy and logs an error."""

_BALANCED_ARGUMENTS = (
    *CHANNEL_ARGUMENTS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # What is larger is not retried, and gRPC's default of 256 KiB is 56 x 384 tokens.
    ("grpc.per_rpc_retry_buffer_size", 64 * 2**20),
)


Count = Callable[[Precision, int, int], None]
"""Told after each round how many serve a model, and how many are left out."""


def open_tritons(
    url: str,
    contract: Contract,
    *,
    control_key: str = "",
    tracing: Tracing = NO_TRACING,
    count: Count = lambda _precision, _serving, _left_out: None,
) -> Engine:
    """The engine for ``INT8QA_TRITON__URL``: one Triton, or a group."""
    if names_several(url):
        return TritonGroup(
            url, contract, control_key=control_key, tracing=tracing, count=count
        )
    return TritonEngine(url, contract, control_key=control_key, tracing=tracing)


class _Route:
    """One channel to all who serve a model; in it gRPC balances and retries.

    gRPC's Python takes no resolver of ours, so a route never changes: another takes
    its place, and it is closed after its last batch.
    """

    def __init__(self, engine: TritonEngine, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self._engine = engine
        self._calls: set[asyncio.Task[BatchLogits]] = set()
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    def send(
        self, precision: Precision, batch: PaddedBatch, timeout_s: float | None
    ) -> asyncio.Task[BatchLogits]:
        """Send a batch to the next in turn."""
        call = asyncio.create_task(self._engine.infer(precision, batch, timeout_s))
        self._calls.add(call)
        call.add_done_callback(self._on_end)
        return call

    def retire(self) -> None:
        """Take no more batches; those on their way go on."""
        self._retired = True
        self._close_if_idle()

    async def close(self) -> None:
        """Close at once."""
        await self._engine.close()

    def _on_end(self, call: asyncio.Task[BatchLogits]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # perhaps of a second answer, which nobody reads
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self._calls and self._closing is None:
            self._closing = asyncio.create_task(self._engine.close())


class TritonGroup:
    """Tritons that serve the same models, each as good as another.

    For each precision those take part that answered the last round of probes with the
    contract's own model. A round is asked by the readiness watch, and by a batch that
    is late or failed.
    """

    def __init__(
        self,
        url: str,
        contract: Contract,
        *,
        control_key: str = "",
        tracing: Tracing = NO_TRACING,
        count: Count = lambda _precision, _serving, _left_out: None,
    ) -> None:
        self._name = url.replace(DNS_SCHEME, "")
        self._contract = contract
        self._tracing = tracing
        self._count = count
        self._members = TritonMembers(url, contract, control_key=control_key)
        self._routes: dict[Precision, _Route] = {}
        self._rounds: dict[Precision, asyncio.Task[Round]] = {}
        self._found: dict[Precision, Round] = {}

    async def connect(self) -> None:
        """Nothing yet: the first round of probes connects."""

    async def close(self) -> None:
        """Close every channel."""
        rounds = list(self._rounds.values())
        for round_ in rounds:
            round_.cancel()
        await asyncio.gather(*rounds, return_exceptions=True)
        while self._routes:
            _, route = self._routes.popitem()
            await route.close()
        await self._members.close()

    async def ready(self, precision: Precision) -> bool:
        """Whether at least one Triton serves the model; asks all.

        Raises:
            EngineUnavailableError: none can be reached.
        """
        await self._members.find()
        found = await asyncio.shield(self._refresh(precision))
        return found.require_contact(self._name)

    async def check_contract(self, precision: Precision) -> None:
        """Refuse where every Triton that answered last is of another build.

        Raises:
            ContractError: which build, or what differs, at one of them.
        """
        found = self._found.get(precision)
        if found is None:
            found = await asyncio.shield(self._refresh(precision))
        found.require_build()

    async def holds(self, precision: Precision) -> bool:
        """Whether all have the model of the contract loaded, and no other.

        Raises:
            EngineUnavailableError: one cannot be reached.
        """
        return await self._members.hold(precision)

    async def load(self, precision: Precision) -> None:
        """Have all of them load the model, or none.

        Raises:
            ModelLoadError: one refused or failed; says which and why.
        """
        await self._members.load(precision)

    async def unload(self, precision: Precision) -> None:
        """Have all of them give the model up.

        Raises:
            ModelLoadError: one refused or failed; says which and why.
        """
        await self._members.unload(precision)

    async def infer(
        self, precision: Precision, batch: PaddedBatch, timeout_s: float | None
    ) -> BatchLogits:
        """Run one batch on one Triton, and if need be once more on another.

        It is sent again if it failed for want of a Triton; or if it is late and a
        Triton that may have it was lost meanwhile. Then the first answer counts: more
        likely than not another has it, and is nearly done.

        Raises:
            DeadlineExceededError: no answer within ``timeout_s``.
            EngineUnavailableError: no Triton is left, or the second one failed too.
            EngineOutputError: a Triton refused the batch or answered nonsense.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        route = self._require_route(precision)
        calls = [route.send(precision, batch, timeout_s)]
        try:
            await self._wait(precision, route, calls[0])
            ended = calls[0].done()
            if ended:
                if not _is_worth_another(calls[0]):
                    return calls[0].result()
                found = await asyncio.shield(self._refresh(precision))
                if not found.serving:
                    return calls[0].result()
            spent_s = loop.time() - started
            get_logger().warning(
                "batch_sent_again",
                precision=precision.value,
                reason="unavailable" if ended else "late",
                after_s=round(spent_s, 3),
            )
            left_s = None if timeout_s is None else max(timeout_s - spent_s, 0.001)
            calls.append(self._require_route(precision).send(precision, batch, left_s))
            return await _take_first(calls)
        finally:
            for call in calls:
                call.cancel()

    async def _wait(
        self, precision: Precision, route: _Route, call: asyncio.Task[BatchLogits]
    ) -> None:
        """Return once the call is done; or late, and a Triton of its route lost."""
        late_s = LATE_S
        while True:
            await asyncio.wait({call}, timeout=late_s)
            late_s *= 2
            if call.done() or self._has_lost(precision, route):
                return
            round_ = self._refresh(precision)
            await asyncio.wait({call, round_}, return_when=asyncio.FIRST_COMPLETED)
            if call.done() or self._has_lost(precision, route):
                return

    def _has_lost(self, precision: Precision, route: _Route) -> bool:
        now = self._require_route(precision).addresses
        return not set(route.addresses) <= set(now)

    def _require_route(self, precision: Precision) -> _Route:
        route = self._routes.get(precision)
        if route is None:
            raise EngineUnavailableError(
                f"no Triton of {self._name} serves {precision}; try again shortly"
            )
        return route

    def _refresh(self, precision: Precision) -> asyncio.Task[Round]:
        """The round of probes that runs, or a new one."""
        task = self._rounds.get(precision)
        if task is None or task.done():
            task = asyncio.create_task(self._ask_all(precision))
            self._rounds[precision] = task
        return task

    async def _ask_all(self, precision: Precision) -> Round:
        found = await self._members.ask(precision)
        self._tell(precision, found)
        self._count(precision, len(found.serving), len(found.faults))
        self._found[precision] = found
        before = self._routes.get(precision)
        # Where none serves, the last ones are as good a guess as any.
        if found.serving and (before is None or before.addresses != found.serving):
            engine = TritonEngine(
                self._name,
                self._contract,
                tracing=self._tracing,
                target=build_target(found.serving),
                channel_arguments=_BALANCED_ARGUMENTS,
                servers=len(found.serving),
            )
            await engine.connect()
            self._routes[precision] = _Route(engine, found.serving)
            if before is not None:
                before.retire()
        return found

    def _tell(self, precision: Precision, found: Round) -> None:
        """Log who takes part, where that changed."""
        before = self._found.get(precision)
        if (
            before is not None
            and before.serving == found.serving
            and before.faults.keys() == found.faults.keys()
        ):
            return
        log = get_logger()
        (log.warning if found.faults else log.info)(
            "tritons_changed",
            precision=precision.value,
            serving=found.serving,
            left_out={address: str(fault) for address, fault in found.faults.items()},
        )


def _is_worth_another(call: asyncio.Task[BatchLogits]) -> bool:
    """Whether a call that is done failed for want of a Triton, and of nothing else."""
    return not call.cancelled() and isinstance(call.exception(), EngineUnavailableError)


async def _take_first(calls: list[asyncio.Task[BatchLogits]]) -> BatchLogits:
    """The first answer; the last call's failure, if there is none."""
    pending = set(calls)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            if not call.cancelled() and call.exception() is None:
                return call.result()
    return calls[-1].result()
