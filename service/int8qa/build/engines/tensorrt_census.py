"""What a parsed TensorRT network computes in, read from the network itself.

In: an ``INetworkDefinition`` as TensorRT's own parser made it. Out: its GEMMs by the
types they read, softmaxes and normalizations by theirs. In a strongly typed network
these are the types that run. Says nothing of speed, and knows no recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from int8qa.contract import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_IDS,
    START_LOGITS,
    TOKEN_TYPE_IDS,
    Precision,
)
from int8qa.errors import EnginePrecisionError

_INPUTS = {INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS}
_MOVES = ("SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE", "SLICE")


@dataclass(frozen=True, slots=True)
class NetworkCensus:
    """Layers of a parsed network, counted; written into the manifest."""

    library: str
    """Version of the library that parsed it."""
    layers: int
    strongly_typed: bool
    gemms: Mapping[str, int]
    """By what they read: ``int8``, ``half``, ``float``, or two of these joined by +."""
    softmaxes: Mapping[str, int]
    normalizations: Mapping[str, int]
    other_gemms: tuple[str, ...]
    """Names of the GEMMs that do not read INT8 on both sides, in order."""
    inputs: Mapping[str, str]
    """Type and shape by name: ``INT32 (-1, -1)``."""
    outputs: Mapping[str, str]

    @property
    def summary(self) -> str:
        """Types of the GEMMs in order of frequency: ``int8+half``."""
        return "+".join(name for name, _ in Counter(self.gemms).most_common())


def take_network_census(library: Any, network: Any) -> NetworkCensus:
    """Count what ``network`` holds."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }
    kinds = library.LayerType
    gemms: Counter[str] = Counter()
    others = []
    for layer in layers:
        if layer.type != kinds.MATRIX_MULTIPLY:
            continue
        reads = [_find_type(layer.get_input(i), producers, kinds) for i in (0, 1)]
        kind = "+".join(dict.fromkeys(reads))
        gemms[kind] += 1
        if kind != "int8":
            others.append(_clean_name(layer.name))
    return NetworkCensus(
        library=str(library.__version__),
        layers=len(layers),
        strongly_typed=_is_strongly_typed(library, network),
        gemms=dict(gemms),
        softmaxes=_count_types(layers, kinds.SOFTMAX),
        normalizations=_count_types(layers, kinds.NORMALIZATION),
        other_gemms=tuple(others),
        inputs=_describe_ports(network.get_input, network.num_inputs),
        outputs=_describe_ports(network.get_output, network.num_outputs),
    )


def _find_type(tensor: Any, producers: Mapping[str, Any], kinds: Any) -> str:
    """``int8`` for a tensor that was INT8 before it moved, else its own type."""
    layer = producers.get(tensor.name)
    moves = {getattr(kinds, name) for name in _MOVES if hasattr(kinds, name)}
    while layer is not None and layer.type in moves:
        layer = producers.get(layer.get_input(0).name)
    if (
        layer is not None
        and layer.type == kinds.DEQUANTIZE
        and layer.get_input(0).dtype.name == "INT8"
    ):
        return "int8"
    return str(tensor.dtype.name).lower()


def _count_types(layers: list[Any], kind: Any) -> dict[str, int]:
    return dict(
        Counter(
            layer.get_input(0).dtype.name.lower()
            for layer in layers
            if layer.type == kind
        )
    )


def _is_strongly_typed(library: Any, network: Any) -> bool:
    """TensorRT 11 knows nothing else; 10 and RTX say."""
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return flag is None or bool(network.get_flag(flag))


def _describe_ports(get: Any, count: int) -> dict[str, str]:
    ports = [get(index) for index in range(count)]
    return {port.name: f"{port.dtype.name} {tuple(port.shape)}" for port in ports}


def _clean_name(name: str) -> str:
    """The ONNX node's name; some parsers put ``node:`` before it."""
    return name.removeprefix("node:")


def check_network(
    census: NetworkCensus, precision: Precision, *, quantized_gemms: int
) -> None:
    """Hold a parsed network to what was asked for.

    Args:
        census: of the parsed network.
        precision: asked for.
        quantized_gemms: GEMMs that should read INT8 on both sides: those of the Q/DQ
            graph (census.Census.quantized_matmuls), none for a float graph.

    Raises:
        EnginePrecisionError: the network is weakly typed, reads or writes other types
            than the contract's, or has other GEMMs in INT8 or in float32.
    """
    faults = []
    if not census.strongly_typed:
        faults.append("it is not strongly typed, so TensorRT may choose other types")
    if census.gemms.get("int8", 0) != quantized_gemms:
        faults.append(
            f"{census.gemms.get('int8', 0)} GEMMs read INT8 on both sides, the recipe "
            f"has {quantized_gemms} ({_list_gemms(census)})"
        )
    strange = set(census.gemms) - {"int8", "half"}
    if strange:
        faults.append(
            f"GEMMs read {', '.join(sorted(strange))} besides INT8 and half "
            f"({_list_gemms(census)})"
        )
    ports = {name: kind.split()[0] for name, kind in census.inputs.items()}
    if not set(ports) <= _INPUTS or set(ports.values()) != {"INT32"}:
        faults.append(f"its inputs are {dict(census.inputs)}, not INT32 [B, S]")
    ports = {name: kind.split()[0] for name, kind in census.outputs.items()}
    if ports != {START_LOGITS: "FLOAT", END_LOGITS: "FLOAT"}:
        faults.append(f"its outputs are {dict(census.outputs)}, not float logits")
    if faults:
        raise EnginePrecisionError(
            f"TensorRT {census.library} read the {precision} graph otherwise than "
            f"asked for: {'; '.join(faults)}"
        )


def _list_gemms(census: NetworkCensus) -> str:
    shown = ", ".join(census.other_gemms[:3])
    more = len(census.other_gemms) - 3
    return f"{dict(census.gemms)}; {shown}{f' and {more} more' if more > 0 else ''}"
