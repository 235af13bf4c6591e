"""What a coordinator answers to who asks something of its run. Its decisions about quorums are tested in test_quorum.py."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from tidepool.errors import RunError
from tidepool.messages import AskBack, Pause, Reason, Resize, Stop
from tidepool.training.coordinator import Beginning, Coordinator, Orders
from tidepool.training.membership import Report, WorkerId
from tidepool.training.quorum import Rules
from tidepool.training.quorum_events import Claimed

T = TypeVar("T")


def with_coordinator(use: Callable[[Coordinator], Awaitable[T]], min_groups: int = 1, max_groups: int = 4, num_groups: int = 4) -> T:
    """Use the coordinator of a run that begins, which so many groups have reported to, in an event loop of its own."""

    async def run() -> T:
        coordinator = Coordinator()
        await coordinator.begin(Beginning(1, Claimed(1, None, 0), 0, min_groups, max_groups, 0, {}, Rules()))
        for group in range(1, num_groups + 1):
            await coordinator.report(Report(WorkerId(group, 0), 1, 1, "127.0.0.1:9", session=1))
        return await use(coordinator)

    return asyncio.run(run())


def back(group: int) -> AskBack:
    return AskBack("bot", str(group), Reason("reclaim", "serving needs it"))


def test_a_run_has_as_many_groups_as_asked_for_within_its_bounds() -> None:
    async def use(one: Coordinator) -> list[int]:
        return [await one.ask(Resize("bot", wanted)) for wanted in (3, 1, 9)]

    assert with_coordinator(use, min_groups=2) == [3, 2, 4]


def test_a_group_that_is_asked_back_is_named_and_not_replaced() -> None:
    async def use(one: Coordinator) -> Orders:
        assert [await one.ask(back(group)) for group in (2, 2, 3)] == [3, 3, 2], "asked twice, it goes once"
        return await one.orders(0.0)

    orders = with_coordinator(use)
    assert (orders.num_groups, orders.asked_back) == (2, {2, 3})


def test_no_other_group_takes_the_place_of_one_that_is_asked_back_from_a_run_which_has_less_than_it_wants() -> None:
    async def use(one: Coordinator) -> Orders:
        assert await one.ask(back(3)) == 2
        return await one.orders(0.0)

    orders = with_coordinator(use, max_groups=8, num_groups=3)
    assert (orders.num_groups, orders.asked_back) == (2, {3})


def test_a_group_that_leaves_or_is_gone_is_not_taken_twice() -> None:
    async def use(one: Coordinator) -> list[int]:
        assert await one.ask(Resize("bot", 3)) == 3
        await one.release((4,))
        told = [await one.ask(back(4))]
        await one.group_ended(3)
        return [*told, await one.ask(back(3))]

    assert with_coordinator(use) == [3, 2], "of four groups one was released, and one ended by itself"


def test_the_minimum_is_not_taken_from_a_run_that_goes_on() -> None:
    async def use(one: Coordinator) -> Orders:
        await one.ask(back(4))
        with pytest.raises(RunError, match="no step with less than 3 replica groups: pause it instead"):
            await one.ask(back(3))
        return await one.orders(0.0)

    orders = with_coordinator(use, min_groups=3, max_groups=8)
    assert (orders.num_groups, orders.asked_back) == (3, {4})


def test_a_run_that_is_being_started_takes_no_request() -> None:
    with pytest.raises(RunError, match="being started: ask again"):
        asyncio.run(Coordinator().ask(Stop("bot")))


@pytest.mark.parametrize(("request_", "is_pausing"), [(Pause("bot"), True), (Stop("bot"), False)])
def test_a_run_that_is_to_leave_says_the_step_that_it_holds(request_: Pause | Stop, is_pausing: bool) -> None:
    async def use(one: Coordinator) -> tuple[int, Orders]:
        return await one.ask(request_), await one.orders(0.0)

    step, orders = with_coordinator(use)
    assert (step, orders.is_stopping, orders.is_pausing) == (0, True, is_pausing)


def test_a_pause_is_not_undone_by_a_stop() -> None:
    async def use(one: Coordinator) -> Orders:
        await one.ask(Pause("bot"))
        await one.ask(Stop("bot"))
        return await one.orders(0.0)

    assert with_coordinator(use).is_pausing
