"""The instruction sets of this CPU that decide which kernels run.

In: ``/proc/cpuinfo``. Out: names as it has them. Knows no engine.
"""

from __future__ import annotations

from pathlib import Path

_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""An instruction that multiplies unsigned by signed bytes into sums of 32 bits. Without
it oneDNN sums in 16 bits, which unsigned operands overflow."""


def cpu_features() -> list[str]:
    """The instruction sets that decide which kernels run (Linux; else none)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next(
        (line for line in text.splitlines() if line.startswith("flags")), ""
    ).split()
    return [flag for flag in _FLAGS if flag in flags]


def has_vnni() -> bool:
    """Whether INT8 operands may be unsigned."""
    return not VNNI.isdisjoint(cpu_features())
