"""A thread's stack for signals, kept from OpenVINO.

In: a block that compiles a model. Out: the thread's alternate signal stack as it was.
OpenVINO 2026.4's CPU plugin gives the thread that compiles one of its own, and takes it
back in the thread that frees the model. Where these are two, the first keeps an address
that is no memory any more, and the next signal, Ctrl-C included, is a SIGSEGV.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class SignalStack(ctypes.Structure):
    """``stack_t`` of Linux. Source: sigaltstack(2)."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


def read_signal_stack() -> SignalStack | None:
    """This thread's; None where it is not known how to ask."""
    if sys.platform != "linux":
        return None
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextlib.contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Put the thread's stack for signals back after the block."""
    before = read_signal_stack()
    try:
        yield
    finally:
        if before is not None:
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
