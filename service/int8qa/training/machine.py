"""The machine a run is on: its arithmetic, its name, its signals.

In: what is asked for. Out: what is there. Knows nothing of models and data.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import platform
import signal
from collections.abc import Callable, Iterator
from typing import Any

from int8qa.errors import ConfigurationError, MissingDependencyError
from int8qa.training.options import Precision


def check_accelerate() -> None:
    """Raise MissingDependencyError where transformers' Trainer cannot run."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            "training needs the package accelerate, which is not installed here: "
            "pip install 'accelerate>=1.10', or run `make install` in the checkout"
        )


def choose_bf16(precision: Precision, *, quantizing: bool) -> bool:
    """Whether matrices are multiplied in bf16; ``auto`` asks the hardware.

    ``auto`` leaves QAT in fp32: bf16 has 8 significant bits, hardly more than the grid
    that is to be learned, and rounds every dequantized value a second time.

    Raises:
        ConfigurationError: bf16 is asked for on a GPU that has none.
    """
    import torch

    if precision == "fp32":
        return False
    gpu = torch.cuda.is_available()
    here = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if gpu
        else torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001
    )
    if precision == "auto":
        return bool(here) and not quantizing
    if gpu and not here:
        raise ConfigurationError(
            "this GPU has no bf16; use --precision fp32 (or auto, which finds out)"
        )
    return True


def keep_memory() -> None:
    """Tell glibc's malloc to keep what is freed, on a CPU; elsewhere do nothing.

    Tensors come and go with each step, and each large one would be mapped anew, its
    pages zeroed by the kernel: a third of the time of a step of MiniLM on two cores.
    Batches of many lengths leave gaps that no later tensor fits: who keeps memory must
    ``release_memory`` now and then.
    """
    import torch

    if torch.cuda.is_available():
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC_OPTIONS:
            mallopt(parameter, value)


def release_memory() -> None:
    """Give back what malloc holds and nothing uses, gaps between tensors included.

    Without, a run of 25 minutes grew from 5 to 10 GB.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_MALLOC_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: everything from the heap
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: never give its end back
    (-2, 2**28),  # M_TOP_PAD: grow by 256 MiB
)
"""Source: glibc's ``malloc.h`` and mallopt(3)."""


def describe_device() -> str:
    """The GPU's name, or the CPU's architecture and threads."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def stop_gently(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls ``ask``; a second one acts as it did before."""

    def stop(number: int, _frame: Any) -> None:
        ask()
        signal.signal(number, previous[signal.Signals(number)])

    try:
        previous = {
            number: signal.signal(number, stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: whoever runs us has the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
