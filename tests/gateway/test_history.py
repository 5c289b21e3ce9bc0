"""What a gateway process that comes later is told."""

from __future__ import annotations

from int8qa.contract import Precision
from int8qa.gateway.comparison import FailedPair, Nonsense, Pair, Single
from int8qa.gateway.guard import AgreementGuard
from int8qa.gateway.history import History
from int8qa.settings import ComparisonSettings

SETTINGS = ComparisonSettings(window=10, guard_pairs=4, guard_agreement=0.5)


def test_as_long_as_the_window():
    """The last of each kind, in order; failures are counted, and so all kept."""
    history = History(SETTINGS)
    pairs = [Pair(float(n), 1.0, agreed=True) for n in range(12)]
    singles = [Single(Precision.INT8, float(n)) for n in range(12)]
    for seen in (*pairs, *singles, *[FailedPair()] * 12, Single(Precision.FP16, 9.0)):
        history.add(seen)
    kept = history.list()
    assert [seen for seen in kept if isinstance(seen, Pair)] == pairs[2:]
    in_int8 = [
        seen
        for seen in kept
        if isinstance(seen, Single) and seen.precision is Precision.INT8
    ]
    assert in_int8 == singles[2:]
    assert Single(Precision.FP16, 9.0) in kept
    assert kept.count(FailedPair()) == 12


def test_guard_goes_on_where_it_stood():
    """One that tripped long ago, and has not recovered since, is still tripped."""
    history = History(SETTINGS)
    guard = AgreementGuard(SETTINGS)
    switched: list[bool] = []
    for agreed in (False, False, False, True, *[False, True] * 10):
        seen = Pair(1.0, 1.0, agreed=True) if agreed else Nonsense()
        history.add(seen)
        guard.add(agreed=agreed)
    assert guard.report().state == "tripped"
    assert guard.report().agreement == 0.5, "which alone would not trip one"
    later = AgreementGuard(
        SETTINGS, on_switch=lambda tripped, _report: switched.append(tripped)
    )
    recent = [not isinstance(seen, Nonsense) for seen in history.list()]
    later.restore(recent, history.report_guard())
    assert later.report() == guard.report()
    assert not switched
