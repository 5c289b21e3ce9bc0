"""The reader itself and ONNX Runtime: two readings of one model."""

from __future__ import annotations

import numpy as np
import onnx

from int8qa.build.reference import run_onnx, run_torch
from tests.build.tiny import Graphs, TinyReader, random_feed


def test_both_read_alike(readers: dict[str, TinyReader], graphs: Graphs) -> None:
    """Float32 [B, S] each, the same but for rounding, and not of one implementation."""
    reader = readers["bert"]
    feed = random_feed(reader, [24, 17], 32)
    expected = run_torch(reader.wrapped, reader.inputs)(feed)
    found = run_onnx(onnx.load_from_string(graphs.float_clean))(feed)
    for left, right in zip(expected, found, strict=True):
        assert left.shape == right.shape == (2, 32)
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_allclose(left, right, atol=1e-4)
    assert not np.allclose(expected[0], expected[1], atol=1e-3)
