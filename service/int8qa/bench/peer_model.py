"""The ONNX float32 model of the build, for peers that serve it.

In: a checkpoint. Out: ``reader.onnx``, the very graph that the build compiles its
engines from, before any engine. A process of its own, so that torch leaves with it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def export_model(checkpoint: str, target: Path) -> None:
    """Write the model.

    Raises:
        CheckpointError: there is no such checkpoint.
        ExportError: it could not be exported.
    """
    from int8qa.build.checkpoint import load_checkpoint, resolve_checkpoint
    from int8qa.build.export import export_onnx, model_inputs, wrap_model
    from int8qa.build.graph import clean_graph

    loaded = load_checkpoint(resolve_checkpoint(checkpoint))
    inputs = model_inputs(takes_token_types=loaded.takes_token_types)
    graph = clean_graph(export_onnx(wrap_model(loaded.model), inputs))
    target.write_bytes(graph.SerializeToString())


if __name__ == "__main__":
    export_model(sys.argv[1], Path(sys.argv[2]))
