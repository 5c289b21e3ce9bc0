"""The page of a calibrator comparison: complete, escaped, without a network."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from int8qa.build.comparison.histograms import (
    find_telling,
    format_rarity,
    share_beyond,
)
from int8qa.build.comparison.page import render_page, write_page

SHAPES = ("1x128", "1x384", "8x128")
CALIBRATORS = {
    # share of FP32's F1, equal answers, RMS logit error; linear, then full
    "max": ((1.004, 0.83, 0.326), (0.69, 0.37, 1.29)),
    "percentile-99.9": ((0.958, 0.67, 0.70), (0.838, 0.55, 1.15)),
    "percentile-99.99": ((0.976, 0.74, 0.44), (0.953, 0.74, 0.53)),
    "percentile-99.999": ((0.994, 0.82, 0.33), (0.958, 0.72, 0.45)),
    "percentile-99.9999": ((0.964, 0.79, 0.33), (0.736, 0.39, 1.26)),
    "mse": ((1.004, 0.78, 0.37), (0.80, 0.47, 1.07)),
    "entropy": ((0.995, 0.75, 0.48), (0.35, 0.12, 2.2)),
    "search": ((1.002, 0.92, 0.16), (0.991, 0.88, 0.24)),
}
MS = {
    "int8": (8.2, 22.6, 44.2),
    "fp16": (11.2, 33.0, 70.4),
    "fp32": (18.7, 56.9, 130.0),
}
CLASSES = {
    "qkv_input": 10.0,
    "query": 9.0,
    "softmax": 1.0,
    "context": 4.0,
    "ffn_out_input": 30.0,
    "ffn_residual": 45.0,
}
KERNELS = {
    "qkv_input": "qkv",
    "query": "scores",
    "softmax": "context",
    "context": "attention_output",
    "ffn_out_input": "ffn_out",
    "ffn_residual": "ffn_add",
}
GATE = 0.99


def make_latency(name: str, *, factor: float = 1.0, int8: bool = False) -> Any:
    """Milliseconds at the three shapes."""
    latency = {}
    for i, shape in enumerate(SHAPES):
        p50 = MS[name][i] * factor
        latency[shape] = {"p50": round(p50, 2), "p99": round(1.09 * p50, 2)}
        if int8:
            latency[shape]["p50_fp16"] = MS["fp16"][i]
    return latency


def make_variant(recipe: str, calibrator: str, *, smooth: bool = False) -> Any:
    """One INT8 model with believable figures."""
    full = recipe == "full"
    ratio, agreement, rms = CALIBRATORS[calibrator][full]
    ratio -= 0.002 * smooth
    speed = (0.93 if full else 1.0) + 0.003 * list(CALIBRATORS).index(calibrator)
    return {
        "recipe": recipe,
        "calibrator": calibrator,
        "smooth": smooth,
        "label": calibrator + " + SmoothQuant" * smooth,
        "f1": round(71.6 * ratio, 2),
        "exact_match": round(59.0 * ratio, 2),
        "f1_ratio": ratio,
        "f1_ratio_margin": 0.008,
        "agreement_fp32": agreement,
        "agreement_fp16": agreement - 0.002,
        "rms_logit_error": rms,
        "max_logit_deviation": 9 * rms,
        "latency_ms": make_latency("int8", factor=speed, int8=True),
        "size_bytes": 59_000_000,
        "execution": "i8+bf16",
        "quantized_gemms": 36,
        "passes_gate": ratio + 0.008 >= GATE,
        "pareto": False,
    }


def mark_pareto(result: dict[str, Any]) -> None:
    """Set ``pareto`` where nothing is both faster and more accurate."""

    def speed(model: Any) -> float:
        return 1 / math.prod(model["latency_ms"][shape]["p50"] for shape in SHAPES)

    models = [*result["variants"], *result["floats"].values()]
    for variant in result["variants"]:
        variant["pareto"] = not any(
            speed(m) > speed(variant) and m["f1"] > variant["f1"] for m in models
        )


def make_histogram(tensor_class: str, layer: int) -> Any:
    """An exponential fall with an outlier at the peak."""
    peak = CLASSES[tensor_class] * (1 + 0.1 * layer)
    counts = [int(4e6 * math.exp(-i / 9)) for i in range(255)] + [3 + layer]
    cuts = {
        "max": 1.0,
        "percentile-99.9": 0.24,
        "percentile-99.99": 0.32,
        "percentile-99.999": 0.41,
        "percentile-99.9999": 0.7,
        "mse": 0.36,
        "entropy": 0.18 + 0.02 * layer,
        "search": 0.42,
    }
    return {
        "name": f"bert.encoder.layer.{layer}.{tensor_class}.input_quantizer",
        "place": f"layer {layer} {tensor_class}",
        "tensor_class": tensor_class,
        "layer": layer,
        "peak": peak,
        "upper": 1.002 * peak,
        "counts": counts,
        "amax": {name: peak * share for name, share in cuts.items()},
    }


def make_unit(group: str, layer: int | None, reads: str = "query") -> Any:
    """A unit whose error grows with its layer and the range of what it reads."""
    size = math.log1p(CLASSES[reads]) * (2 + (4 if layer is None else layer))
    kernel = KERNELS[reads]
    return {
        "name": {
            "kernel": f"layer {layer} {kernel}",
            "tensor class": f"every {reads}",
            "kernel of all layers": f"all {kernel}",
            "layer": f"layer {layer}",
        }[group],
        "layer": layer,
        "kernel": kernel if group.startswith("kernel") else None,
        "tensor_class": reads if group == "tensor class" else None,
        "group": group,
        "only": {
            "rms_logit_error": 0.012 * size,
            "f1_ratio": 1 - 0.0008 * size,
            "agreement_fp32": 1 - 0.004 * size,
        },
        "all_but": {
            "rms_logit_error": 0.53 - 0.008 * size,
            "f1_ratio": 0.95 + 0.0005 * size,
            "agreement_fp32": 0.74 + 0.003 * size,
        },
    }


def make_result() -> dict[str, Any]:
    """A whole comparison of a small reader."""
    batches, lengths = [1, 2, 4, 8], [32, 64, 128, 192, 256, 384]
    scale = {"int8": 0.06, "fp16": 0.087, "fp32": 0.15}
    units = [make_unit("kernel", layer, name) for layer in range(6) for name in CLASSES]
    units += [make_unit("layer", layer) for layer in range(6)]
    units += [make_unit("tensor class", None, name) for name in CLASSES]
    units += [make_unit("kernel of all layers", None, name) for name in CLASSES]
    variants = [
        make_variant(recipe, calibrator)
        for recipe in ("linear", "full")
        for calibrator in CALIBRATORS
    ]
    variants += [
        make_variant(recipe, "search", smooth=True) for recipe in ("linear", "full")
    ]
    result: dict[str, Any] = {
        "format_version": 1,
        "provenance": {
            "command": "int8qa calibrate-compare --data squad-dev-v1.1.json --limit 1000",
            "started_at": "2026-11-23T05:00:00Z",
            "seconds": 512.3,
            "device": "AMD EPYC 9B45",
            "cores": 2,
            "versions": {
                "int8qa": "0.5.0",
                "openvino": "2026.4.0",
                "torch": "2.13.0",
                "nvidia-modelopt": "0.47.0",
                "transformers": "5.23.0",
            },
            "checkpoint": "int8qa-demo-minilm-l6",
            "checkpoint_sha256": "9f2c4e6a8b0d1f3e5a7c9b8d6e4f2a1c" * 2,
            "data": "squad-dev-v1.1.json",
            "questions": 1000,
            "calibration_data": "own",
            "calibration_windows": 109,
            "gate": GATE,
        },
        "floats": {
            "fp32": {
                "f1": 71.6,
                "exact_match": 59.0,
                "size_bytes": 90_000_000,
                "execution": "f32",
                "latency_ms": make_latency("fp32"),
            },
            "fp16": {
                "f1": 71.55,
                "exact_match": 58.9,
                "size_bytes": 75_000_000,
                "execution": "bf16",
                "latency_ms": make_latency("fp16"),
                "agreement_fp32": 0.991,
            },
        },
        "variants": variants,
        "histograms": [
            make_histogram(name, layer) for layer in range(6) for name in CLASSES
        ],
        "sensitivity": {
            "recipe": "full",
            "calibrator": "search",
            "questions": 200,
            "units": units,
        },
        "grid": {
            "variant": "linear, search",
            "batches": batches,
            "lengths": lengths,
            "ms": {
                name: [
                    [
                        None
                        if b * n > 2048
                        else round(
                            factor * b * n * (1 + n / 900) + (n < 64) * 0.3 * b + 0.4, 2
                        )
                        for n in lengths
                    ]
                    for b in batches
                ]
                for name, factor in scale.items()
            },
        },
        "best": {"recipe": "linear", "calibrator": "search", "smooth": False},
        "verdict": "INT8 is faster than every float here (speed of INT8: 1x128 1.37 × "
        "FP16; 1x384 1.46 × FP16; 8x128 1.59 × FP16) and keeps 100.20 ± 0.80 % of "
        "FP32's F1; recommended: int8, recipe linear, calibrator search.",
    }
    mark_pareto(result)
    return result


VOID = {"meta", "br", "img", "input", "link", "hr"}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would find: elements, their text, whether tags are balanced."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self.styles = ""
        self.feed(document)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            name = self.elements[-1][1].get("id", "code")
            self.scripts[name] = self.scripts.get(name, "") + data
        elif inside == "style":
            self.styles += data
        elif data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        """All that a reader sees before a script runs."""
        return " ".join(self.words)

    def json(self, name: str) -> Any:
        """An embedded JSON document."""
        return json.loads(self.scripts[name])


def find_strings(value: Any) -> list[str]:
    """Every string inside a JSON value, keys left out."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return [text for item in items for text in find_strings(item)]
    return []


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return make_result()


