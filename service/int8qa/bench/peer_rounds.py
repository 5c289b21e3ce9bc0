"""All contestants over the same questions, in interleaved rounds.

In: what to run. Out: one JSON-ready result. First each contestant's variants and
concurrencies are tried on a part of the questions, and the fastest is taken. Then every
round starts, warms, loads and stops each contestant once, every second round in reverse
order, so that whatever else the machine does hits all alike. A contestant that fails
stays in the result with its reason.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from int8qa.bench.peer_race import Entry, PeerOptions, Race, Say
from int8qa.bench.peer_scores import summarize
from int8qa.bench.peers import Contestant, list_contestants
from int8qa.bench.provenance import describe_run, remark_load
from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.repository import read_manifest
from int8qa.build.subject import data_name, spread_evenly
from int8qa.contract import load_contract
from int8qa.errors import ConfigurationError
from int8qa.reader.squad import load_questions

FORMAT_VERSION = 1
PACKAGES = ("openvino", "tritonclient", "nvidia-pytriton", "fastapi", "uvloop", "numpy")
SEED = 20_261_123
"""Of the order of questions: neighbours in a file share a paragraph."""


def bench_peers(options: PeerOptions, say: Say = lambda _: None) -> dict[str, Any]:
    """Run everybody.

    Raises:
        ConfigurationError: the checkout's ``bench/peers`` is not there, or an unknown
            peer is asked for.
        ContractError: there is no model repository.
        CheckpointError: the repository was built from another checkpoint.
        DataFileError: the questions cannot be read.
    """
    if not (options.peers / "reading.py").is_file():
        raise ConfigurationError(
            f"no peers in {options.peers}: run this in a checkout of int8qa, or name "
            f"its bench/peers with --peers"
        )
    contract = load_contract(options.repository)
    check_checkpoint(options.checkpoint, options.repository)
    questions = [q for q in load_questions(options.data) if not q.is_impossible]
    questions = spread_evenly(questions, options.limit)
    random.Random(SEED).shuffle(questions)  # noqa: S311 - no secret
    provenance = describe_run(PACKAGES)
    provenance["command"] = _shorten_paths(provenance["command"])
    race = Race(options, questions, provenance["machine"]["core_numbers"], say)
    contestants = list_contestants(list(contract.models), len(race.cores))
    entries = [Entry(one) for one in choose_groups(contestants, options.groups)]
    race.prepare(entries)
    for entry in entries:
        race.tune(entry)
    for number in range(options.rounds):
        for entry in entries if number % 2 == 0 else reversed(entries):
            race.measure(entry, number)
    rows = [
        summarize(entry, questions, race.list_pins(entry.contestant))
        for entry in entries
    ]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "peers",
        "provenance": provenance
        | {
            "data": data_name(options.data, "evaluation"),
            "questions": len(questions),
        },
        "checkpoint": contract.checkpoint,
        "build_id": contract.build_id,
        "rules": {
            "rounds": options.rounds,
            "tuning_questions": len(race.tuning_questions),
            "warm_up_questions": race.warm_up,
            "cores": race.cores,
            "pinning": " ".join(race.pinning),
        },
        "contestants": rows,
        "remarks": remark_load(provenance) + race.list_remarks(),
        "problems": [
            f"{row['name']} {row['status']}: {row['reason']}"
            for row in rows
            if row["status"] != "measured"
        ],
    }


def choose_groups(
    contestants: Sequence[Contestant], groups: Sequence[str]
) -> list[Contestant]:
    """Those asked for by ``--peer``, in their own order; everybody if nobody is.

    Raises:
        ConfigurationError: there is no such group.
    """
    known = list(dict.fromkeys(one.group for one in contestants))
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ConfigurationError(
            f"no such peer: {', '.join(unknown)}; there are {', '.join(known)}"
        )
    return [one for one in contestants if not groups or one.group in groups]


def check_checkpoint(checkpoint: str, repository: Path) -> None:
    """Hold the checkpoint that peers load to the one the repository was built from.

    Raises:
        ConfigurationError: they are two.
    """
    built, given = (
        read_manifest(repository)["checkpoint"],
        resolve_checkpoint(checkpoint),
    )
    if given.sha256 != built["sha256"]:
        raise ConfigurationError(
            f"{repository} was built from another checkpoint ({built['name']}) than "
            f"peers would load ({given.name}): name the same one with --checkpoint, or "
            f"build anew"
        )


def _shorten_paths(command: str) -> str:
    """A command line without directories of this machine."""
    words = shlex.split(command)
    return shlex.join(Path(w).name if w.startswith("/") else w for w in words)
