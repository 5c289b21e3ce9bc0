"""What gateway processes of one engine know of each other's work."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator

import pytest

from int8qa.errors import QueueFullError
from int8qa.gateway.activity import Activity
from int8qa.gateway.budget import ByteBudget
from int8qa.gateway.load import Figure, Load, measure_file, stand_alone


@pytest.fixture
def loads() -> Iterator[list[Load]]:
    """Three processes' views of one file."""
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), measure_file(3))
        yield [Load(file.fileno(), slot=slot, slots=3) for slot in range(3)]


def test_each_sees_the_others(loads: list[Load]):
    """Its own figures are not among them; who is gone works no more."""
    for value, load in enumerate(loads, start=1):
        load.set(Figure.WORK, value)
        load.set(Figure.ARRIVALS, 10 * value)
    assert [load.add_up_others(Figure.WORK) for load in loads] == [5, 4, 3]
    assert [load.add_up_others(Figure.ARRIVALS) for load in loads] == [50, 40, 30]
    loads[0].clear(2)
    assert loads[0].add_up_others(Figure.WORK) == 2
    assert loads[0].add_up_others(Figure.ARRIVALS) == 50


def test_alone_there_are_no_others():
    """One process needs no file."""
    load = stand_alone()
    load.set(Figure.WORK, 5)
    assert load.add_up_others(Figure.WORK) == 0


async def test_questions_are_those_of_all(loads: list[Load]):
    """An engine is idle when nobody asks it, in whichever process."""
    here, there = (Activity(load=load) for load in loads[:2])
    arrivals = here.arrivals
    with there.question():
        assert here.questions == 1
        assert here.arrivals == arrivals + 1
        waiting = asyncio.create_task(here.wait_for_no_question())
        await asyncio.sleep(0.02)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 10)
    assert here.requests == there.requests == 0


def test_replay_is_work_for_the_others_alone(loads: list[Load]):
    """It disturbs them as a question would, and does not stand in its own way."""
    here, there = (Activity(load=load) for load in loads[:2])
    arrivals = there.arrivals
    with here.replay() as alone:
        assert alone
        assert here.questions == 0
        assert there.questions == 1
        assert there.arrivals == arrivals + 1
        with there.replay() as also_alone:
            assert not also_alone
    assert there.questions == 0


def test_bodies_are_bounded_together(loads: list[Load]):
    """What others hold counts; an empty gateway takes a body of any size."""
    here, there = (ByteBudget(100, load) for load in loads[:2])
    here.take(60)
    with pytest.raises(QueueFullError, match="hold 60 bytes"):
        there.take(60)
    there.take(40)
    here.give_back(60)
    there.give_back(40)
    there.take(500)
