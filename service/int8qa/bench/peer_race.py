"""A contestant's way through ``bench peers``: environment, tuning, rounds.

In: contestants and questions. Out: what each load of each of them brought, or why it
does not run. Knows no order of rounds and makes no sums.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from int8qa.bench.peer_environments import (
    REQUIREMENTS,
    make_environment,
    read_pins,
)
from int8qa.bench.peer_load import Outcome, PeerSpec
from int8qa.bench.peer_servers import choose_pinning, run_load, run_server
from int8qa.bench.peers import Contestant, Variant
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.subject import questions_file
from int8qa.embedded.launch import pick_free_port
from int8qa.errors import Int8qaError
from int8qa.reader.squad import SquadQuestion

TUNING_QUESTIONS = 128
WARM_UP_QUESTIONS = 128
"""Asked before each measurement, so that no engine compiles while the clock runs."""
MODELS = {
    "onnx": "int8qa.bench.peer_model",
    "stock": "int8qa.bench.stock_model",
}
"""What exports the ONNX model that contestants name so in their commands."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What to run."""

    repository: Path
    checkpoint: str
    """What the repository was built from."""
    peers: Path
    """The checkout's ``bench/peers``."""
    data: Path = field(default_factory=lambda: questions_file("evaluation"))
    limit: int | None = None
    """Evenly spaced over the file."""
    rounds: int = 3
    groups: Sequence[str] = ()
    """Empty: everybody."""


@dataclass(slots=True)
class Entry:
    """A contestant under way."""

    contestant: Contestant
    peer_python: Path | None = None
    reason: str | None = None
    """Why it does not run."""
    tuning: list[dict[str, Any]] = field(default_factory=list)
    variant: Variant | None = None
    concurrency: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


