"""How busy several gateway processes of one engine are together.

In: each process's own figures, in its own row. Out: the sum of the others', without a
message. A file in shared memory of one row per process; a row has one writer, and each
figure is one machine word, so there is nothing to lock.
"""

from __future__ import annotations

import mmap
from enum import IntEnum


class Figure(IntEnum):
    """Columns of a row."""

    WORK = 0
    """Questions in work, replays of the comparison among them."""
    ARRIVALS = 1
    """Of them, since start."""
    BODY_BYTES = 2
    """Of bodies held."""


_ROW_BYTES = 64
"""A cache line each: no two processes write to one."""
_ROW_WORDS = _ROW_BYTES // 8


class Load:
    """This process's row, and the others'; without a file there are no others."""

    def __init__(self, descriptor: int | None = None, *, slot: int, slots: int) -> None:
        """Take a row.

        Args:
            descriptor: of a file of at least ``measure_file(slots)`` bytes, shared.
            slot: which row is this process's.
            slots: how many there are.
        """
        self._slot = slot
        self._slots = slots
        size = measure_file(slots)
        # The last reference; it goes when we go.
        memory = bytearray(size) if descriptor is None else mmap.mmap(descriptor, size)
        self._words = memoryview(memory).cast("q")

    def set(self, figure: Figure, value: int) -> None:
        """Say how it stands here."""
        self._words[self._slot * _ROW_WORDS + figure] = value

    def add_up_others(self, figure: Figure) -> int:
        """The sum of the other processes' figures."""
        if self._slots == 1:
            return 0
        column = self._words[figure::_ROW_WORDS].tolist()
        return sum(column) - column[self._slot]

    def clear(self, slot: int) -> None:
        """Forget what a process that is gone was busy with; its arrivals stay."""
        for figure in (Figure.WORK, Figure.BODY_BYTES):
            self._words[slot * _ROW_WORDS + figure] = 0


def measure_file(slots: int) -> int:
    """Bytes of a file for so many processes."""
    return slots * _ROW_BYTES


def stand_alone() -> Load:
    """The load of one process that shares its engine with no other."""
    return Load(slot=0, slots=1)
