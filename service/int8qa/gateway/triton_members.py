"""The Tritons of a group one by one: where they are, and what each has loaded.

In: the setting that names them, and one contract. Out: who serves a model of the
contract's build now, and why the others do not; models loaded into all, or into none.
Sends no batch.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from int8qa.contract import Contract, Precision
from int8qa.errors import (
    ContractError,
    EngineUnavailableError,
    Int8qaError,
    ModelLoadError,
    NotLoadedError,
)
from int8qa.gateway.triton import TritonEngine
from int8qa.gateway.triton_addresses import AddressBook

PATIENCE_S = 0.5
"""Who answers a probe so much later than the first of his like is left out. On a
machine too busy to answer all are late, and none is."""


@dataclass(frozen=True, slots=True)
class Round:
    """What the Tritons answered when all were asked for one model."""

    serving: tuple[str, ...]
    """Addresses of those that have the contract's own, sorted."""
    faults: dict[str, Int8qaError]
    """Why the others are left out, by address."""

    def require_contact(self, name: str) -> bool:
        """Whether one serves the model, or has another build's; False: not loaded.

        Raises:
            EngineUnavailableError: none of ``name`` can be reached.
        """
        kinds = {type(fault) for fault in self.faults.values()}
        if self.serving or ContractError in kinds:
            return True
        if NotLoadedError in kinds:
            return False
        faults = "; ".join(map(str, self.faults.values()))
        raise EngineUnavailableError(faults or f"{name} has no known address")

    def require_build(self) -> None:
        """Refuse where those that answer are of another build, all of them.

        Raises:
            ContractError: which build, or what differs, at one of them.
        """
        if self.serving:
            return
        for fault in self.faults.values():
            if isinstance(fault, ContractError):
                raise fault


class TritonMembers:
    """A channel of its own to each Triton, for all but batches."""

    def __init__(self, url: str, contract: Contract, *, control_key: str) -> None:
        self._contract = contract
        self._control_key = control_key
        self._book = AddressBook(url)
        self._engines: dict[str, TritonEngine] = {}

    async def find(self) -> None:
        """Look up who there is; connect to the new, and forget the gone."""
        addresses = await self._book.find()
        for address in addresses:
            if address not in self._engines:
                engine = TritonEngine(
                    address, self._contract, control_key=self._control_key
                )
                self._engines[address] = engine
                await engine.connect()
        for address in self._engines.keys() - addresses:
            if (gone := self._engines.pop(address, None)) is not None:
                await gone.close()

    async def close(self) -> None:
        """Close every channel."""
        self._book.close()
        while self._engines:
            _, engine = self._engines.popitem()
            await engine.close()

    async def ask(self, precision: Precision) -> Round:
        """Ask all at once whether they serve a model of the contract.

        Who is reachable but hangs holds the round up for ``PATIENCE_S``; if nobody
        answers, for as long as a probe of one Triton takes.
        """
        probes = {
            asyncio.create_task(_probe(engine, precision)): address
            for address, engine in self._engines.items()
        }
        faults: dict[str, Int8qaError | None] = {
            address: EngineUnavailableError(
                f"Triton at {address} did not answer a probe {PATIENCE_S:g} s after "
                f"another did"
            )
            for address in probes.values()
        }
        pending = set(probes)
        try:
            while pending and None not in faults.values():
                done, pending = await asyncio.wait(
                    pending, return_when=asyncio.FIRST_COMPLETED
                )
                faults |= {probes[probe]: probe.result() for probe in done}
            if pending:
                done, _ = await asyncio.wait(pending, timeout=PATIENCE_S)
                faults |= {probes[probe]: probe.result() for probe in done}
        finally:
            for probe in probes:
                probe.cancel()
        return Round(
            tuple(sorted(address for address, fault in faults.items() if not fault)),
            {address: fault for address, fault in faults.items() if fault},
        )

    async def hold(self, precision: Precision) -> bool:
        """Whether all have the model of the contract loaded, and no other.

        Raises:
            EngineUnavailableError: one cannot be reached.
        """
        await self.find()
        try:
            held = [await one.holds(precision) for one in self._engines.values()]
        except EngineUnavailableError as error:
            raise EngineUnavailableError(
                f"a rebuilt model is loaded into all {len(self._engines)} Tritons or "
                f"into none, and one does not answer: {error}. Start it, or take it "
                f"off INT8QA_TRITON__URL"
            ) from error
        return all(held)

    async def load(self, precision: Precision) -> None:
        """Load the model wherever it is missing, one Triton after the other.

        One at a time, since loading takes the machine from those who serve.

        Raises:
            ModelLoadError: one refused or failed; it is unloaded again elsewhere.
        """
        await self.find()
        engines = list(self._engines.values())
        loaded: list[TritonEngine] = []
        try:
            for engine in engines:
                if not await engine.holds(precision):
                    await engine.load(precision)
                    loaded.append(engine)
                    await engine.check_contract(precision)
        except Int8qaError as error:
            for engine in loaded:
                with contextlib.suppress(Int8qaError):
                    await engine.unload(precision)
            raise ModelLoadError(
                f"a model is loaded into all {len(engines)} Tritons or into none, and "
                f"one did not load it: {error}"
            ) from error

    async def unload(self, precision: Precision) -> None:
        """Have all of them give the model up.

        Raises:
            ModelLoadError: some refused or failed; the others were asked all the same.
        """
        outcomes = await asyncio.gather(
            *(engine.unload(precision) for engine in self._engines.values()),
            return_exceptions=True,
        )
        if failures := [str(one) for one in outcomes if one is not None]:
            raise ModelLoadError("; ".join(failures))


async def _probe(engine: TritonEngine, precision: Precision) -> Int8qaError | None:
    """None where a Triton serves the model of the contract, else why not."""
    try:
        if not await engine.ready(precision):
            return NotLoadedError(f"{precision} of this build is not loaded")
        await engine.check_contract(precision)
    except Int8qaError as error:
        return error
    return None
