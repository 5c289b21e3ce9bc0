"""The tensors of a reader that can be quantized, and what each of them is.

In: a reader with ModelOpt's quantizers in it. Out: one :class:`Site` per quantizer
that stands at a tensor we know, with its class and its encoder layer. Classes come
from the order and the identity of tensors in one forward pass, not from module names,
so that one recipe holds for BERT, RoBERTa, DistilBERT, ELECTRA and their like.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from int8qa.contract import ATTENTION_MASK, INPUT_IDS

if TYPE_CHECKING:
    import torch


class TensorClass(str, Enum):
    """What a tensor is to an encoder; the unit recipes speak in."""

    EMBEDDING_WEIGHT = "embedding_weight"
    PROJECTION_INPUT = "projection_input"
    """Of a GEMM between embeddings and encoder, as ELECTRA has one."""
    PROJECTION_WEIGHT = "projection_weight"
    QKV_INPUT = "qkv_input"
    QKV_WEIGHT = "qkv_weight"
    QUERY = "query"
    """Output of the query GEMM, as the score GEMM reads it."""
    KEY = "key"
    VALUE = "value"
    SOFTMAX = "softmax"
    """Attention probabilities, as the context GEMM reads them."""
    CONTEXT = "context"
    """Output of the context GEMM, input of the attention output GEMM."""
    ATTENTION_OUTPUT_WEIGHT = "attention_output_weight"
    ATTENTION_OUTPUT = "attention_output"
    """Output of that GEMM, one addend of the residual add behind it."""
    ATTENTION_RESIDUAL = "attention_residual"
    """The other addend: what came into the attention block."""
    LAYERNORM_INPUT = "layernorm_input"
    """The sum of both."""
    FFN_IN_INPUT = "ffn_in_input"
    FFN_IN_WEIGHT = "ffn_in_weight"
    FFN_OUT_INPUT = "ffn_out_input"
    """Output of GELU."""
    FFN_OUT_WEIGHT = "ffn_out_weight"
    FFN_OUTPUT = "ffn_output"
    FFN_RESIDUAL = "ffn_residual"
    CLASSIFIER_INPUT = "classifier_input"
    CLASSIFIER_WEIGHT = "classifier_weight"
    OTHER_INPUT = "other_input"
    """Of a GEMM whose place in the encoder is not known."""
    OTHER_WEIGHT = "other_weight"

    def __str__(self) -> str:
        return self.value

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, known before any data."""
        return self.value.endswith("_weight")