@pytest.fixture(scope="module")
def page(result: dict[str, Any]) -> Page:
    return Page(render_page(result))


def test_every_variant_is_in_the_table(page: Page, result: dict[str, Any]) -> None:
    """Each variant has its row, the floats stand first, the verdicts are words."""
    for variant in result["variants"]:
        assert variant["label"] in page.words
    assert page.text.index("FP32") < page.text.index("percentile-99.9")
    passing = sum(variant["passes_gate"] for variant in result["variants"])
    assert page.words.count("✓ passes") == passing
    assert page.words.count("✗ fails") == len(result["variants"]) - passing > 0
    assert page.words.count("★ best") == 1
    assert page.words.count("on the front") == sum(
        variant["pareto"] for variant in result["variants"]
    )
    rows = sum(tag == "tr" and "best" in a.get("class", "") for tag, a in page.elements)
    assert rows == 1


def test_headline_shows_the_best_variant(page: Page, result: dict[str, Any]) -> None:
    """The verdict and the figures of the recommended variant open the page."""
    opening = page.text[: page.text.index("Every variant")]
    assert result["verdict"] in opening
    best = result["variants"][7]
    assert best["calibrator"] == result["best"]["calibrator"]
    for shape in SHAPES:
        times = best["latency_ms"][shape]
        assert f"{times['p50_fp16'] / times['p50']:.2f}×" in opening
    assert "100.2 %" in opening
    assert "91.8 %" in opening
    for part in ("device", "command", "started_at", "checkpoint_sha256"):
        assert result["provenance"][part] in opening


