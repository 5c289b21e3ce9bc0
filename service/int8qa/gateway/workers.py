"""Several gateway processes on one port, and the parent that keeps them.

In: settings, bound sockets, a model repository. Out: as many workers as are asked for,
each started again when it ends; signals that reach all of them; and what one of them
tells, told to the others. The parent serves nothing itself and loads no tokenizer.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from int8qa.embedded.backoff import RestartBackoff
from int8qa.errors import ConfigurationError, Int8qaError
from int8qa.gateway import channel as messages
from int8qa.gateway.channel import Build, open_channel, settle
from int8qa.gateway.comparison import ShadowReport
from int8qa.gateway.life import Life, Spawn, spawn_worker
from int8qa.gateway.load import Load, measure_file
from int8qa.gateway.logs import configure_logging, get_logger
from int8qa.gateway.merging import ProcessState, merge_states
from int8qa.gateway.process import (
    bind_admin,
    bind_socket,
    describe_url,
    run_event_loop,
    tell_exposure,
)
from int8qa.gateway.rounds import Rounds, read_build
from int8qa.settings import Settings

_DESCRIBE_S = 1.0
"""For a worker's state; of one that is late its last one counts."""
_COLLECT_INTERVAL_S = 2.0
"""How often states are asked for unasked: what a worker counted since is lost with it,
if it is killed."""
STOP_MARGIN_S = 10.0
"""Beyond the drain's own limit, until a worker is killed."""
_MAX_RESTART_DELAY_S = 10.0


def serve_workers(settings: Settings, *, on_ready: Callable[[str], None]) -> None:
    """Run several gateway processes until SIGINT or SIGTERM; blocks.

    Args:
        settings: of all of them; ``workers`` is how many.
        on_ready: called once with the base URL, when each can first ask all models.

    Raises:
        ConfigurationError: they cannot be, or cannot listen; or as one gateway.
        ContractError: the model repository is incomplete.
    """
    configure_logging(settings)
    read_build(settings.model_repository)
    with bind_socket(settings.host, settings.port) as listener:
        run_event_loop(run_workers(settings, listener, on_ready=on_ready))


async def run_workers(
    settings: Settings,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None],
    spawn: Spawn = spawn_worker,
) -> None:
    """As ``serve_workers``, on a bound socket; closes it."""
    if os.name != "posix":
        raise ConfigurationError(
            f"INT8QA_WORKERS is {settings.workers}, but several gateway processes need "
            f"a Unix; set it to 1"
        )
    build = read_build(settings.model_repository)
    listeners = [listener, *bind_admin(settings, listener)]
    tell_exposure(settings)
    with tempfile.TemporaryFile() as load:
        os.ftruncate(load.fileno(), measure_file(settings.workers))
        group = _Group(settings, build, listeners, load.fileno(), on_ready, spawn)
        await group.run()


