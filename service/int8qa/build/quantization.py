"""Which tensors of a BERT become INT8.

In: a float torch reader and a recipe. Out: the same reader with ModelOpt's
quantizers in place, not yet calibrated. Recipes name tensor classes, so that they
hold for every encoder whose GEMMs are ``nn.Linear``.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from int8qa.errors import BuildError

if TYPE_CHECKING:
    import torch

RecipeName = Literal["linear"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Tensor classes that are quantized; all others stay in float."""

    name: RecipeName
    linear_inputs: bool
    """Inputs of the GEMMs: one scale per tensor."""
    linear_weights: bool
    """Weights of the GEMMs: one scale per output channel."""
    head: bool
    """The start/end classifier, [hidden, 2]: no time to win, much to lose."""

    def quantizer_config(self, head_names: list[str]) -> dict[str, Any]:
        """The recipe as a ModelOpt configuration.

        Activations get a histogram collector, so that every calibrator can be
        derived from one pass.
        """
        from int8qa.build.histogram import ActivationHistogram

        rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        if self.linear_weights:
            rules.append(
                {
                    "quantizer_name": "*weight_quantizer",
                    "parent_class": "nn.Linear",
                    "cfg": {"num_bits": 8, "axis": 0},
                    "enable": True,
                }
            )
        if self.linear_inputs:
            rules.append(
                {
                    "quantizer_name": "*input_quantizer",
                    "parent_class": "nn.Linear",
                    "cfg": {
                        "num_bits": 8,
                        "axis": None,
                        "calibrator": ActivationHistogram,
                    },
                    "enable": True,
                }
            )
        if not self.head:
            rules += [
                {"quantizer_name": f"*{name}.*", "enable": False} for name in head_names
            ]
        return {"quant_cfg": rules, "algorithm": None}


RECIPES: dict[str, Recipe] = {
    # FasterTransformer's INT8 mode 1: GEMMs in INT8; residual adds, softmax,
    # LayerNorm, attention scores and the classifier stay in float.
    "linear": Recipe(
        name="linear", linear_inputs=True, linear_weights=True, head=False
    ),
}


def find_head(model: torch.nn.Module) -> list[str]:
    """Names of the classifier layers: GEMMs with two outputs, start and end."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == 2
    ]


def insert_quantizers(model: torch.nn.Module, recipe: Recipe) -> int:
    """Put ModelOpt's quantizers into ``model``, in place.

    Returns:
        How many quantizers are enabled.

    Raises:
        BuildError: the recipe matched nothing in this model.
    """
    import torch

    head_names = find_head(model)
    gemms = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    if gemms <= len(head_names):
        raise BuildError(
            f"the recipe {recipe.name} found no GEMM to quantize in this model: it has "
            f"no nn.Linear layers but its head. Supported are BERT-family encoders"
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # ModelOpt prints what it inserts, and warns that it has not been tested with
        # this version of transformers; our parity checks are that test.
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.nn import TensorQuantizer

        mtq.quantize(model, recipe.quantizer_config(head_names), forward_loop=None)
    return sum(
        isinstance(module, TensorQuantizer) and module.is_enabled
        for module in model.modules()
    )
