"""The commit protocol, searched exhaustively: no interleaving, death or lost answer breaks it, and each weakening is found."""

from collections.abc import Callable

import pytest

from tests.checkpoint.model import Rules, search
from tidepool.checkpoint.history import Commit, Incarnation, Removal, in_order, newest_removal

SIZES = ((2, 2, 2), (2, 3, 1), (3, 1, 0))
"""Drivers, commits that each wants, answers that each may lose."""


@pytest.mark.parametrize("size", SIZES)
def test_no_order_of_events_breaks_the_protocol(size: tuple[int, int, int], record_property: Callable[[str, object], None]) -> None:
    found = search(Rules(), *size)
    assert found.broken is None, found.trace
    assert found.num_states > 5000
    record_property("states", found.num_states)


@pytest.mark.parametrize(
    ("rules", "broken"),
    [
        (Rules(commit_checks_claims=False), "lost"),
        (Rules(commit_at_next_number=False), "both"),
        (Rules(data_before_commit=False), "torn"),
        (Rules(removals_are_logged=False), "lost"),
        (Rules(numbers_are_confirmed=False), "both"),
        (Rules(put_is_conditional=False), "lost"),
    ],
)
def test_a_weaker_protocol_is_found_out(rules: Rules, broken: str) -> None:
    found = next(found for size in SIZES if (found := search(rules, *size)).broken is not None)
    assert found.broken == broken
    assert len(found.trace) > 5


def test_what_stands_at_a_removed_number_counts_for_nobody() -> None:
    old, new = Commit(1, 1, "a"), Commit(1, 2, "b")
    log = {1: Incarnation(1, None), 2: Incarnation(2, None), 3: new, 4: Removal(((2, 2),)), 6: Removal(((2, 2), (4, 4)))}
    assert in_order(log) == {1: log[1], 3: new, 6: log[6]}
    assert in_order({1: log[1], 2: old}) == {1: log[1], 2: old}
    assert newest_removal(log) == log[6]


def test_removals_are_kept_as_ranges() -> None:
    removal = Removal.of([9, 2, 3, 4, 7])
    assert removal == Removal(((2, 4), (7, 7), (9, 9)))
    assert Removal.of(removal.numbers) == removal
    assert Removal.of([]).numbers == frozenset()
