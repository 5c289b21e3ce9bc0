"""How a TensorRT plan is to be built: which library, for which shapes, for which GPUs.

In: padded lengths and batch sizes that occur. Out: values that engines/tensorrt.py
builds by and the server's configuration repeats. Imports no TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from int8qa.errors import BuildError

PLAN_FILENAME = "model.plan"
"""What Triton's TensorRT backend looks for by default."""
WORKSPACE_BYTES = 2 << 30
"""Scratch memory a kernel may use; a T4 has 16 GiB for weights, contexts and this."""
BAND_FLOOR_TOKENS = 64
"""Windows shorter than this share one profile: they take next to no time."""
TUNED_BATCH = 8
"""Batch size kernels are chosen at. It fills a GPU (docs/decisions/0013)."""
RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120")
"""What an RTX plan is for unless told otherwise: T4, A100, A10, L4, RTX 50. All five
take 0.2 MB and no time more than one (docs/tensorrt.md)."""
_CAPABILITY = re.compile(r"sm[1-9][0-9]{1,2}")


class Flavour(str, Enum):
    """Which TensorRT."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    def __str__(self) -> str:
        return self.value

    @property
    def module_name(self) -> str:
        """What Python imports."""
        return self.value.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes (B, S) one set of kernels serves: all from ``least`` to ``most``."""

    least: tuple[int, int]
    tuned: tuple[int, int]
    """The shape at which kernels are timed and chosen."""
    most: tuple[int, int]

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.least, self.tuned, self.most, strict=True):
            if not 1 <= low <= middle <= high:
                raise BuildError(
                    f"a profile of {self.least}, {self.tuned}, {self.most} is not "
                    f"ascending from 1; give (batch, tokens) as least, tuned, most"
                )

    def covers(self, shape: tuple[int, int]) -> bool:
        """Whether (B, S) may be run with it."""
        return all(
            low <= size <= high
            for low, size, high in zip(self.least, shape, self.most, strict=True)
        )


def choose_profiles(
    flavour: Flavour, *, sequence_buckets: Sequence[int], batch_sizes: Sequence[int]
) -> tuple[Profile, ...]:
    """The profiles of one engine, shortest first; together they take every shape.

    TensorRT: one per octave of lengths, so that kernels tuned at the upper end serve
    lengths down to half of it. Each takes the largest batch, because Triton refuses a
    profile that does not. RTX specializes kernels to shapes at run time: one.

    Source: docs/decisions/0013-tensorrt-profiles.md.
    """
    batch = max(batch_sizes)
    tuned = min(TUNED_BATCH, batch)
    longest = max(sequence_buckets)
    edges = [longest]
    while flavour is Flavour.TENSORRT:
        below = [b for b in sequence_buckets if b <= edges[0] // 2]
        if not below or below[-1] < BAND_FLOOR_TOKENS:
            break
        edges.insert(0, below[-1])
    lows = [1, *(edge + 1 for edge in edges[:-1])]
    return tuple(
        Profile((1, low), (tuned, high), (batch, high))
        for low, high in zip(lows, edges, strict=True)
    )


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How to build; the defaults cost nothing at run time."""

    flavour: Flavour = Flavour.TENSORRT
    compute_capabilities: tuple[str, ...] = ()
    """RTX alone: ``sm75`` and the like, all in one plan. Empty: 8.0 and later."""
    workspace_bytes: int = WORKSPACE_BYTES
    timing_cache: Path | None = None
    """TensorRT alone: a folder. Without it every build times every kernel anew."""
    version_compatible: bool = False
    """TensorRT alone: the plan loads in later releases of the same major version, and
    of the next. Price: it carries a lean runtime (tens of MB) that the server executes,
    so Triton wants ``version-compatible=true`` and trust in the plan; kernels that need
    the full library are out."""
    hardware_compatible: bool = False
    """TensorRT alone: the plan runs on Ampere and all later GPUs. Price: no kernel may
    use what one of these lacks, above all shared memory beyond 48 KiB; NVIDIA warns of
    lower throughput."""

    def check(self) -> None:
        """Refuse what the chosen TensorRT has not.

        Raises:
            BuildError: an option of the one was given to the other.
        """
        wrong = [c for c in self.compute_capabilities if not _CAPABILITY.fullmatch(c)]
        if wrong:
            raise BuildError(
                f"{wrong[0]!r} is no compute capability; write sm and its digits, "
                f"such as sm75 (T4), sm80 (A100), sm86 (A10), sm89 (L4)"
            )
        if self.flavour is Flavour.TENSORRT and self.compute_capabilities:
            raise BuildError(
                "--target tensorrt builds for the GPU it runs on and takes no "
                "--compute-capability; run it there, or use --target tensorrt-rtx"
            )
        if self.flavour is Flavour.RTX and (
            self.timing_cache or self.version_compatible or self.hardware_compatible
        ):
            raise BuildError(
                "--target tensorrt-rtx has no timing cache and no compatibility "
                "flags: it times nothing, and its plans are portable as they are"
            )
