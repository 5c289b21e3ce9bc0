"""What each part of the model costs in INT8: quantized alone, and left out alone.

In: an exported graph with ranges, evaluation questions, float32's answers. Out: per
unit (kernel, layer, tensor class, kernel of all layers) the accuracy of both, ordered.
Every measurement is kept in a file at once, so that a run that was cut short goes on
where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8qa.build.accuracy import Accuracy
from int8qa.build.calibration import Calibrator, Ranges
from int8qa.build.identity import (
    describe_machine,
    hash_code,
    hash_parts,
    hash_questions,
    read_versions,
)
from int8qa.build.quantization import Plan
from int8qa.build.units import (
    Unit,
    class_units,
    kernel_units,
    layer_units,
    split_units,
)
from int8qa.errors import BuildError
from int8qa.reader.squad import SquadQuestion


@dataclass(frozen=True, slots=True)
class Finding:
    """One plan against float32."""

    rms_logit_error: float
    f1_ratio: float
    agreement_fp32: float


@dataclass(frozen=True, slots=True)
class UnitSensitivity:
    """One unit, both ways."""

    name: str
    layer: int | None
    kernel: str | None
    tensor_class: str | None
    group: str
    """Which units it is to be compared with."""
    only: Finding
    """This unit alone quantized."""
    all_but: Finding
    """Everything but this unit quantized."""


class FindingCache:
    """Findings by plan, appended to a file of JSON lines as they come.

    The file belongs to one subject: the first line names its key, and a file with
    another key is begun anew.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._found: dict[str, Finding] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            lines = []
        except (OSError, UnicodeDecodeError) as error:
            raise BuildError(
                f"cannot use the cache {path}: {error}; give another --cache"
            ) from error
        if _read_line(lines[0] if lines else "").get("key") == key:
            for line in lines[1:]:
                entry = _read_line(line)  # the last may be cut short by a kill
                if "finding" in entry:
                    self._found[entry["plan"]] = Finding(**entry["finding"])
        else:
            self._write(json.dumps({"key": key}), "w")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, plan_key: str, measure: Callable[[], Finding]) -> Finding:
        """What is known of a plan, else measured and kept."""
        if plan_key not in self._found:
            finding = measure()
            self._found[plan_key] = finding
            self._write(json.dumps({"plan": plan_key, "finding": asdict(finding)}), "a")
        return self._found[plan_key]

    def _write(self, line: str, mode: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(mode, encoding="utf-8") as stream:
                # A line cut short by a kill must not swallow this one.
                stream.write(f"{line}\n" if mode == "w" else f"\n{line}\n")
        except OSError as error:
            raise BuildError(
                f"cannot write the cache {self._path}: {error.strerror}; give another "
                f"--cache"
            ) from error


def identify_findings(
    plan: Plan,
    ranges: Ranges,
    *,
    checkpoint_sha256: str,
    calibration: Sequence[SquadQuestion],
    calibrator: Calibrator,
    smooth: bool,
    evaluation: Sequence[SquadQuestion],
    device: str,
) -> str:
    """Hash of all that a finding depends on but the part of ``plan`` it is of.

    Besides what is given: the code, the libraries and the machine.

    Args:
        plan: fully quantized.
        ranges: ``amax`` of each of its sites; six digits of each count, so that a sum
            taken in another order is no other calibration.
        checkpoint_sha256: of the files it was loaded from.
        calibration: questions that ranges and smoothing come from.
        calibrator: how the ranges, and what smoothing keeps, were chosen.
        smooth: whether SmoothQuant went before.
        evaluation: questions it is measured on.
        device: the CPU, as the engine calls it.
    """
    return hash_parts(
        {
            "checkpoint": checkpoint_sha256,
            "calibration": hash_questions(calibration),
            "calibrator": calibrator.name,
            "smooth": smooth,
            "ranges": {name: _list_range(ranges[name]) for name in plan.names},
            "unsigned": sorted(plan.unsigned),
            "evaluation": hash_questions(evaluation),
            "code": hash_code(),
            "versions": read_versions(),
            "machine": [describe_machine(), device],
        }
    )


def _list_range(amax: Any) -> list[str] | str:
    """Six digits of a range, or of each channel's."""
    if isinstance(amax, float):
        return f"{amax:.6g}"
    return [f"{value:.6g}" for value in amax.flatten().tolist()]


def default_cache() -> Path:
    """Where findings are kept: ``$XDG_CACHE_HOME/int8qa``, else ``~/.cache/int8qa``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "int8qa"


def open_cache(directory: Path | None, key: str) -> FindingCache:
    """The findings of one subject.

    Args:
        directory: where they are kept; None: :func:`default_cache`.
        key: see :func:`identify_findings`.

    Raises:
        BuildError: the directory cannot be used.
    """
    path = (directory or default_cache()) / f"sensitivity-{key[:16]}.jsonl"
    return FindingCache(path, key)


def _read_line(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def list_units(plan: Plan) -> list[Unit]:
    """Every unit that is measured; of units with equal sites the first."""
    units = [
        *split_units(plan),
        *layer_units(plan),
        *class_units(plan),
        *kernel_units(plan),
    ]
    first: dict[frozenset[str], Unit] = {}
    for unit in units:
        first.setdefault(unit.sites, unit)
    return list(first.values())


def measure_sensitivity(
    plan: Plan,
    measure: Callable[[Plan], Accuracy],
    cache: FindingCache,
    *,
    on_plan: Callable[[], None] = lambda: None,
) -> list[UnitSensitivity]:
    """Measure every unit of ``plan``, the one that costs most first.

    Args:
        plan: fully quantized.
        measure: accuracy of a plan against float32.
        cache: what is known already.
        on_plan: called after each plan, two per unit.
    """

    def find(part: Plan) -> Finding:
        key = "|".join(sorted(part.names))

        def run() -> Finding:
            accuracy = measure(part)
            return Finding(
                rms_logit_error=round(accuracy.rms_logit_error, 5),
                f1_ratio=round(accuracy.f1_ratio, 5),
                agreement_fp32=round(accuracy.agreement, 5),
            )

        finding = cache.get(key, run)
        on_plan()
        return finding

    found = [
        UnitSensitivity(
            name=unit.name,
            layer=unit.layer,
            kernel=unit.kernel,
            tensor_class=unit.tensor_class,
            group=unit.group,
            only=find(unit.only(plan)),
            all_but=find(unit.all_but(plan)),
        )
        for unit in list_units(plan)
    ]
    return order_findings(found)


def order_findings(found: Sequence[UnitSensitivity]) -> list[UnitSensitivity]:
    """By the logit error of each unit alone, largest first."""
    return sorted(found, key=lambda one: one.only.rms_logit_error, reverse=True)
