"""Who runs and whose turn it is."""

from dataclasses import dataclass
from typing import Any

from tests.inference.conftest import request
from tidepool.inference.engine import GenerationRequest
from tidepool.inference.schedule import Schedule


@dataclass(eq=False)
class FakeSequence:
    request: GenerationRequest


def sequence(name: str, adapter: str | None = None) -> Any:
    return FakeSequence(request([1], request_id=name, adapter=adapter))


def turns(schedule: Schedule, num: int) -> list[str]:
    found = [schedule.next_turn() for _ in range(num)]
    return ["".join(item.request.request_id for item in turn[1]) if turn else "-" for turn in found]


def test_groups_take_turns() -> None:
    schedule = Schedule(8)
    for name, adapter in [("a", None), ("b", "x"), ("c", None), ("d", "y")]:
        schedule.add(sequence(name, adapter))
    assert turns(schedule, 5) == ["ac", "b", "d", "ac", "b"]
    schedule.add(sequence("e", "z"))
    assert turns(schedule, 4) == ["d", "ac", "b", "e"]


def test_those_that_find_no_room_start_in_order_whatever_their_adapter() -> None:
    schedule = Schedule(2)
    first, second, third, fourth = sequences = [sequence("a"), sequence("b", "x"), sequence("c", "y"), sequence("d")]
    for item in sequences:
        schedule.add(item)
    assert (schedule.num_running, schedule.num_waiting, schedule.has_room) == (2, 2, False)
    schedule.remove(first)
    assert turns(schedule, 2) == ["b", "c"]
    schedule.remove(fourth)
    schedule.remove(second)
    assert turns(schedule, 2) == ["c", "c"]
    schedule.remove(third)
    assert turns(schedule, 1) == ["-"]
    assert (schedule.num_running, schedule.num_waiting, schedule.has_room) == (0, 0, True)


def test_a_group_that_ended_leaves_nothing_to_the_next_one_with_its_adapter() -> None:
    schedule = Schedule(2)
    first, second = sequence("a"), sequence("b")
    schedule.add(first)
    before = schedule.next_turn()
    schedule.remove(first)
    schedule.add(second)
    after = schedule.next_turn()
    assert before is not None
    assert after is not None
    assert after[0].batch is not before[0].batch
