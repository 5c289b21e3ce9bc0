"""What gateway processes of one build have observed together: for those to come.

In: observations of all, in order. Out: the recent ones, and where the guard stands, so
that a new process knows what the others know.
"""

from __future__ import annotations

from collections import deque

from int8qa.contract import Precision
from int8qa.gateway.comparison import FailedPair, Observation, Single, judge
from int8qa.gateway.guard import AgreementGuard, GuardReport
from int8qa.settings import ComparisonSettings


class History:
    """As long as a comparison's window, and the guard's."""

    def __init__(self, settings: ComparisonSettings) -> None:
        longest = max(settings.window, settings.guard_pairs)
        self._window = settings.window
        self._singles: dict[Precision, deque[Observation]] = {}
        self._pairs: deque[Observation] = deque(maxlen=longest)
        self._failed = 0
        self._guard = AgreementGuard(settings)

    def add(self, seen: Observation) -> None:
        """Take one, after all that were before it."""
        if isinstance(seen, Single):
            kept = self._singles.setdefault(seen.precision, deque(maxlen=self._window))
            kept.append(seen)
        elif isinstance(seen, FailedPair):
            self._failed += 1
        else:
            self._pairs.append(seen)
        agreed = judge(seen)
        if agreed is not None:
            self._guard.add(agreed=agreed)

    def list(self) -> tuple[Observation, ...]:
        """The recent ones, of each kind in order; of failures all."""
        singles = (seen for kept in self._singles.values() for seen in kept)
        return (*singles, *self._pairs, *[FailedPair()] * self._failed)

    def report_guard(self) -> GuardReport:
        """Where the guard of each process stands."""
        return self._guard.report()
