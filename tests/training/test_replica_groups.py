"""What the driver remembers of its replica groups."""

from typing import Any, cast

from tidepool.training.replica_groups import ReplicaGroup, ReplicaGroups


def test_a_group_that_has_come_is_not_pending_for_a_coordinator_that_has_heard_nobody_yet() -> None:
    groups = ReplicaGroups(lambda _: None, cast(Any, None))
    groups.running = {number: ReplicaGroup(number, cast(Any, None), cast(Any, None), 0.0) for number in (1, 2)}
    groups.note_come(frozenset({1, 7}))
    groups.note_come(frozenset())  # another coordinator
    assert [group.number for group in groups.pending()] == [2]
