"""Process groups that are made and left: connecting and exchanging are interrupted, and what comes after works."""

import threading
from collections.abc import Callable

import pytest
import torch

from tidepool.training.group import Group, QuorumLost
from tidepool.training.process_group import MeetingPoint, ProcessGroup, StagedGroup

CPU = torch.device("cpu")
WAIT_S = 60


@pytest.fixture(scope="module")
def points() -> list[MeetingPoint]:
    """Three workers' meeting points; the first is where they meet."""
    return [MeetingPoint("127.0.0.1") for _ in range(3)]


def together(*members: Callable[[], None]) -> None:
    """Run these at the same time; raises the first error of any."""
    errors: list[BaseException] = []

    def run(member: Callable[[], None]) -> None:
        try:
            member()
        except BaseException as error:  # noqa: BLE001  (a thread's error must reach the test)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(member,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def connect(points: list[MeetingPoint], name: str, rank: int, size: int, check: Callable[[], None] = lambda: None) -> Group:
    return points[rank].connect(name, points[0].address, rank, size, CPU, check)


def sum_up(group: Group, size: int) -> None:
    values = torch.ones(3)
    group.all_reduce(values)
    assert values.tolist() == [size] * 3


def test_a_group_is_met_though_an_earlier_one_was_waited_for_in_vain(points: list[MeetingPoint]) -> None:
    begun, over = threading.Barrier(2), threading.Event()

    def wait_in_vain(rank: int) -> None:
        is_first = True

        def check() -> None:
            nonlocal is_first
            if is_first:
                begun.wait(WAIT_S)
                is_first = False
            if over.wait(0.2):
                raise QuorumLost("over")
            over.set()

        with pytest.raises(QuorumLost):
            connect(points, "in-vain", rank, 3, check)

    together(lambda: wait_in_vain(0), lambda: wait_in_vain(1))
    together(lambda: sum_up(connect(points, "next", 0, 2), 2), lambda: sum_up(connect(points, "next", 1, 2), 2))


def test_an_exchange_with_a_silent_peer_ends_when_the_quorum_is_over_and_the_others_go_on(points: list[MeetingPoint]) -> None:
    over, have_met = threading.Event(), threading.Barrier(3)

    def check() -> None:
        if over.is_set():
            raise QuorumLost("over")

    def exchange(rank: int) -> None:
        group = connect(points, "silent", rank, 3, check)
        sum_up(group, 3)
        have_met.wait(WAIT_S)
        if rank == 2:
            over.set()  # and says nothing more
            return
        with pytest.raises(QuorumLost):
            group.all_reduce(torch.ones(3))

    together(*(lambda rank=rank: exchange(rank) for rank in range(3)))  # type: ignore[misc]
    together(lambda: sum_up(connect(points, "without", 0, 2), 2), lambda: sum_up(connect(points, "without", 1, 2), 2))


@pytest.mark.parametrize("is_staged", [False, True])
def test_state_and_slices_arrive_where_they_should(points: list[MeetingPoint], is_staged: bool) -> None:
    def exchange(rank: int) -> None:
        group = connect(points, f"all {is_staged}", rank, 3)
        if is_staged:  # as between workers that share a GPU; here the tensors are in host memory already
            assert isinstance(group, ProcessGroup)
            group = StagedGroup(group)
        values = torch.full((4,), float(rank))
        group.broadcast(values, 1)
        assert values.tolist() == [1.0] * 4
        received = group.all_to_all(torch.arange(3.0) + 10 * rank, [1, 1, 1], [1, 1, 1])
        assert received.tolist() == [rank, rank + 10, rank + 20]
        whole = torch.empty(6)
        group.all_gather(torch.full((2,), float(rank)), whole)
        assert whole.tolist() == [0, 0, 1, 1, 2, 2]

    together(*(lambda rank=rank: exchange(rank) for rank in range(3)))  # type: ignore[misc]
