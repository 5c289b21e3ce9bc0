"""Memory and descriptors of a process and its children, over time.

In: a process id of this machine. Out: curves, one per process. Reads Linux's /proc,
and nothing that the processes say of themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from int8qa.errors import GatewayRequestError

PROC = Path("/proc")


@dataclass
class Curve:
    """One process; a list has a value per sample until it ended."""

    pid: int
    name: str
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    ended: bool = False


class Watch:
    """A process and those below it, as they are when the watch begins."""

    def __init__(self, pid: int) -> None:
        """Look for the processes.

        Raises:
            GatewayRequestError: there is none, or it is another user's.
        """
        self.time_s: list[float] = []
        try:
            self.curves = [Curve(one, _name(one)) for one in list_family(pid)]
            for curve in self.curves:
                _read(curve.pid)
        except OSError as error:
            raise GatewayRequestError(
                f"cannot watch process {pid}: {error.strerror}. Give the id of a "
                f"gateway on this machine that is yours (`pgrep -f 'int8qa up'`); "
                f"Linux only"
            ) from error

    def sample(self, time_s: float) -> None:
        """Add a point to every curve whose process still runs."""
        self.time_s.append(round(time_s, 1))
        for curve in self.curves:
            if curve.ended:
                continue
            try:
                rss_mib, descriptors = _read(curve.pid)
            except OSError:
                curve.ended = True
                continue
            curve.rss_mib.append(rss_mib)
            curve.descriptors.append(descriptors)


def list_family(pid: int) -> list[int]:
    """``pid`` and all below it, parents first.

    Raises:
        OSError: there is no such process.
    """
    found = [pid]
    for task in sorted((PROC / str(pid) / "task").iterdir()):
        for child in (task / "children").read_text(encoding="ascii").split():
            found += list_family(int(child))
    return found


def _name(pid: int) -> str:
    comm = (PROC / str(pid) / "comm").read_text(encoding="utf-8").strip()
    return f"{comm} {pid}"


def _read(pid: int) -> tuple[float, int]:
    """Resident memory in MiB, and open descriptors."""
    status = (PROC / str(pid) / "status").read_text(encoding="utf-8")
    rss_kib = status.partition("VmRSS:")[2].split()[:1]
    if not rss_kib:  # a zombie has no memory
        raise ProcessLookupError(3, "it has ended")
    descriptors = len(list((PROC / str(pid) / "fd").iterdir()))
    return round(int(rss_kib[0]) / 1024, 2), descriptors