@dataclass(frozen=True, slots=True)
class Site:
    """One quantizer at one tensor."""

    name: str
    """Of the quantizer in the model: ``bert.encoder.layer.0….input_quantizer``."""
    tensor_class: TensorClass
    layer: int | None
    """Encoder layer, from 0; None before the first and after the last."""
    tensor: int
    """Sites with equal numbers read one and the same tensor."""
    macs_per_token: int = 0
    """Multiply-accumulates of the GEMM per token; of weights only."""

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, known before any data."""
        return self.tensor_class.is_weight

    @property
    def place(self) -> str:
        """For people: ``layer 3 ffn_out_input``."""
        where = "" if self.layer is None else f"layer {self.layer} "
        return f"{where}{self.tensor_class}"


@dataclass(slots=True)
class _Call:
    """One call of a GEMM or a LayerNorm in the forward pass."""

    name: str
    module: Any
    input_at: int
    """Address of the input, which says who reads what."""
    output_at: int = 0


def find_sites(reader: torch.nn.Module, inputs: Sequence[str]) -> list[Site]:
    """Name every quantizable tensor of ``reader``, in the order of its modules.

    Args:
        reader: the wrapped model (see export.wrap_model) with quantizers in it.
        inputs: names of its inputs, in order.
    """
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer

    model = reader.model
    modules = dict(model.named_modules())
    classifier = _Classifier(
        [name for name, module in modules.items() if hasattr(module, "q_bmm_quantizer")]
    )
    for name, module in modules.items():
        if isinstance(module, torch.nn.Embedding):
            classifier.add(f"{name}.weight_quantizer", TensorClass.EMBEDDING_WEIGHT)
    with _traced_calls(reader, inputs) as calls:
        for call in calls:
            classifier.classify(call)
    classifier.close_block()
    order = {
        name: index
        for index, (name, module) in enumerate(modules.items())
        if isinstance(module, TensorQuantizer)
    }
    found = [site for site in classifier.sites.values() if site.name in order]
    return sorted(found, key=lambda site: order[site.name])


@contextlib.contextmanager
def _traced_calls(reader: Any, inputs: Sequence[str]) -> Iterator[list[_Call]]:
    """Calls of one forward pass on 8 tokens, in order, with every quantizer off.

    Addresses stay true while the context is open: it keeps every tensor alive.
    """
    import torch

    from int8qa.build.quantization import quantizers_off

    calls: list[_Call] = []
    pending: list[_Call] = []
    alive: list[Any] = []

    def make_opener(name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            alive.append(arguments[0])
            pending.append(_Call(name, module, arguments[0].data_ptr()))

        return hook

    def close(_module: Any, _arguments: Any, output: Any) -> None:
        alive.append(output)
        call = pending.pop()
        call.output_at = output.data_ptr()
        calls.append(call)

    hooks = []
    for name, module in reader.model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            hooks.append(module.register_forward_pre_hook(make_opener(name)))
            hooks.append(module.register_forward_hook(close))
    row = torch.arange(5, 13, dtype=torch.int32)[None, :]
    feed = {name: torch.zeros_like(row) for name in inputs}
    feed |= {INPUT_IDS: row, ATTENTION_MASK: torch.ones_like(row)}
    try:
        with torch.no_grad(), quantizers_off(reader):
            reader(*(feed[name] for name in inputs))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Classifier:
    """Reads calls in order and names the tensors between them."""

    def __init__(self, attentions: Sequence[str]) -> None:
        self.sites: dict[str, Site] = {}
        self._attentions = attentions
        self._layer: int | None = None
        self._attention: str | None = None
        """The attention whose block is being read."""
        self._block_input = 0
        self._behind: list[_Call] = []
        """GEMMs since its QKV: the output GEMM, then the two of the FFN."""
        self._producers: dict[int, str] = {}
        self._tensors: dict[int, int] = {}

    def add(
        self,
        name: str,
        tensor_class: TensorClass,
        *,
        layer: int | None = None,
        address: int | None = None,
        macs: int = 0,
    ) -> None:
        """Note a site; a module called once per layer (ALBERT) is one site."""
        if address is None:
            tensor = -1 - len(self.sites)
        else:
            tensor = self._tensors.setdefault(address, len(self._tensors))
        self.sites.setdefault(name, Site(name, tensor_class, layer, tensor, macs))

    def classify(self, call: _Call) -> None:
        import torch

        self._producers[call.output_at] = call.name
        if isinstance(call.module, torch.nn.LayerNorm):
            if self._layer is not None:
                self.add(
                    f"{call.name}.input_quantizer",
                    TensorClass.LAYERNORM_INPUT,
                    layer=self._layer,
                    address=call.input_at,
                )
            return
        owner = next((a for a in self._attentions if call.name.startswith(f"{a}.")), "")
        if owner and owner != self._attention:
            self._open_block(owner, call)
        if call.module.out_features == 2:
            self._add_gemm(
                call, TensorClass.CLASSIFIER_INPUT, TensorClass.CLASSIFIER_WEIGHT
            )
        elif owner and call.input_at == self._block_input:
            self._add_gemm(call, TensorClass.QKV_INPUT, TensorClass.QKV_WEIGHT)
        elif self._attentions and self._layer is None:
            self._add_gemm(
                call, TensorClass.PROJECTION_INPUT, TensorClass.PROJECTION_WEIGHT
            )
        else:
            self._behind.append(call)

    def _open_block(self, attention: str, call: _Call) -> None:
        self.close_block()
        self._attention = attention
        self._layer = 0 if self._layer is None else self._layer + 1
        self._block_input = call.input_at
        for part, tensor_class in _ATTENTION_PARTS.items():
            name = f"{attention}.{part}_bmm_quantizer"
            self.add(name, tensor_class, layer=self._layer)
        self._add_residual(call.input_at, TensorClass.ATTENTION_RESIDUAL)

    def close_block(self) -> None:
        """Name the GEMMs between one attention and the next."""
        behind, self._behind = self._behind, []
        if len(behind) != 3:
            for call in behind:
                self._add_gemm(call, TensorClass.OTHER_INPUT, TensorClass.OTHER_WEIGHT)
            return
        output, ffn_in, ffn_out = behind
        self._add_gemm(output, TensorClass.CONTEXT, TensorClass.ATTENTION_OUTPUT_WEIGHT)
        self._add_gemm(ffn_in, TensorClass.FFN_IN_INPUT, TensorClass.FFN_IN_WEIGHT)
        self._add_gemm(ffn_out, TensorClass.FFN_OUT_INPUT, TensorClass.FFN_OUT_WEIGHT)
        for call, tensor_class in (
            (output, TensorClass.ATTENTION_OUTPUT),
            (ffn_out, TensorClass.FFN_OUTPUT),
        ):
            self.add(
                f"{call.name}.output_quantizer",
                tensor_class,
                layer=self._layer,
                address=call.output_at,
            )
        self._add_residual(ffn_in.input_at, TensorClass.FFN_RESIDUAL)

    def _add_gemm(self, call: _Call, read: TensorClass, weight: TensorClass) -> None:
        layer = None if read is TensorClass.CLASSIFIER_INPUT else self._layer
        self.add(
            f"{call.name}.input_quantizer", read, layer=layer, address=call.input_at
        )
        macs = call.module.in_features * call.module.out_features
        self.add(f"{call.name}.weight_quantizer", weight, layer=layer, macs=macs)

    def _add_residual(self, address: int, tensor_class: TensorClass) -> None:
        """The residual branch is what its block reads: some module's output."""
        producer = self._producers.get(address)
        if producer is not None:
            self.add(
                f"{producer}.output_quantizer",
                tensor_class,
                layer=self._layer,
                address=address,
            )


_ATTENTION_PARTS = {
    "q": TensorClass.QUERY,
    "k": TensorClass.KEY,
    "v": TensorClass.VALUE,
    "p": TensorClass.SOFTMAX,
}
