"""What the machine offers, and its signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from int8qa.errors import ConfigurationError, MissingDependencyError
from int8qa.training import machine
from int8qa.training.machine import check_accelerate, choose_bf16, stop_gently
from tests.training.runs import deliver


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is here; where it is not, the message says how to get it."""
    check_accelerate()
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'accelerate"):
        check_accelerate()


@pytest.mark.parametrize("here", [False, True])
def test_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    """Auto follows the hardware, and leaves QAT in fp32; asked for, it is done."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: here)
    assert choose_bf16("auto", quantizing=False) is here
    assert choose_bf16("auto", quantizing=True) is False
    assert choose_bf16("bf16", quantizing=True) is True
    assert choose_bf16("fp32", quantizing=False) is False


def test_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated, it would be slower than fp32: said, where it was asked for."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_bf16("auto", quantizing=False) is False
    with pytest.raises(ConfigurationError, match="--precision fp32"):
        choose_bf16("bf16", quantizing=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks(number: signal.Signals) -> None:
    """The second one acts as before; afterwards the first does as well."""
    asked: list[int] = []
    before: list[int] = []
    previous = signal.signal(number, lambda *_: before.append(1))
    try:
        with stop_gently(lambda: asked.append(1)):
            deliver(number)
            assert (asked, before) == ([1], [])
            deliver(number)
            assert (asked, before) == ([1], [1])
        deliver(number)
        assert (asked, before) == ([1], [1, 1])
    finally:
        signal.signal(number, previous)


def test_real_signals() -> None:
    """The kernel's signals, in a process of its own: asked once, then interrupted."""
    script = """
        import os, signal
        from int8qa.training.machine import keep_memory, stop_gently
        keep_memory()
        # A shell that starts us in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked = []
        try:
            with stop_gently(lambda: asked.append("asked")):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print(*asked, "interrupted")
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (finished.returncode, finished.stdout) == (0, "asked interrupted\n")


def test_signals_of_another_thread() -> None:
    """Only the main thread may take signals; elsewhere training goes on without."""
    went: list[bool] = []

    def run() -> None:
        with stop_gently(lambda: None):
            went.append(True)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert went == [True]
    assert signal.getsignal(signal.SIGINT) is handler
