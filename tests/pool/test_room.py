from dataclasses import replace

import pytest

from tests.pool.pools import nodes
from tidepool.messages import Node, Resources, Template
from tidepool.pool.room import Room, units_of


def room_of(*parts: Node) -> Room:
    room = Room(parts)
    room.settle()
    return room


def place(room: Room, workers: int, worker: Resources | None = None, prefers_spot: bool = False) -> dict[str, int]:
    options = room.options(worker or Resources(1, 1), frozenset(), None, prefers_spot)
    spots = room.take(room.idle, options, 1, workers)
    return dict(room.names(spots[0])) if spots else {}


def test_a_gang_goes_to_the_fullest_node_that_holds_it_whole() -> None:
    assert place(room_of(*nodes(8, 4, 2)), 3) == {"n1": 3}


def test_a_gang_too_large_for_a_node_takes_as_few_as_it_can() -> None:
    assert place(room_of(*nodes(2, 8, 4, 8)), 16) == {"n1": 8, "n3": 8}
    assert place(room_of(*nodes(8, 4, 2)), 10) == {"n0": 8, "n2": 2}


def test_a_gang_stays_in_one_domain_where_that_takes_no_more_nodes() -> None:
    racks = [replace(node, domain=f"rack{number % 2}") for number, node in enumerate(nodes(8, 8, 8, 8, 4))]
    found = place(room_of(*racks), 16)
    assert {racks[int(name[1:])].domain for name in found} in ({"rack0"}, {"rack1"})
    assert len(found) == 2


def test_few_nodes_count_for_more_than_one_domain() -> None:
    racks = [replace(node, domain=f"rack{number}") for number, node in enumerate(nodes(8, 8))]
    racks += [Node(f"m{number}", "H100", 4, 32, domain="rack9") for number in range(4)]
    assert place(room_of(*racks), 16) == {"n0": 8, "n1": 8}


def test_a_worker_is_never_split_over_nodes() -> None:
    assert place(room_of(*nodes(3, 3)), 1, Resources(4, 1)) == {}
    assert place(room_of(*nodes(3, 3)), 2, Resources(3, 1)) == {"n0": 1, "n1": 1}


def test_gangs_never_mix_kinds() -> None:
    mixed = room_of(*nodes(2), Node("a0", "A100", 2, 16))
    assert place(mixed, 3) == {}
    assert len(place(mixed, 2)) == 1


def test_spot_and_on_demand_nodes_of_a_kind_can_be_mixed_and_the_preferred_come_first() -> None:
    both = [*nodes(2), *nodes(2, is_spot=True)]
    assert place(room_of(*both), 1) == {"n0": 1}
    assert place(room_of(*both), 1, prefers_spot=True) == {"s0": 1}
    assert place(room_of(*both), 4) == {"n0": 2, "s0": 2}


def test_what_is_taken_is_taken() -> None:
    room = room_of(*nodes(2))
    assert place(room, 2) == {"n0": 2}
    assert place(room, 1) == {}


def test_a_node_with_a_notice_gives_no_room() -> None:
    assert place(room_of(replace(nodes(4)[0], leaves_at_s=100.0)), 1) == {}


@pytest.mark.parametrize(
    ("worker", "gpus", "cpus", "units"),
    [
        (Resources(1, 1), 8, 64, 1),
        (Resources(1, 16), 8, 64, 2),  # its CPUs are those of two GPUs
        (Resources(2, 1), 8, 64, 2),
        (Resources(9, 1), 8, 64, 0),
        (Resources(0, 3), 0, 16, 3),
        (Resources(0, 3), 8, 64, 0),  # no GPU is stranded for want of CPUs
        (Resources(1, 1), 0, 64, 0),
    ],
)
def test_units(worker: Resources, gpus: int, cpus: int, units: int) -> None:
    assert units_of(worker, Template("t", "H100", gpus, cpus, 1)) == units
