"""What the gateway asks of an engine, and the task that watches whether it is there.

In: an engine behind a small protocol. Out: per precision ready or not, and why not.
Knows neither Triton nor HTTP: tests put an engine in memory here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from int8qa.contract import Contract, Precision, load_contract
from int8qa.errors import (
    ContractError,
    EngineUnavailableError,
    Int8qaError,
)
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.tensors import BatchLogits, PaddedBatch
from int8qa.gateway.waiting import finish_within

HEALTHY_FACTOR = 4.0
"""A ready engine is probed this much less often than a lost one is looked for."""
JITTER = 0.25
"""Intervals vary by this share, so that many gateways do not probe in step."""


class Engine(Protocol):
    """One inference server, or several alike; every error is one of int8qa's."""

    async def connect(self) -> None:
        """Open what the engine needs; returns at once, whether it is there or not."""

    async def ready(self, precision: Precision) -> bool:
        """Whether the model of a precision answers somewhere; False while it loads.

        Raises:
            EngineUnavailableError: the server cannot be reached.
        """

    async def check_contract(self, precision: Precision) -> None:
        """Hold the served model to the contract.

        Raises:
            ContractError: it is another model than the one that was built.
            EngineUnavailableError: the server cannot be reached.
        """

    async def holds(self, precision: Precision) -> bool:
        """Whether every server has the model of the contract loaded, and no other.

        ``ready`` asks less, where there are several: whether one has it.

        Raises:
            EngineUnavailableError: a server cannot be reached.
        """

    async def load(self, precision: Precision) -> None:
        """Have every server load the model, or none; those they serve go on.

        Raises:
            ModelLoadError: one refused or failed; says why.
        """

    async def unload(self, precision: Precision) -> None:
        """Have every server give the model up.

        Raises:
            ModelLoadError: it refused or failed; says why.
        """

    async def infer(
        self, precision: Precision, batch: PaddedBatch, timeout_s: float | None
    ) -> BatchLogits:
        """Run one padded batch.

        Raises:
            DeadlineExceededError: no answer within ``timeout_s``.
            EngineUnavailableError: the server cannot be reached.
            EngineOutputError: it answered, but not with logits [B, S].
        """

    async def close(self) -> None:
        """Release what ``connect`` opened."""


def find_rebuild(repository: Path, contract: Contract) -> str | None:
    """Why a model repository is not the one ``contract`` came from, None if it is.

    Models of two builds may agree in names and types, and yet need another tokenizer.
    Where the models themselves say whose they are, the repository is not asked. Nothing
    is known of one that is not on this machine: None.
    """
    if contract.generation or not repository.is_dir():
        return None
    try:
        found = load_contract(repository)
    except ContractError as error:
        return str(error)
    if found.build_id == contract.build_id:
        return None
    return (
        f"the model repository was rebuilt (build {found.build_id}, this gateway "
        f"loaded {contract.build_id}): restart the gateway"
    )


class ReadinessWatch:
    """One supervised task that keeps asking the engine whether it can serve.

    A model is ready once it answers and agrees with the contract. A lost one is
    looked for every ``probe_interval_s``, with jitter; nothing polls faster, however
    many requests fail.

    An engine that comes back may have loaded another build meanwhile, so while any
    model is lost, ``find_rebuild`` is asked too, in a thread, and what it returns keeps
    the models unready. An engine that never left still has what it loaded: it serves
    on beside a repository that is being rebuilt. One that answers, but not with the
    models of the contract, has another build: ``on_other_build`` is told each time.
    """

    def __init__(
        self,
        engine: Engine,
        contract: Contract,
        *,
        probe_interval_s: float,
        find_rebuild: Callable[[], str | None] = lambda: None,
        on_other_build: Callable[[], None] = lambda: None,
        on_change: Callable[[Precision, bool], None] = lambda _precision, _ready: None,
    ) -> None:
        self._engine = engine
        self._interval_s = probe_interval_s
        self._find_rebuild = find_rebuild
        self._on_other_build = on_other_build
        self._on_change = on_change
        self._faults: dict[Precision, str | None] = dict.fromkeys(
            contract.models, "not probed yet"
        )
        self._lost = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = get_logger()

    async def start(self) -> None:
        """Begin to probe."""
        self._task = asyncio.create_task(self._run(), name="readiness-watch")

    async def close(self) -> None:
        """Stop probing, and tell nobody any more."""
        self._on_change = lambda _precision, _ready: None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def faults(self) -> dict[Precision, str]:
        """Why each model that is not ready is not; empty when all are."""
        return {p: fault for p, fault in self._faults.items() if fault is not None}

    def is_ready(self, precision: Precision) -> bool:
        """Whether a precision can be served now; False where it is not built."""
        return self._faults.get(precision, "not built") is None

    def require(self, precision: Precision) -> None:
        """Let a request for ``precision`` pass.

        Raises:
            EngineUnavailableError: it cannot be served now; says why.
        """
        fault = self._faults[precision]
        if fault is not None:
            raise EngineUnavailableError(
                f"{precision} cannot be served now: {fault}",
                retry_after_s=max(1.0, self._interval_s),
            )

    def require_any(self) -> None:
        """Let a request pass that may ask for any precision.

        Raises:
            EngineUnavailableError: none can be served now.
        """
        if all(fault is not None for fault in self._faults.values()):
            self.require(next(iter(self._faults)))

    def report_loss(self, precision: Precision, error: EngineUnavailableError) -> None:
        """A batch found the engine gone: refuse at once, look for it soon."""
        self._set(precision, str(error))
        self._lost.set()

    async def wait_ready(self) -> None:
        """Return once every model is ready."""
        await self._all_ready.wait()

    async def _run(self) -> None:
        while True:
            lost = bool(self.faults())
            await asyncio.gather(
                *(self._probe(p, reconnecting=lost) for p in self._faults)
            )
            if self.faults():
                await asyncio.sleep(self._jitter(self._interval_s))
                continue
            self._lost.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await finish_within(
                    self._lost.wait(), self._jitter(self._interval_s * HEALTHY_FACTOR)
                )
                # Lost just now: what failed will hardly be back this instant.
                await asyncio.sleep(self._jitter(self._interval_s) / 2)

    async def _probe(self, precision: Precision, *, reconnecting: bool) -> None:
        fault: str | None = None
        try:
            if await self._engine.ready(precision):
                await self._engine.check_contract(precision)
                if reconnecting:
                    fault = await asyncio.to_thread(self._find_rebuild)
            else:
                fault = (
                    f"Triton is there, but {precision.model_name} of this build is not "
                    f"loaded"
                )
                self._on_other_build()
        except ContractError as error:
            fault = f"not the model of the contract: {error}"
            self._on_other_build()
        except Int8qaError as error:
            fault = str(error)
        except Exception as error:  # noqa: BLE001 - the watch outlives every probe
            self._log.error(
                "probe_failed",
                precision=precision.value,
                failure=describe_exception(error),
            )
            fault = f"the probe failed ({type(error).__name__}); see the log"
        self._set(precision, fault)

    def _set(self, precision: Precision, fault: str | None) -> None:
        before = self._faults[precision]
        self._faults[precision] = fault
        if fault is None and before is not None:
            self._log.info("model_ready", precision=precision.value)
            self._on_change(precision, True)
        elif fault is not None and fault != before:
            self._log.warning(
                "model_not_ready", precision=precision.value, reason=fault
            )
            self._on_change(precision, False)
        if self.faults():
            self._all_ready.clear()
        else:
            self._all_ready.set()

    @staticmethod
    def _jitter(seconds: float) -> float:
        return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