def test_page_loads_nothing(page: Page) -> None:
    """No element and no style refers to anything outside the document."""
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert "href" not in attributes or tag == "a"
        assert "action" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert not {"link", "iframe", "object", "embed", "base"} & {
        tag for tag, _ in page.elements
    }
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv")]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "http" not in policies[0]
    assert "Plotly.react" in page.scripts["code"]


def test_page_is_accessible(page: Page) -> None:
    """Headings keep their order, references lead somewhere, figures have captions."""
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(key) is None or attributes[key] in ids
    plots = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(plots) == 4
    assert all(plot["aria-label"] for plot in plots)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("figcaption") == tags.count("figure") == 5


def test_figures_are_valid_plotly(page: Page) -> None:
    """Plotly's own schema takes each figure, and each colour is one of the page's."""
    bundles = page.json("figures")
    colours = set(re.findall(r"(--[\w-]+):", page.styles))
    drawn = 0
    for bundle in bundles.values():
        for choice in bundle["choices"]:
            used = re.findall(r"var\((--[\w-]+)\)", json.dumps(choice["figure"]))
            assert set(used) <= colours
            resolved = re.sub(
                r"var\(--[\w-]+\)", "#123456", json.dumps(choice["figure"])
            )
            plotly.graph_objects.Figure(json.loads(resolved))
            drawn += 1
    assert drawn == 2 + 36 + 6 + 4


