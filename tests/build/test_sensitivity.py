"""Every unit alone and left out, each measured once, even if a run is cut short."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from int8qa.build import sensitivity
from int8qa.build.accuracy import Accuracy
from int8qa.build.calibration import Calibrator
from int8qa.build.quantization import RECIPES, Plan
from int8qa.build.sensitivity import (
    Finding,
    FindingCache,
    UnitSensitivity,
    default_cache,
    identify_findings,
    list_units,
    measure_sensitivity,
    open_cache,
    order_findings,
)
from int8qa.build.sites import Site, TensorClass
from int8qa.build.units import class_units, kernel_units, layer_units, split_units
from int8qa.errors import BuildError
from int8qa.reader.squad import SquadQuestion
from tests.build.tiny import insert_and_find, make_gemm_layers


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    sites = insert_and_find("bert")[1]
    return {name: recipe.choose(sites) for name, recipe in RECIPES.items()}


class CutShortError(Exception):
    """Stands for a kill."""


class Meter:
    """Tells plans apart by a number made of their names, and keeps count."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.measured: list[frozenset[str]] = []
        self.stop_after = stop_after

    def __call__(self, plan: Plan) -> Accuracy:
        if len(self.measured) == self.stop_after:
            raise CutShortError
        self.measured.append(plan.names)
        return measure(plan)


def measure(plan: Plan) -> Accuracy:
    """An accuracy of this plan's own; of the empty one, no loss."""
    number = zlib.crc32("|".join(sorted(plan.names)).encode()) / 2**32
    return Accuracy(
        f1=80.0,
        exact_match=70.0,
        questions=200,
        f1_ratio=1.0 - number,
        f1_ratio_margin=0.0,
        agreement=1.0 - number / 2,
        max_logit_deviation=9.0,
        rms_logit_error=number,
    )


def find(plan: Plan) -> Finding:
    """What should be noted of ``plan``."""
    accuracy = measure(plan)
    return Finding(
        pytest.approx(accuracy.rms_logit_error, abs=1e-5),
        pytest.approx(accuracy.f1_ratio, abs=1e-5),
        pytest.approx(accuracy.agreement, abs=1e-5),
    )


@pytest.mark.parametrize(
    ("recipe", "layers", "kernels", "classes", "alike"),
    [
        ("linear", 2, 4, 8, ()),
        # Of a residual add ``full`` has one class: class and kernel are the same sites.
        ("full", 2, 8, 14, ("all attention_add", "all ffn_add")),
    ],
)
def test_every_unit_alone_and_left_out(
    plans: dict[str, Plan],
    recipe: str,
    layers: int,
    kernels: int,
    classes: int,
    alike: tuple[str, ...],
) -> None:
    """Layers, kernels, both together and classes, and nothing is measured twice."""
    plan = plans[recipe]
    meter = Meter()
    ticks: list[None] = []
    found = measure_sensitivity(
        plan, meter, FindingCache(None, "key"), on_plan=lambda: ticks.append(None)
    )
    units = {
        unit.name: unit
        for unit in [
            *split_units(plan),
            *layer_units(plan),
            *class_units(plan),
            *kernel_units(plan),
        ]
    }
    assert len(units) == layers * kernels + layers + classes + kernels
    for name in alike:
        del units[name]
    assert {one.name for one in found} == units.keys()
    for one in found:
        unit = units[one.name]
        assert (one.layer, one.kernel) == (unit.layer, unit.kernel)
        assert (one.tensor_class, one.group) == (unit.tensor_class, unit.group)
        assert one.only == find(plan.without(plan.names - unit.sites))
        assert one.all_but == find(plan.without(unit.sites))
    errors = [one.only.rms_logit_error for one in found]
    assert errors == sorted(errors, reverse=True)
    assert len(ticks) == 2 * len(list_units(plan)) == 2 * len(units)
    # Of two layers, the one alone is the other left out.
    assert len(meter.measured) == len(set(meter.measured)) == 2 * len(units) - 2


def test_units_of_equal_sites_are_one() -> None:
    """A layer of one kernel is not listed beside that kernel, which comes first."""
    classes = ["every ffn_in_input", "every ffn_in_weight"]
    assert [unit.name for unit in list_units(make_gemm_layers(2))] == [
        "layer 0 ffn_in",
        "layer 1 ffn_in",
        *classes,
        "all ffn_in",
    ]
    assert [unit.name for unit in list_units(make_gemm_layers(1))] == [
        "layer 0 ffn_in",
        *classes,
    ]
    meter = Meter()
    found = measure_sensitivity(make_gemm_layers(1), meter, FindingCache(None, "key"))
    # All of it, nothing at all, and each operand, which is the other left out.
    everything, of_input, of_weight = (
        frozenset({"0.input_quantizer", "0.weight_quantizer"}),
        frozenset({"0.input_quantizer"}),
        frozenset({"0.weight_quantizer"}),
    )
    assert meter.measured == [everything, frozenset(), of_input, of_weight]
    by_name = {one.name: one for one in found}
    assert by_name["layer 0 ffn_in"].all_but == Finding(0.0, 1.0, 1.0)
    assert by_name[classes[0]].only == by_name[classes[1]].all_but


