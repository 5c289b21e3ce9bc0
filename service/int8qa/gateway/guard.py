"""Whether INT8 still gives FP16's answers, and who serves when it does not.

In: agreement of recent pairs, one by one. Out: a state, and the precision that requests
without a wish of their own should get. Knows no HTTP, no clock, no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from int8qa.settings import ComparisonSettings

GuardState = Literal["off", "collecting", "ok", "tripped"]


@dataclass(frozen=True, slots=True)
class GuardReport:
    """What the guard knows."""

    state: GuardState
    agreement: float | None
    """Over the pairs it holds, at most ``needed``; None without any."""
    pairs: int
    needed: int
    switches: int
    """How often it tripped or recovered, since start."""


class AgreementGuard:
    """Trips when too few of the last ``guard_pairs`` pairs agree; recovers later.

    It judges a full window only: a few unlucky first pairs prove nothing. Between the
    shares at which it trips and recovers it stays as it is, lest it flutter.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        *,
        on_switch: Callable[[bool, GuardReport], None] = lambda _tripped, _report: None,
    ) -> None:
        self._settings = settings
        self._on_switch = on_switch
        self._recent: deque[bool] = deque(maxlen=settings.guard_pairs)
        self._tripped = False
        self._switches = 0

    @property
    def tripped(self) -> bool:
        """Whether agreement fell too low and has not recovered."""
        return self._tripped

    @property
    def diverts(self) -> bool:
        """Whether traffic that names no precision should leave INT8 now."""
        return self._tripped and self._settings.guard == "fallback"

    def add(self, *, agreed: bool) -> None:
        """Add one pair, or an INT8 answer that was nonsense: it agrees with nothing."""
        if self._settings.guard == "off":
            return
        self._recent.append(agreed)
        agreement = self._agreement()
        if agreement is None or len(self._recent) < self._settings.guard_pairs:
            return
        if not self._tripped and agreement < self._settings.guard_agreement:
            self._switch(tripped=True)
        elif self._tripped and agreement >= self._settings.guard_recovery:
            self._switch(tripped=False)

    def restore(self, recent: Iterable[bool], known: GuardReport) -> None:
        """Go on where another guard of the same pairs stands; nothing is switched."""
        self._recent.extend(recent)
        self._tripped = known.state == "tripped"
        self._switches = known.switches

    def report(self) -> GuardReport:
        """Describe the present state."""
        return GuardReport(
            state=self._state(),
            agreement=self._agreement(),
            pairs=len(self._recent),
            needed=self._settings.guard_pairs,
            switches=self._switches,
        )

    def _switch(self, *, tripped: bool) -> None:
        self._tripped = tripped
        self._switches += 1
        self._on_switch(tripped, self.report())

    def _state(self) -> GuardState:
        if self._settings.guard == "off":
            return "off"
        if self._tripped:
            return "tripped"
        full = len(self._recent) == self._settings.guard_pairs
        return "ok" if full else "collecting"

    def _agreement(self) -> float | None:
        return sum(self._recent) / len(self._recent) if self._recent else None