def test_embedded_result_is_the_result(page: Page, result: dict[str, Any]) -> None:
    """What the download button offers is what was handed in, key order included."""
    assert json.dumps(page.json("result")) == json.dumps(result)


def test_hostile_strings_stay_text() -> None:
    """Markup in any string of the result reaches neither HTML nor plotly as markup."""
    result = make_result()

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return [poison(item) for item in value] if isinstance(value, list) else value

    poisoned = poison(result)
    poisoned["histograms"] = [
        h | {"amax": {name + HOSTILE: a for name, a in h["amax"].items()}}
        for h in poisoned["histograms"]
    ]
    # A word of the format, which nobody's data can name.
    for unit, clean in zip(
        poisoned["sensitivity"]["units"], result["sensitivity"]["units"], strict=True
    ):
        unit["group"] = clean["group"]
    page = Page(render_page(poisoned))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 4
    assert "img" not in tags
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "int8qa-demo-minilm-l6" + HOSTILE in page.text
    assert page.json("result") == poisoned
    shown = [
        text
        for bundle in page.json("figures").values()
        for choice in bundle["choices"]
        for text in find_strings(choice["figure"])
    ]
    assert any("&lt;img" in text for text in shown)
    assert not any("<img" in text for text in shown)


def test_close_up_leaves_the_outliers_out(page: Page) -> None:
    """Entropy at 35 % does not squash the plot; a second view has it."""
    near, whole = page.json("figures")["pareto"]["choices"]
    low, high = near["figure"]["layout"]["yaxis"]["range"]
    assert 90 < low < 95.3
    assert 100.4 < high < 102
    assert whole["figure"]["layout"]["yaxis"]["range"][0] < 35
    texts = [note["text"] for note in near["figure"]["layout"]["annotations"]]
    assert "↓ 5 further below: press All" in texts


def test_sensitivity_is_ordered(page: Page) -> None:
    """The most sensitive unit is the last of a horizontal bar plot, which is its top."""
    choices = page.json("figures")["sensitivity"]["choices"]
    tops = {}
    for choice in choices:
        only = choice["figure"]["data"][0]
        assert only["x"] == sorted(only["x"])
        tops[choice["label"]] = (only["y"][-1], len(only["y"]))
    assert tops == {
        "Kernels": ("layer 5 ffn_add", 30),
        "Tensor classes": ("every ffn_residual", 6),
        "Kernels, all layers": ("all ffn_add", 6),
        "Layers": ("layer 5", 6),
    }
    assert list(tops) == ["Kernels", "Tensor classes", "Kernels, all layers", "Layers"]
    assert "6 least sensitive" in choices[0]["description"]


def test_groups_without_units_are_no_choice() -> None:
    """A recipe of one kernel has layers that are that kernel, and are not repeated."""
    result = make_result()
    result["sensitivity"]["units"] = [
        unit for unit in result["sensitivity"]["units"] if unit["group"] != "layer"
    ]
    page = Page(render_page(result))
    labels = [c["label"] for c in page.json("figures")["sensitivity"]["choices"]]
    assert labels == ["Kernels", "Tensor classes", "Kernels, all layers"]


def test_default_tensor_is_the_one_percentiles_cut_most() -> None:
    """The page opens with the largest ratio of max to percentile 99.9."""
    result = make_result()
    result["histograms"][8]["amax"]["percentile-99.9"] /= 50
    assert find_telling(result["histograms"]) == 8
    page = Page(render_page(result))
    assert page.json("figures")["histogram"]["chosen"] == 8
    chosen = [a["value"] for t, a in page.elements if t == "option" and "selected" in a]
    assert chosen == ["8", "2"]
    assert result["histograms"][8]["place"] == "layer 1 softmax"


def test_share_beyond_comes_from_the_counts() -> None:
    """Bin edges give the exact shares, points between lie between, the peak is kept."""
    histogram = {"counts": [900, 90, 9, 1], "upper": 4.0, "peak": 3.9}
    assert share_beyond(histogram, 1.0) == pytest.approx(0.1)
    assert share_beyond(histogram, 2.0) == pytest.approx(0.01)
    assert share_beyond(histogram, 1.5) == pytest.approx(0.1**1.5)
    assert share_beyond(histogram, 3.5) == pytest.approx(0.0005)
    assert share_beyond(histogram, 3.9) == 0.0
    assert share_beyond(histogram, 0.0) == 1.0
    assert share_beyond({"counts": [], "upper": 0.0, "peak": 0.0}, 1.0) == 0.0


