"""When INT8 is suspected, and when it is trusted again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from int8qa.gateway.guard import AgreementGuard
from int8qa.settings import ComparisonSettings


def build_guard(mode: str = "fallback", pairs: int = 10) -> AgreementGuard:
    return AgreementGuard(
        ComparisonSettings(
            guard=mode,  # type: ignore[arg-type]
            guard_pairs=pairs,
            guard_agreement=0.6,
            guard_hysteresis=0.2,
        )
    )


def feed(guard: AgreementGuard, agreed: bool, times: int) -> None:
    for _ in range(times):
        guard.add(agreed=agreed)


def test_judges_nothing_before_the_window_is_full():
    """Nine bad pairs of ten needed prove nothing yet; the tenth does."""
    guard = build_guard()
    feed(guard, False, 9)
    assert (guard.report().state, guard.report().agreement) == ("collecting", 0.0)
    assert not guard.diverts
    feed(guard, False, 1)
    assert guard.report().state == "tripped"
    assert guard.diverts


def test_stays_tripped_between_the_two_thresholds():
    """Agreement that is back above the trip, but not at recovery, changes nothing."""
    guard = build_guard()
    feed(guard, True, 5)
    feed(guard, False, 5)
    assert guard.tripped
    feed(guard, True, 7)  # the window: 3 bad, 7 good
    assert (guard.report().agreement, guard.tripped) == (0.7, True)
    feed(guard, True, 1)
    assert (guard.report().state, guard.report().switches) == ("ok", 2)


def test_every_switch_is_announced_once():
    """Who listens hears of each trip and recovery, with the state after it."""
    heard: list[tuple[bool, str]] = []
    settings = ComparisonSettings(guard="alert", guard_pairs=4)
    guard = AgreementGuard(
        settings,
        on_switch=lambda tripped, report: heard.append((tripped, report.state)),
    )
    feed(guard, True, 4)
    feed(guard, False, 8)
    feed(guard, True, 8)
    assert heard == [(True, "tripped"), (False, "ok")]


def test_alert_mode_moves_no_traffic():
    """It trips for all to see, and leaves requests where they are."""
    guard = build_guard("alert")
    feed(guard, False, 10)
    assert guard.tripped
    assert not guard.diverts


def test_off_keeps_nothing():
    """Switched off, it has no opinion."""
    guard = build_guard("off")
    feed(guard, False, 50)
    assert (guard.report().state, guard.report().pairs) == ("off", 0)


@given(st.lists(st.booleans(), max_size=200))
def test_state_follows_from_the_window_alone_or_stays(history: list[bool]):
    """Below the trip it is tripped, from recovery on it is not, else as before."""
    guard, before = build_guard(pairs=10), False
    for count, agreed in enumerate(history, start=1):
        guard.add(agreed=agreed)
        recent = history[max(0, count - 10) : count]
        expected = before
        if len(recent) == 10 and sum(recent) < 6:
            expected = True
        elif len(recent) == 10 and sum(recent) >= 8:
            expected = False
        assert guard.tripped is expected
        before = expected
