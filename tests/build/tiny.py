"""Tiny random readers of four architectures, and small question files.

The models are nonsense, but their graphs are real: everything the build stage does to
a checkpoint it does to these in a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from int8qa.build.attention import register_attention
from int8qa.build.calibration import (
    Calibrator,
    Histograms,
    Ranges,
    choose_ranges,
    collect_histograms,
    set_ranges,
)
from int8qa.build.export import export_onnx, model_inputs, wrap_model
from int8qa.build.quantization import (
    RECIPES,
    Plan,
    insert_quantizers,
    switch_quantizers,
)
from int8qa.build.reference import run_torch
from int8qa.build.sites import Site, TensorClass, find_sites
from int8qa.contract import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from int8qa.reader.windows import Window

ARCHITECTURES = ("bert", "roberta", "distilbert", "electra")
VOCABULARY = 30_522
POSITIONS = 256

CALIBRATION = (
    (
        "The mill at Torvik was built by Anna Lund in 1902 and burned down in 1931.",
        (("Who built the mill?", "Anna Lund"), ("When did it burn down?", "1931")),
    ),
    (
        "The pump needs 40 litres of oil; change it every 200 hours of work.",
        (("How much oil does the pump need?", "40 litres"),),
    ),
)
EVALUATION = (
    (
        "The ferry leaves Skagen at 7:15 and arrives in Vik about two hours later.",
        (("When does the ferry leave?", "7:15"), ("Where does it arrive?", "Vik")),
    ),
)

Feed = dict[str, Any]


def write_squad(path: Path, paragraphs: Any) -> Path:
    """Write (context, ((question, answer), ...)) pairs as a SQuAD v1.1 file."""
    entries = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"{path.stem}-{i}-{j}",
                    "question": question,
                    "answers": [
                        {"text": answer, "answer_start": context.index(answer)}
                    ],
                }
                for j, (question, answer) in enumerate(pairs)
            ],
        }
        for i, (context, pairs) in enumerate(paragraphs)
    ]
    document = {"data": [{"title": path.stem, "paragraphs": entries}]}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def make_model(architecture: str) -> Any:
    """A random reader: hidden 32, two layers; wide weights, so that masks matter."""
    import torch
    import transformers

    torch.manual_seed(7)
    shared = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    }
    encoder = {
        **shared,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if architecture == "bert":
        config: Any = transformers.BertConfig(**encoder)
    elif architecture == "roberta":
        config = transformers.RobertaConfig(
            **{**encoder, "max_position_embeddings": POSITIONS + 2},
            type_vocab_size=1,
            pad_token_id=1,
        )
    elif architecture == "electra":
        config = transformers.ElectraConfig(**encoder, embedding_size=16)
    else:
        config = transformers.DistilBertConfig(
            **shared, dim=32, n_layers=2, n_heads=2, hidden_dim=64
        )
    config._attn_implementation = register_attention()
    return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


@dataclass(frozen=True)
class TinyReader:
    """One architecture as the build sees it."""

    name: str
    model: Any
    inputs: tuple[str, ...]
    pad_token_id: int

    @property
    def wrapped(self) -> Any:
        return wrap_model(self.model)

    def run_torch(self, feed: Feed) -> tuple[Any, Any]:
        """Start and end logits, float32 [B, S]."""
        return run_torch(self.wrapped, self.inputs)(feed)


def make_reader(architecture: str) -> TinyReader:
    """A fresh :class:`TinyReader`, to be changed at will."""
    takes_token_types = architecture in {"bert", "electra"}
    return TinyReader(
        name=architecture,
        model=make_model(architecture),
        inputs=model_inputs(takes_token_types=takes_token_types),
        pad_token_id=1 if architecture == "roberta" else 0,
    )


def random_feed(
    reader: TinyReader, lengths: list[int], padded: int, *, seed: int = 0
) -> Feed:
    """Rows of the given lengths, padded on the right; token types 0 then 1."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), padded)
    mask = (np.arange(padded)[None, :] < np.array(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(1000, VOCABULARY, shape, dtype=np.int32)
    feed = {
        INPUT_IDS: np.where(mask == 1, ids, np.int32(reader.pad_token_id)),
        ATTENTION_MASK: mask,
    }
    if TOKEN_TYPE_IDS in reader.inputs:
        feed[TOKEN_TYPE_IDS] = mask * (np.arange(padded, dtype=np.int32) >= 5)
    return feed


def run_onnx(model: Any, feed: Feed) -> list[Any]:
    """All outputs in ONNX Runtime, without its own graph rewriting."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Any] = session.run(None, feed)
    return outputs


def make_gemm_layers(count: int) -> Plan:
    """One GEMM a layer, without a model."""
    sites = tuple(
        site
        for n in range(count)
        for site in (
            Site(f"{n}.input_quantizer", TensorClass.FFN_IN_INPUT, n, n),
            Site(f"{n}.weight_quantizer", TensorClass.FFN_IN_WEIGHT, n, -1 - n, 64),
        )
    )
    return Plan("own", sites, {site.name: site.is_weight for site in sites})


@dataclass(frozen=True)
class CalibratedReader:
    """One architecture with quantizers, their ranges, and the Q/DQ graph of it."""

    reader: TinyReader
    sites: list[Site]
    plan: Plan
    histograms: Histograms
    ranges: Ranges
    exported: bytes
    """As the exporter wrote it."""


def quantize_reader(architecture: str, recipe: str) -> tuple[TinyReader, Plan]:
    """A fresh reader with quantizers, switched by a built-in recipe, no ranges yet."""
    reader, sites = insert_and_find(architecture)
    plan = RECIPES[recipe].choose(sites)
    switch_quantizers(reader.model, plan)
    return reader, plan


def insert_and_find(architecture: str) -> tuple[TinyReader, list[Site]]:
    """A fresh reader with quantizers, all off, and what they stand at."""
    reader = make_reader(architecture)
    insert_quantizers(reader.model)
    return reader, find_sites(reader.wrapped, reader.inputs)


def calibrate_reader(
    architecture: str, windows: Sequence[Window], recipe: str
) -> CalibratedReader:
    """All the build does before it projects: insert, calibrate by max, export."""
    return calibrate_made(make_reader(architecture), windows, recipe)


def calibrate_made(
    reader: TinyReader, windows: Sequence[Window], recipe: str
) -> CalibratedReader:
    """The same with a reader of any size, which is changed by it."""
    insert_quantizers(reader.model)
    sites = find_sites(reader.wrapped, reader.inputs)
    plan = RECIPES[recipe].choose(sites)
    switch_quantizers(reader.model, plan)
    histograms = collect_histograms(reader.wrapped, windows, plan, reader.inputs)
    ranges = choose_ranges(reader.model, plan, histograms, Calibrator("max"))
    set_ranges(reader.model, ranges)
    exported = export_onnx(reader.wrapped, reader.inputs).SerializeToString()
    return CalibratedReader(reader, sites, plan, histograms, ranges, exported)


@dataclass(frozen=True)
class Graphs:
    """The tiny BERT as the exporter wrote it and cleaned, float and with Q/DQ."""

    inputs: tuple[str, ...]
    float_raw: bytes
    float_clean: bytes
    quantized_raw: bytes
    quantized_clean: bytes