class Race:
    """What all contestants share."""

    def __init__(
        self,
        options: PeerOptions,
        questions: Sequence[SquadQuestion],
        cores: list[int],
        say: Say,
    ) -> None:
        self.options = options
        self.questions = questions
        self.tuning_questions = questions[:TUNING_QUESTIONS]
        self.warm_up = min(WARM_UP_QUESTIONS, len(questions))
        self.checkpoint = resolve_checkpoint(options.checkpoint).directory
        self.cores = cores
        self.pinning = choose_pinning(cores)
        self.say = say
        bench = options.peers.parent
        self.environments = bench / ".venvs"
        self.work = bench / ".work"
        self.work.mkdir(exist_ok=True)

    def list_pins(self, contestant: Contestant) -> dict[str, str]:
        """The packages of a peer's environment."""
        if not contestant.environment:
            return {}
        return read_pins(self.options.peers / contestant.environment / REQUIREMENTS)

    def list_remarks(self) -> list[str]:
        """What a reader should know of the machine."""
        if self.pinning or len(self.cores) < 2:
            return []
        return ["there is no taskset here: what loads the services was not pinned"]

    def prepare(self, entries: Sequence[Entry]) -> None:
        """Questions, environments, and the model that some peers serve."""
        for name, questions in (
            ("questions", self.questions),
            ("tuning", self.tuning_questions),
        ):
            write_questions(self.work / f"{name}.json", questions)
        for entry in entries:
            contestant = entry.contestant
            if contestant.environment:
                self.say(f"{contestant.name}: environment")
                try:
                    entry.peer_python = make_environment(
                        self.options.peers / contestant.environment, self.environments
                    )
                except Int8qaError as error:
                    self._drop(entry, str(error))
        for field_name, module in MODELS.items():
            taking = [
                one
                for one in entries
                if f"{{{field_name}}}" in (*one.contestant.serve, *one.contestant.load)
                and not one.reason
            ]
            reason = self._export_model(field_name, module) if taking else None
            if reason:
                for entry in taking:
                    self._drop(entry, reason)

    def tune(self, entry: Entry) -> None:
        """Try every variant at every concurrency on a part of the questions."""
        contestant = entry.contestant
        if entry.reason:
            return
        reasons = [
            f"{variant.name}: {reason}"
            for variant in contestant.variants
            if (reason := self._try_variant(entry, variant))
        ]
        good = [run for run in entry.tuning if run["qps"] and not run["failures"]]
        if not good:
            self._drop(entry, "; ".join(reasons) or "no run without failed requests")
            return
        best = max(good, key=lambda run: float(run["qps"]))
        entry.variant = next(
            one for one in contestant.variants if one.name == best["variant"]
        )
        entry.concurrency = best["concurrency"]
        self.say(
            f"{contestant.name}: fastest with {entry.variant.name}, "
            f"{entry.concurrency} at once ({best['qps']:.1f}/s)"
        )

    def _try_variant(self, entry: Entry, variant: Variant) -> str | None:
        """Every concurrency; a reason if it does not run."""
        try:
            with self._serve(entry, variant) as url:
                for concurrency in entry.contestant.concurrencies:
                    outcome = self._load(
                        entry, variant, concurrency, url=url, name="tuning"
                    )
                    entry.tuning.append(
                        {"variant": variant.name, "concurrency": concurrency}
                        | describe_load(outcome)
                    )
        except Int8qaError as error:
            return str(error)
        return None

    def measure(self, entry: Entry, number: int) -> None:
        """One round of one contestant."""
        if entry.reason or entry.variant is None:
            return
        try:
            with self._serve(entry, entry.variant) as url:
                outcome = self._load(
                    entry, entry.variant, entry.concurrency, url=url, name="questions"
                )
        except Int8qaError as error:
            self._drop(entry, f"round {number + 1}: {error}")
            return
        run = {"round": number + 1} | describe_load(outcome)
        entry.runs.append(run)
        entry.outcomes.append(outcome)
        self.say(
            f"[round {number + 1}/{self.options.rounds}] {entry.contestant.name}: "
            f"{run['qps']:.1f} questions/s"
            + "".join(f", {n} × {kind}" for kind, n in run["failures"].items())
        )

    @contextmanager
    def _serve(self, entry: Entry, variant: Variant) -> Iterator[str]:
        contestant = entry.contestant
        if not contestant.serve:
            yield ""
            return
        port = pick_free_port()
        values = self._list_values(entry) | {
            "port": str(port),
            "health_port": str(pick_free_port((port,))),
        }
        with run_server(
            _fill((*contestant.serve, *variant.serve), values),
            ready=contestant.ready.format_map(values),
            settings={
                name: value.format_map(values)
                for name, value in contestant.settings.items()
            },
            log=self.work / f"{contestant.name}.log",
        ):
            yield f"http://127.0.0.1:{port}"

    def _load(
        self,
        entry: Entry,
        variant: Variant,
        concurrency: int,
        *,
        url: str,
        name: str,
    ) -> Outcome:
        contestant = entry.contestant
        pinning = self.pinning if contestant.serve else []
        return run_load(
            [*pinning, *_fill(contestant.load, self._list_values(entry))],
            PeerSpec(
                url=url,
                questions=str(self.work / f"{name}.json"),
                outcome=str(self.work / "outcome.json"),
                repository=str(self.options.repository.absolute()),
                concurrency=concurrency,
                warm_up=self.warm_up,
                path=contestant.path,
                fields=contestant.fields,
                options=variant.options,
            ),
        )

    def _list_values(self, entry: Entry) -> dict[str, str]:
        return {
            "python": sys.executable,
            "peer_python": str(entry.peer_python),
            "peers": str(self.options.peers.absolute()),
            "repository": str(self.options.repository.absolute()),
            "checkpoint": str(self.checkpoint.absolute()),
            **{name: str(self._locate_model(name)) for name in MODELS},
            "work": str(self.work),
        }

    def _locate_model(self, name: str) -> Path:
        return self.work / f"{name}.onnx"

    def _export_model(self, name: str, module: str) -> str | None:
        """Write a model that contestants load; a reason if that failed."""
        self.say(f"exporting {name}.onnx")
        done = export_model(module, self.checkpoint, self._locate_model(name))
        if not done.returncode:
            return None
        lines = done.stderr.strip().splitlines() or ["it gives no reason"]
        return f"the model was not exported: {lines[-1]}"

    def _drop(self, entry: Entry, reason: str) -> None:
        entry.reason = reason
        self.say(f"{entry.contestant.name} does not run: {reason}")


def export_model(
    module: str, checkpoint: Path, target: Path
) -> subprocess.CompletedProcess[str]:
    """Run an exporting module to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, str(checkpoint), str(target)],
        check=False,
        capture_output=True,
        text=True,
    )


def describe_load(outcome: Outcome) -> dict[str, Any]:
    """One load: answers per second, latencies, failures."""
    answered = len(outcome.latency_ms)
    return {
        "qps": round(answered / outcome.seconds, 3),
        "seconds": round(outcome.seconds, 3),
        "p50_ms": measure_percentile(outcome.latency_ms, 50),
        "p99_ms": measure_percentile(outcome.latency_ms, 99),
        "failures": outcome.failures,
        "load_cpu_ms": round(1e3 * outcome.cpu_s / answered, 3) if answered else None,
    }


def measure_percentile(values: npt.ArrayLike, percent: float) -> float | None:
    """Of milliseconds; None if there are none."""
    array = np.asarray(values, dtype=np.float64)
    return round(float(np.percentile(array, percent)), 3) if array.size else None


def write_questions(path: Path, questions: Sequence[SquadQuestion]) -> None:
    """What the loading programs read."""
    items = [
        {"id": one.id, "question": one.question, "context": one.context}
        for one in questions
    ]
    path.write_text(json.dumps(items), encoding="utf-8")


def _fill(command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    return [word.format_map(values) for word in command]
