"""Our attention is transformers' own, but for the quantizer on its probabilities."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from int8qa.build.attention import ATTENTION, attend, register_attention
from int8qa.build.quantization import quantizers_by_name
from int8qa.contract import ATTENTION_MASK
from tests.build.tiny import ARCHITECTURES, insert_and_find, make_reader, random_feed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_eager(name: str) -> None:
    """Logits of real tokens equal those of transformers' eager attention."""
    reader = make_reader(name)
    assert reader.model.config._attn_implementation == ATTENTION
    feed = random_feed(reader, [24, 9], 24)
    found = reader.run_torch(feed)
    reader.model.set_attn_implementation("eager")
    real = feed[ATTENTION_MASK] == 1
    for left, right in zip(reader.run_torch(feed), found, strict=True):
        np.testing.assert_allclose(right[real], left[real], rtol=0, atol=1e-6)


def test_equation() -> None:
    """softmax(Q K^T / sqrt(d) + mask) V, and by default this very scale."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 4, 5, 8).double().unbind()
    mask = torch.zeros(2, 1, 1, 5).double()
    mask[1, ..., 3:] = -10_000.0
    context, probabilities = attend(torch.nn.Module().eval(), query, key, value, mask)
    scores = np.einsum("bhsd,bhtd->bhst", query.numpy(), key.numpy()) / np.sqrt(8)
    weights = np.exp(scores + mask.numpy())
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities.numpy(), weights, atol=1e-12)
    np.testing.assert_allclose(
        context.numpy(),
        np.einsum("bhst,bhtd->bshd", weights, value.numpy()),
        atol=1e-12,
    )
    assert not probabilities[1, ..., 3:].any()


def test_register_twice() -> None:
    """Registering again is no error, and gives the same name."""
    assert register_attention() == register_attention() == ATTENTION


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_softmax_quantizer_acts(name: str) -> None:
    """Each layer's p_bmm_quantizer sees the probabilities, and changes the logits."""
    reader, _ = insert_and_find(name)
    feed = random_feed(reader, [24], 24)
    before = reader.run_torch(feed)[0]
    quantizers = [
        quantizer
        for path, quantizer in quantizers_by_name(reader.model).items()
        if path.endswith("p_bmm_quantizer")
    ]
    assert len(quantizers) == 2
    seen: list[Any] = []
    for quantizer in quantizers:
        quantizer.amax = torch.tensor(1.0)
        quantizer.enable()
        quantizer.register_forward_hook(
            lambda _module, given, taken: seen.append((given[0], taken))
        )
    after = reader.run_torch(feed)[0]
    assert len(seen) == 2
    for given, taken in seen:
        torch.testing.assert_close(given.sum(-1), torch.ones(1, 2, 24))
        steps = taken * 127
        torch.testing.assert_close(steps, (given * 127).round(), rtol=0, atol=1e-4)
    assert np.abs(after - before).max() > 1e-4


def test_modelopt_leaves_int8_probabilities_alone() -> None:
    """ModelOpt's own wrapper still never calls an INT8 p_bmm_quantizer.

    When this fails, attention.py's reason is gone: try "eager" and remove it.
    """
    reader = make_reader("bert")
    reader.model.set_attn_implementation("eager")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        int8 = {"num_bits": 8, "axis": None}
        rules = [{"quantizer_name": "*_bmm_quantizer", "cfg": int8, "enable": True}]
        mtq.quantize(
            reader.model, {"quant_cfg": rules, "algorithm": None}, forward_loop=None
        )
    calls: list[str] = []
    for path, quantizer in quantizers_by_name(reader.model).items():
        if path.endswith("_bmm_quantizer"):
            assert quantizer.is_enabled
            assert quantizer.num_bits == 8
            quantizer.amax = torch.tensor(1.0)
            part = path.rpartition(".")[2]
            quantizer.register_forward_hook(lambda *_, part=part: calls.append(part))
    reader.run_torch(random_feed(reader, [24], 24))
    assert sorted(calls) == sorted(
        2 * ["k_bmm_quantizer", "q_bmm_quantizer", "v_bmm_quantizer"]
    )