def test_rare_shares_are_readable() -> None:
    """Percent while it has few digits, one in so many beyond."""
    assert format_rarity(0.0) == "none"
    assert format_rarity(0.35) == "35 %"
    assert format_rarity(0.0015) == "0.15 %"
    assert format_rarity(1 / 87_654) == "1 in 88,000"


def test_cuts_are_stated_in_numbers(page: Page, result: dict[str, Any]) -> None:
    """Each calibrator has its share and its step, amax over 127, in the table."""
    choice = page.json("figures")["histogram"]["choices"][0]
    amax = result["histograms"][0]["amax"]
    rows = {row[0]: row for row in choice["rows"]}
    assert rows.keys() == amax.keys()
    assert rows["max"][2] == "none"
    assert rows["search"][3] == f"{amax['search'] / 127:#.3g}"
    assert "entropy cuts off" in choice["description"]
    lines = [shape["x0"] for shape in choice["figure"]["layout"]["shapes"]]
    assert sorted(lines) == sorted(amax.values())


def test_grid_cells_hold_ratio_and_milliseconds() -> None:
    """A cell says how many times as fast, and by which medians; null is a dash."""
    result = make_result()
    ms = result["grid"]["ms"]
    ms["int8"][0][0], ms["fp16"][0][0], ms["fp32"][0][0] = 2.0, 1.5, 5.0
    page = Page(render_page(result))
    assert "0.75×" in page.words
    assert "2.50×" in page.words
    assert "2.0 | 1.5" in page.words
    slower = [
        a for t, a in page.elements if t == "td" and "slower" in a.get("class", "")
    ]
    assert len(slower) == 1
    served = sum(cell is not None for row in ms["int8"] for cell in row)
    heat = [a for t, a in page.elements if "heat" in a.get("class", "").split()]
    assert len(heat) == 2 * served < 2 * 24


@pytest.mark.parametrize(
    "change",
    [
        {"sensitivity": None},
        {"histograms": []},
        {"variants": [], "best": None},
        {"variants": [make_variant("full", "entropy")], "best": None},
        {"variants": [make_variant("linear", "search")]},
        {"grid": None},
    ],
    ids=[
        "no sensitivity",
        "no histograms",
        "floats only",
        "one bad",
        "one good",
        "no grid",
    ],
)
def test_parts_may_be_missing(change: dict[str, Any]) -> None:
    """What was not measured leaves a sentence in its place, and the rest whole."""
    result = make_result() | change
    page = Page(render_page(result))
    assert page.json("result") == result
    assert ("Not measured in this run." in page.text) == (
        result["sensitivity"] is None or result["grid"] is None
    )
    assert ("This result holds no histograms." in page.text) == (
        not result["histograms"]
    )
    assert ("★ best" in page.text) == bool(result["best"])
    for bundle in page.json("figures").values():
        for choice in bundle["choices"]:
            figure = json.dumps(choice["figure"])
            plotly.graph_objects.Figure(
                json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", figure))
            )


def test_not_a_number_counts_as_not_measured() -> None:
    """A collapsed variant's NaN becomes null in the JSON and a dash in the table."""
    result = make_result()
    result["variants"][0] |= {"rms_logit_error": math.nan, "f1_ratio": math.inf}
    before = copy.deepcopy(result["variants"][1])
    page = Page(render_page(result))
    embedded = page.json("result")["variants"]
    assert embedded[0]["rms_logit_error"] is None
    assert embedded[0]["f1_ratio"] is None
    assert embedded[1] == before == result["variants"][1]
    assert math.isnan(result["variants"][0]["rms_logit_error"])


def test_page_is_written_as_utf8(tmp_path: Path, result: dict[str, Any]) -> None:
    """The file is the rendered page."""
    write_page(result, tmp_path / "page.html")
    document = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert document.lstrip().startswith("<!doctype html>")
    assert "± 0.8 %" in document