def test_class_of_a_whole_kernel_is_listed_once() -> None:
    """A kernel that reads one tensor is called by that tensor's class."""
    sites = tuple(
        Site(f"{n}.norm", TensorClass.LAYERNORM_INPUT, n, n) for n in range(2)
    )
    plan = Plan("own", sites, dict.fromkeys((site.name for site in sites), False))
    assert [(unit.name, unit.group) for unit in list_units(plan)] == [
        ("layer 0 layernorm", "kernel"),
        ("layer 1 layernorm", "kernel"),
        ("every layernorm_input", "tensor class"),
    ]


PLAN = make_gemm_layers(4)
PLANS = 12
"""Four layers and all, alone and left out; both operands, one the other left out."""


def run(
    path: Path | None, meter: Callable[[Plan], Accuracy], key: str = "key"
) -> list[UnitSensitivity]:
    return measure_sensitivity(PLAN, meter, FindingCache(path, key))


@pytest.fixture(scope="module")
def uninterrupted() -> list[UnitSensitivity]:
    return run(None, Meter())


@pytest.mark.parametrize("done", range(PLANS + 1))
def test_run_goes_on_where_it_stopped(
    tmp_path: Path, uninterrupted: list[UnitSensitivity], done: int
) -> None:
    """What was measured before a break is not measured again."""
    path = tmp_path / "new" / "findings.jsonl"
    first = Meter(stop_after=done)
    if done < PLANS:
        with pytest.raises(CutShortError):
            run(path, first)
    else:
        run(path, first)
    assert len(FindingCache(path, "key")) == done
    second = Meter()
    assert run(path, second) == uninterrupted
    assert not set(first.measured) & set(second.measured)
    assert len(first.measured) + len(second.measured) == PLANS
    third = Meter()
    assert run(path, third) == uninterrupted
    assert not third.measured


def test_line_cut_short_anywhere(
    tmp_path: Path, uninterrupted: list[UnitSensitivity]
) -> None:
    """Half a line is measured again, and spoils neither what stands before nor behind."""
    whole = tmp_path / "whole.jsonl"
    with pytest.raises(CutShortError):
        run(whole, Meter(stop_after=3))
    content = whole.read_bytes()
    last = content.rstrip(b"\n").rindex(b"\n") + 1
    path = tmp_path / "cut.jsonl"
    for size in range(last, len(content) + 1):
        path.write_bytes(content[:size])
        # The line is whole but for its end, or it is not.
        known = 3 if size >= len(content) - 1 else 2
        meter = Meter()
        assert run(path, meter) == uninterrupted
        assert len(meter.measured) == PLANS - known
        assert len(FindingCache(path, "key")) == PLANS


def test_first_line_cut_short(tmp_path: Path) -> None:
    """Without its key the file is nobody's, and is begun anew."""
    path = tmp_path / "findings.jsonl"
    for content in ("", '{"key": "k', "[]", '"key"', "\x00"):
        path.write_text(content)
        assert len(FindingCache(path, "key")) == 0
        run(path, Meter())
        assert len(FindingCache(path, "key")) == PLANS


def test_another_subject(tmp_path: Path, uninterrupted: list[UnitSensitivity]) -> None:
    """Another key finds nothing, and takes the file over."""
    path = tmp_path / "findings.jsonl"
    run(path, Meter())
    other = Meter()
    assert run(path, other, "other") == uninterrupted
    assert len(other.measured) == PLANS
    assert len(FindingCache(path, "other")) == PLANS
    assert len(FindingCache(path, "key")) == 0


def test_error_without_bound_is_kept(tmp_path: Path) -> None:
    """A model that computes NaN has an infinite error, also when read again."""
    path = tmp_path / "findings.jsonl"
    broken = Finding(float("inf"), 0.0, 0.0)
    assert FindingCache(path, "key").get("plan", lambda: broken) == broken
    again = FindingCache(path, "key").get("plan", lambda: Finding(0.0, 0.0, 0.0))
    assert again == broken


