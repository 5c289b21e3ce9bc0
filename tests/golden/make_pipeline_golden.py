"""Ask the former transformers question-answering pipeline; write its answers down.

Runs from the project's root in an environment of its own, with the last transformers
that had the pipeline (see README.md beside this file)::

    python -m tests.golden.make_pipeline_golden \
        --checkpoint service/int8qa/data/checkpoint \
        --questions service/int8qa/data/questions \
        --output tests/golden/pipeline
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.pipeline_cases import Case, QuestionTexts, load_texts, make_cases

LOGIT_EVERY = 2
"""Every second case keeps its logits, and every one with a raised null logit …"""
LOGIT_MAX_WINDOWS = 12
"""… if it has no more windows than this, so that the file stays small."""
TIE_RATIO = 1e-4
"""Answers whose scores are closer than this may swap on another processor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    import tokenizers
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(versions)
    torch.manual_seed(0)
    texts = load_texts(arguments.questions)
    recorder = _Recorder(arguments.checkpoint)
    entries: list[dict[str, Any]] = []
    logits: dict[str, list[np.ndarray]] = {"start": [], "end": []}
    ties = 0
    for number, case in enumerate(make_cases(texts)):
        entry, windows = recorder.ask(case, texts)
        ties += entry["tied"]
        wanted = number % LOGIT_EVERY == 0 or case.null_boost > 0.0
        entry["logits"] = wanted and len(windows) <= LOGIT_MAX_WINDOWS
        if entry["logits"]:
            for start, end in windows:
                logits["start"].append(start)
                logits["end"].append(end)
        entries.append(entry)

    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in entries)
    (arguments.output / "answers.json").write_text(
        f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )
    np.savez_compressed(
        arguments.output / "logits.npz",
        lengths=np.array([len(part) for part in logits["start"]], dtype=np.int32),
        start=np.concatenate(logits["start"]).astype(np.float32),
        end=np.concatenate(logits["end"]).astype(np.float32),
    )
    kept = sum(entry["logits"] for entry in entries)
    windows_total = sum(entry["windows"] for entry in entries)
    print(
        f"{len(entries)} cases, {len({e['question'] for e in entries})} different "
        f"questions, {windows_total} windows, {ties} with tied answers, {kept} with "
        f"logits"
    )


class _Recorder:
    """The pipeline in float32, with a hook that keeps what its model returns."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import pipeline
        from transformers.utils import logging

        logging.disable_progress_bar()
        # float32, though the file holds float16: the reference is the full model.
        self._pipeline = pipeline(
            "question-answering", model=str(checkpoint), dtype=torch.float32
        )
        self._null_boost = 0.0
        self._calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pipeline.model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: Any, _args: Any, kwargs: Any, output: Any) -> None:
        if len(self._calls) % 2 == 0:
            output.start_logits[0, 0] += self._null_boost
            output.end_logits[0, 0] += self._null_boost
        self._calls.append(
            (
                kwargs["input_ids"][0].numpy().astype("<i4"),
                output.start_logits[0].numpy().copy(),
                output.end_logits[0].numpy().copy(),
            )
        )

    def ask(
        self, case: Case, texts: QuestionTexts
    ) -> tuple[dict[str, Any], list[tuple[np.ndarray, np.ndarray]]]:
        question, context = texts.resolve(case)
        self._calls.clear()
        self._null_boost = case.null_boost
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers = self._pipeline(question=question, context=context, **case.params)
        if isinstance(answers, dict):
            answers = [answers]
        # Fewer candidates than asked for: the pipeline fills up with impossible spans
        # of score 0, in no defined order. The reader drops them, so does this file.
        useful = [answer for answer in answers if answer["score"] > 0.0]
        checksum = 0
        for ids, _start, _end in self._calls:
            checksum = zlib.crc32(ids.tobytes(), checksum)
        scores = [answer["score"] for answer in useful]
        entry = case.to_json() | {
            "context_crc32": zlib.crc32(context.encode("utf-8")),
            "windows": len(self._calls),
            "input_ids_crc32": checksum,
            "dropped": len(answers) - len(useful),
            "tied": any(
                high - low <= TIE_RATIO * high
                for high, low in itertools.pairwise(scores)
            ),
            "answers": [
                [answer["answer"], answer["start"], answer["end"], answer["score"]]
                for answer in useful
            ],
        }
        return entry, [(start, end) for _ids, start, end in self._calls]


if __name__ == "__main__":
    main()
