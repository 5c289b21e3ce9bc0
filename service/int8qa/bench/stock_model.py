"""The stock graph: INT8 as the libraries give it, with nothing of int8qa's own.

In: a checkpoint. Out: an ONNX model: the reader as transformers loads it (its default
attention, its own mask code, int64 inputs), ModelOpt's ``INT8_DEFAULT_CFG`` with its
own calibration by max, exported by torch. What int8qa's graph is worth is measured
against it. A process of its own, so that torch leaves with it.

Source of the recipe: Model Optimizer's documentation, "PyTorch Quantization" and "ONNX
export". It leaves attention's own GEMMs in float, as the recipe ``linear`` does.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from int8qa.build.checkpoint import resolve_checkpoint
from int8qa.build.export import OPSET
from int8qa.build.feed import window_feed
from int8qa.build.subject import QuestionSources, load_subject
from int8qa.contract import END_LOGITS, START_LOGITS

if TYPE_CHECKING:
    import torch


def export_stock_model(checkpoint: str, target: Path) -> None:
    """Write the model; it takes int64 [B, S] and gives float32 [B, S].

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    import torch
    from transformers import AutoModelForQuestionAnswering

    files = resolve_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            files, QuestionSources(), Path(folder) / "tokenizer.json"
        )
    model = AutoModelForQuestionAnswering.from_pretrained(
        files.directory, dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.config.return_dict = False
    names = subject.inputs
    feeds = [window_feed(window, names) for window in subject.calibration_windows]
    # The order of the names is that of the model's arguments.
    examples = [
        tuple(torch.from_numpy(feed[name]).long() for name in names) for feed in feeds
    ]

    def calibrate(model: torch.nn.Module) -> None:
        for example in examples:
            model(*example)

    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        # Both libraries warn of versions and of traced constants.
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, calibrate)
        torch.onnx.export(
            model,
            examples[0],
            str(target),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(names),
            output_names=[START_LOGITS, END_LOGITS],
            dynamic_axes={
                name: {0: "B", 1: "S"} for name in (*names, START_LOGITS, END_LOGITS)
            },
        )


if __name__ == "__main__":
    export_stock_model(sys.argv[1], Path(sys.argv[2]))
