"""From one build to the next while requests come in.

In: a model repository that was built anew, and the word to look. Out: a gateway that
serves it, in one assignment; or the old one, unharmed, and a log line that says why.
Of several gateway processes all change over, or none: that is asked of ``Consent``.
Contract, tokenizer, batchers and models change together: a request stays with the
gateway it came to, to its end. Knows neither HTTP nor Triton.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from int8qa.contract import TOKENIZER_FILENAME, Contract, Precision, load_contract
from int8qa.errors import ContractError, EngineUnavailableError, Int8qaError
from int8qa.gateway.comparison import ComparisonWindow
from int8qa.gateway.engine import Engine
from int8qa.gateway.logs import describe_exception, get_logger
from int8qa.gateway.pipeline import AnswerPipeline
from int8qa.gateway.telemetry import Telemetry
from int8qa.gateway.waiting import finish_within
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.settings import Settings

LINGER_S = 30.0
"""How long the models of the build before stay loaded for other gateways of the same
Triton that were told a moment later."""
_READY_TIMEOUT_S = 30.0
_RETRY_S = 30.0
"""Between attempts that nobody asked for."""
_DRAIN_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """All that serves one build; ``app.state.gateway`` is the one that serves now."""

    settings: Settings
    contract: Contract
    pipeline: AnswerPipeline
    telemetry: Telemetry
    comparison: ComparisonWindow


class _State(Protocol):
    gateway: Gateway


class Consent:
    """What a gateway process has to ask of others; this one is alone."""

    def want_reload(self, begin: Callable[[], None]) -> None:
        """Reload everywhere: call ``begin`` here, now or when it is our turn."""
        begin()

    async def read_build(self, repository: Path) -> tuple[Contract, ReaderTokenizer]:
        """What is to be served."""
        return await asyncio.to_thread(_read_build, repository)

    async def agree(self, gateway: Gateway | None) -> None:
        """Return once all have prepared it; None: here it serves already.

        Raises:
            ContractError: one of them could not.
        """

    def refuse(self, reason: str) -> None:
        """It cannot be prepared here."""

    async def may_unload(self, build_id: str) -> bool:
        """Return once all have drained a former build; whether we unload it."""
        del build_id
        return True


class Reloader:
    """Replaces ``state.gateway`` by one for what the model repository holds now."""

    def __init__(
        self,
        state: _State,
        engine: Engine,
        *,
        open_engine: Callable[[Contract], Engine] | None,
        open_gateway: Callable[[Contract, ReaderTokenizer, Engine], Gateway],
        consent: Consent | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            state: whose ``gateway`` is replaced; it is set before the first reload.
            engine: of that gateway.
            open_engine: an engine for another build; None: there can be none.
            open_gateway: puts a gateway around it; refuses what does not fit.
            consent: of other processes; None: there are none.
            clock: monotonic seconds.
        """
        self._state = state
        self._engine = engine
        self._open_engine = open_engine
        self._open_gateway = open_gateway
        self._consent = consent or Consent()
        self._clock = clock
        self._running: asyncio.Task[None] | None = None
        self._again = False
        self._closed = False
        self._tried_s = float("-inf")
        self._retiring: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    @property
    def current(self) -> Gateway:
        """The gateway that serves now."""
        return self._state.gateway

    def request(self) -> None:
        """Reload soon, in all processes; where a reload runs, once more after it."""
        self._consent.want_reload(self.begin)

    def begin(self) -> None:
        """Reload in this process."""
        if self._closed:
            return
        if self._running is not None and not self._running.done():
            self._again = True
            return
        self._running = asyncio.create_task(self._run(), name="reload")

    def request_retry(self) -> None:
        """Reload because the engine has lost what we serve; not too often."""
        running = self._running is not None and not self._running.done()
        if self._open_engine is None or running:
            return
        if self._clock() - self._tried_s >= _RETRY_S:
            self._tried_s = self._clock()
            self.request()

    async def wait_idle(self) -> None:
        """Return once no reload runs and no former build is on its way out."""
        while tasks := [
            task
            for task in (self._running, *self._retiring)
            if task and not task.done()
        ]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Stop at once; what is loaded stays loaded. May be called twice."""
        self._closed = True
        tasks = [task for task in (self._running, *self._retiring) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._again = False
            self._tried_s = self._clock()
            try:
                await self._reload()
            except Int8qaError as error:
                self._consent.refuse(str(error))
                self._log.error(
                    "reload_failed",
                    reason=str(error),
                    serving=self.current.contract.build_id,
                )
            except Exception as error:  # noqa: BLE001 - the gateway outlives it
                self._consent.refuse(f"{type(error).__name__}; the log has more")
                self._log.error(
                    "reload_failed",
                    failure=describe_exception(error),
                    serving=self.current.contract.build_id,
                )
            if not self._again:
                return

    async def _reload(self) -> None:
        before, engine_before = self.current, self._engine
        repository = before.settings.model_repository
        contract, tokenizer = await self._consent.read_build(repository)
        unchanged = contract == before.contract
        if unchanged and not before.pipeline.watch.faults():
            await self._consent.agree(None)
            self._log.info("reload_unneeded", build_id=contract.build_id)
            return
        if self._open_engine is None:
            raise ContractError("this gateway cannot reload: restart it")
        if not contract.generation and contract.build_id != before.contract.build_id:
            raise ContractError(
                f"build {contract.build_id} was not made to be loaded beside another; "
                f"run `int8qa build --beside --force` and reload again, or restart "
                f"Triton and the gateway"
            )
        engine = self._open_engine(contract)
        gateway = self._open_gateway(contract, tokenizer, engine)
        self._log.info("reload_started", build_id=contract.build_id)
        loaded: list[Precision] = []
        try:
            await engine.connect()
            for precision in contract.models:
                await self._ensure_loaded(precision, contract, engine, loaded)
            await gateway.pipeline.start()
            await _wait_ready(gateway.pipeline)
            await self._consent.agree(gateway)
        except BaseException:
            before.telemetry.set_serving(before.pipeline.serving_precision)
            for precision in loaded:
                with contextlib.suppress(Int8qaError):
                    await engine.unload(precision)
            await gateway.pipeline.close()
            raise
        await before.pipeline.watch.close()
        self._state.gateway, self._engine = gateway, engine
        gateway.telemetry.show_contract(contract)
        gateway.telemetry.read_comparison(gateway.comparison)
        gateway.pipeline.show_state()
        self._log.info(
            "reloaded", build_id=contract.build_id, before=before.contract.build_id
        )
        task = asyncio.create_task(self._retire(before, engine_before), name="retire")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _ensure_loaded(
        self,
        precision: Precision,
        contract: Contract,
        engine: Engine,
        loaded: list[Precision],
    ) -> None:
        if await engine.holds(precision):
            return
        before = self.current
        name = contract.triton_name(precision)
        shared = (
            precision in before.contract.models
            and name == before.contract.triton_name(precision)
        )
        # Loading it would take the old one from under requests that are on their way.
        if shared and before.pipeline.watch.is_ready(precision):
            raise ContractError(
                f"build {contract.build_id} names its model {name}, as does the one "
                f"that serves, since the model repository was deleted in between: run "
                f"`int8qa build --beside --force` and reload again, or restart Triton "
                f"and the gateway"
            )
        await engine.load(precision)
        loaded.append(precision)
        await engine.check_contract(precision)

    async def _retire(self, gateway: Gateway, engine: Engine) -> None:
        """Answer what the former build has accepted, then have it unloaded."""
        limits = gateway.settings.limits
        contract = gateway.contract
        try:
            await gateway.pipeline.drain(limits.request_timeout_s + _DRAIN_MARGIN_S)
            if not await self._consent.may_unload(contract.build_id):
                return
            await asyncio.sleep(LINGER_S)
            serving = self.current.contract
            kept = {serving.triton_name(precision) for precision in serving.models}
            for precision in contract.models:
                if contract.triton_name(precision) not in kept:
                    await engine.unload(precision)
            self._log.info("build_unloaded", build_id=contract.build_id)
        except Int8qaError as error:
            self._log.warning(
                "unload_failed", build_id=contract.build_id, reason=str(error)
            )
        finally:
            await gateway.pipeline.close()


def _read_build(repository: Path) -> tuple[Contract, ReaderTokenizer]:
    contract = load_contract(repository)
    return contract, ReaderTokenizer.from_file(repository / TOKENIZER_FILENAME)


async def _wait_ready(pipeline: AnswerPipeline) -> None:
    try:
        await finish_within(pipeline.watch.wait_ready(), _READY_TIMEOUT_S)
    except asyncio.TimeoutError:
        faults = "; ".join(pipeline.watch.faults().values())
        raise EngineUnavailableError(
            f"the new models are loaded but not ready after {_READY_TIMEOUT_S:g} s: "
            f"{faults}; the build before serves on"
        ) from None
