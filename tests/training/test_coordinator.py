"""What a coordinator answers to who asks something of its run. Its decisions about quorums are tested in test_quorum.py."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from tidepool.errors import RunError
from tidepool.messages import Pause, Resize, Stop
from tidepool.training.coordinator import Beginning, Coordinator, Orders
from tidepool.training.membership import Process, Report, WorkerId
from tidepool.training.quorum import Rules
from tidepool.training.quorum_events import Claimed, Probe

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


def test_a_run_has_as_many_groups_as_asked_for_within_its_bounds() -> None:
    async def use(one: Coordinator) -> list[int]:
        return [await one.ask(Resize("bot", wanted)) for wanted in (3, 1, 9)]

    assert with_coordinator(use, min_groups=2) == [3, 2, 4]


def test_a_run_that_is_being_started_takes_no_request() -> None:
    with pytest.raises(RunError, match="being started: ask again"):
        asyncio.run(Coordinator().ask(Stop("bot")))


def test_a_worker_that_commits_while_a_coordinator_is_being_started_gets_its_account_afterwards() -> None:
    async def run() -> tuple[bool, dict[str, Any]]:
        coordinator = Coordinator()
        asked = asyncio.create_task(coordinator.account())
        await asyncio.sleep(0)
        is_early = asked.done()
        await coordinator.begin(Beginning(1, Claimed(1, None, 0), 0, 1, 4, 0, {}, Rules()))
        return is_early, await asked

    is_early, account = asyncio.run(run())
    assert not is_early
    assert account


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


def place(group: int, phase: str = "step", **rest: Any) -> Report:
    """What a worker on a node of its own reports."""
    process = Process(100 + group, f"node-{group}", "127.0.0.1", "/library")
    return Report(WorkerId(group, 0), 2, 1, "127.0.0.1:9", phase=phase, session=1, process=process, **rest)


def test_deaths_are_told_by_node_but_not_of_who_was_to_leave_or_has_ended_well() -> None:
    async def use(one: Coordinator) -> Orders:
        for group, phase in ((1, "step"), (2, "step"), (3, "gone"), (4, "step")):
            await one.report(place(group, phase))
        await one.release((2,))
        for group in (1, 2, 3):
            await one.group_ended(group, (0,))
        await one.group_ended(4)
        return await one.orders(0.0)

    deaths = with_coordinator(use).deaths
    assert [(death.worker, death.node) for death in deaths] == [("1/1.0", "node-1")]
    assert abs(deaths[0].at_s - time.time()) < 60


def test_a_process_that_refuses_connections_has_died() -> None:
    async def use(one: Coordinator) -> Orders:
        await one.report(place(1))
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        one._act(Probe(WorkerId(1, 0), address))
        await one._probes[WorkerId(1, 0)]
        return await one.orders(0.0)

    assert [death.node for death in with_coordinator(use).deaths] == ["node-1"]