class _Group:
    """All workers of one gateway."""

    def __init__(
        self,
        settings: Settings,
        build: Build,
        listeners: Sequence[socket.socket],
        load: int,
        on_ready: Callable[[str], None],
        spawn: Spawn,
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._load_file = load
        self._load = Load(load, slot=0, slots=settings.workers)
        self._on_ready: Callable[[str], None] | None = on_ready
        self._url = describe_url(listeners[0])
        self._spawn = spawn
        self._lives: dict[int, Life] = {}
        self._rounds = Rounds(settings, build, self._lives.values)
        self._stopping = asyncio.Event()
        self._gone: ProcessState | None = None
        """What workers that have ended have counted."""
        self._answers: set[asyncio.Task[None]] = set()
        self._log = get_logger()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        gauge = Gauge(
            "int8qa_workers",
            "Gateway processes that take connections, if several are asked for",
            registry=self._registry,
        )
        gauge.set_function(lambda: len(self._list_started()))
        self._restarts_total = Counter(
            "int8qa_worker_restarts_total",
            "Gateway processes that ended unasked and were started again",
            registry=self._registry,
        )

    async def run(self) -> None:
        """Keep them until a signal ends all, or one cannot even begin.

        Raises:
            Int8qaError: why it could not.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGUSR1, self._rounds.request)
        collecting = asyncio.create_task(self._collect_regularly())
        keepers = [
            asyncio.create_task(self._keep(slot), name=f"worker {slot}")
            for slot in range(self._settings.workers)
        ]
        try:
            await asyncio.gather(*keepers)
        finally:
            if not self._stopping.is_set():
                self._stop()
            await asyncio.gather(*keepers, return_exceptions=True)
            await self._rounds.close()
            others = [collecting, *self._answers]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                loop.remove_signal_handler(number)

    # Lives and deaths.

    async def _keep(self, slot: int) -> None:
        """Have a worker in this place until all are to stop."""
        backoff = RestartBackoff(max_delay_s=_MAX_RESTART_DELAY_S)
        replaces = False
        while not self._stopping.is_set():
            begun_s = time.monotonic()
            life = await self._start(slot, replaces=replaces)
            await life.attend(self._hear)
            self._bury(life)
            if self._stopping.is_set():
                return
            if not (life.started or replaces):
                raise life.failure or Int8qaError(
                    f"worker {slot} ended before it served ({life.describe_exit()}); "
                    f"what it wrote says why"
                )
            delay_s = backoff.next_delay_s(time.monotonic() - begun_s)
            self._log.error(
                "worker_ended",
                worker=slot,
                pid=life.process.pid,
                how=life.describe_exit(),
                reason=life.failure and str(life.failure),
                restart_in_s=round(delay_s, 2),
            )
            self._restarts_total.inc()
            replaces = True
            await self._sleep(delay_s)

    async def _start(self, slot: int, *, replaces: bool) -> Life:
        ours, theirs = socket.socketpair()
        listeners = [one.fileno() for one in self._listeners]
        with theirs:
            process = await self._spawn([theirs.fileno(), self._load_file, *listeners])
        life = Life(slot, process, await open_channel(ours))
        async with self._rounds.changing:
            history = self._rounds.history
            life.send(
                messages.Boot(
                    self._settings,
                    slot,
                    self._rounds.build,
                    history.list(),
                    history.report_guard(),
                    replaces,
                )
            )
            self._lives[slot] = life
        self._log.info("worker_started", worker=slot, pid=process.pid)
        if self._stopping.is_set():
            life.signal(signal.SIGTERM)
        return life

    def _bury(self, life: Life) -> None:
        del self._lives[life.slot]
        self._load.clear(life.slot)
        self._broadcast(messages.Gone(life.slot))
        settle(life.description, None)
        self._rounds.forget(life)
        if life.state is not None:
            state: ProcessState = pickle.loads(life.state)  # noqa: S301 - a worker's
            states = [state] if self._gone is None else [state, self._gone]
            self._gone = merge_states(states, gone=True)

    def _stop(self) -> None:
        """Have all drain; asked again, have them hurry, as a single gateway would."""
        first = not self._stopping.is_set()
        self._stopping.set()
        for listener in self._listeners:
            listener.close()
        self._signal_all(signal.SIGTERM)
        if first:
            limit_s = self._settings.limits.shutdown_timeout_s + STOP_MARGIN_S
            loop = asyncio.get_running_loop()
            loop.call_later(limit_s, self._signal_all, signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for life in self._lives.values():
            life.signal(number)

    async def _sleep(self, seconds: float) -> None:
        stopped = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({stopped}, timeout=seconds)
        stopped.cancel()

    # What they say.

    def _hear(self, life: Life, message: object) -> None:
        match message:
            case messages.Observed():
                self._pass_on(message)
            case messages.KeyUse():
                self._broadcast(message, but=life)
            case messages.Described(state):
                life.state = state
                settle(life.description, None)
            case messages.Gather(ticket):
                task = asyncio.create_task(self._answer(life, ticket))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
            case messages.Started():
                life.started = True
            case messages.Ready():
                life.ready = True
                self._announce()
            case messages.Failed(error):
                life.failure = error
            case _:
                self._rounds.hear(life, message)

    def _pass_on(self, message: messages.Observed) -> None:
        # Of a build that is on its way out nobody wants to know any more.
        if message.build_id == self._rounds.build.contract.build_id:
            for seen in message.items:
                self._rounds.history.add(seen)
            self._broadcast(message)

    def _broadcast(self, message: object, *, but: Life | None = None) -> None:
        for life in self._lives.values():
            if life is not but:
                life.send(message)

    def _announce(self) -> None:
        ready = sum(life.ready for life in self._lives.values())
        if self._on_ready is not None and ready == self._settings.workers:
            on_ready, self._on_ready = self._on_ready, None
            on_ready(self._url)

    # The state of all.

    def _list_started(self) -> list[Life]:
        return [life for life in self._lives.values() if life.started]

    async def _collect_regularly(self) -> None:
        while True:
            await asyncio.sleep(_COLLECT_INTERVAL_S)
            await self._collect()

    async def _collect(self) -> list[Life]:
        """Bring the states of all up to date."""
        asked = self._list_started()
        descriptions: set[asyncio.Future[None]] = set()
        for life in asked:
            if life.description is None or life.description.done():
                life.description = asyncio.get_running_loop().create_future()
            life.send(messages.Describe())
            descriptions.add(life.description)
        if descriptions:
            await asyncio.wait(descriptions, timeout=_DESCRIBE_S)
        return asked

    async def _answer(self, life: Life, ticket: int) -> None:
        asked = await self._collect()
        build_id = self._rounds.build.contract.build_id
        nothing = ShadowReport(0, 0, {}, 0, 0.0)
        own = ProcessState(build_id, list(self._registry.collect()), nothing)
        states = (
            *(one.state for one in asked if one.state is not None),
            *(pickle.dumps(one) for one in (own, self._gone) if one is not None),
        )
        life.send(messages.Gathered(ticket, states))