def test_cache_that_cannot_be_used(tmp_path: Path) -> None:
    """A message with the path and the option, not a traceback."""
    with pytest.raises(BuildError, match=r"cannot use the cache .*--cache"):
        FindingCache(tmp_path, "key")
    file = tmp_path / "file"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BuildError, match=r"cannot use the cache .*--cache"):
        FindingCache(file, "key")
    with pytest.raises(BuildError, match=r"cannot use the cache .*--cache"):
        FindingCache(file / "below", "key")


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """The same while measuring: here its directory has gone."""
    path = tmp_path / "directory" / "findings.jsonl"
    cache = FindingCache(path, "key")
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(BuildError, match=r"cannot write the cache .*--cache"):
        cache.get("plan", lambda: Finding(0.0, 1.0, 1.0))


def test_order() -> None:
    """By the error alone, the largest first; equals stay as they came."""

    def make(name: str, only: float, all_but: float) -> UnitSensitivity:
        findings = (Finding(error, 0.5, 0.5) for error in (only, all_but))
        return UnitSensitivity(name, 0, "qkv", None, "kernel", *findings)

    found = [make("a", 0.1, 9.0), make("b", 0.3, 0.0), make("c", 0.1, 0.0)]
    assert [one.name for one in order_findings(found)] == ["b", "a", "c"]


RANGES: dict[str, Any] = {
    name: torch.full((4, 1), 0.5) if "weight" in name else 2.0 for name in PLAN.names
}
QUESTIONS = [
    SquadQuestion(str(n), f"Which of {n}?", "It is the bar.", ("bar",), (10,))
    for n in range(4)
]
SUBJECT: dict[str, Any] = {
    "plan": PLAN,
    "ranges": RANGES,
    "checkpoint_sha256": "c" * 64,
    "calibration": QUESTIONS[:2],
    "calibrator": Calibrator("max"),
    "smooth": False,
    "evaluation": QUESTIONS[2:],
    "device": "a CPU",
}
SOFTMAX = Plan("own", (Site("p", TensorClass.SOFTMAX, 0, 0),), {"p": False})


def reword(question: SquadQuestion) -> SquadQuestion:
    return dataclasses.replace(question, question="Which one?")


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_sha256": "d" * 64},
        {"calibration": QUESTIONS[:1]},
        {"calibration": [QUESTIONS[0], reword(QUESTIONS[1])]},
        {"calibrator": Calibrator("mse")},
        {"calibrator": Calibrator("percentile", 99.9)},
        {"smooth": True},
        {"evaluation": QUESTIONS[2:3]},
        {"evaluation": [reword(QUESTIONS[2]), QUESTIONS[3]]},
        {"device": "another CPU"},
        {"ranges": RANGES | {"0.input_quantizer": 2.0001}},
        # Per tensor, and per channel with the same sum.
        {"ranges": RANGES | {"0.weight_quantizer": 0.5}},
        {
            "ranges": RANGES
            | {"0.weight_quantizer": torch.tensor([[0.25], [0.75], [0.5], [0.5]])}
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_changed_subject_is_another(change: dict[str, Any]) -> None:
    """Nothing that was measured of one is taken for the other."""
    assert identify_findings(**SUBJECT) == identify_findings(**SUBJECT)
    assert identify_findings(**SUBJECT | change) != identify_findings(**SUBJECT)


def test_unsigned_grid_is_another_subject() -> None:
    """0 … 255 and -127 … 127 are one plan by name and range, and two in INT8."""
    signed = dataclasses.replace(SOFTMAX, unsigned_softmax=False)
    assert signed.names == SOFTMAX.names
    keys = [
        identify_findings(**SUBJECT | {"plan": plan, "ranges": {"p": 1.0}})
        for plan in (SOFTMAX, signed)
    ]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("hash_code", "f" * 64),
        ("read_versions", {"openvino": "1"}),
        ("describe_machine", "pdp11"),
    ],
)
def test_changed_installation_is_another_subject(
    monkeypatch: pytest.MonkeyPatch, name: str, other: Any
) -> None:
    """A pass that was changed, a library, the instruction sets."""
    before = identify_findings(**SUBJECT)
    monkeypatch.setattr(sensitivity, name, lambda: other)
    assert identify_findings(**SUBJECT) != before


def test_name_of_the_recipe_is_no_subject() -> None:
    """Nor is the order of sums that makes the last digits of a range."""
    renamed = dataclasses.replace(PLAN, recipe="other")
    ranges = {name: amax * (1 + 1e-9) for name, amax in RANGES.items()}
    key = identify_findings(**SUBJECT | {"plan": renamed, "ranges": ranges})
    assert key == identify_findings(**SUBJECT)


def test_findings_have_a_file_of_their_own(tmp_path: Path) -> None:
    """One subject does not empty the file of another."""
    one, other = (open_cache(tmp_path, key * 64) for key in "ab")
    one.get("plan", lambda: Finding(0.1, 1.0, 1.0))
    other.get("plan", lambda: Finding(0.2, 1.0, 1.0))
    assert len(open_cache(tmp_path, "a" * 64)) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the desktop says, else below the home directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "int8qa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "int8qa"
