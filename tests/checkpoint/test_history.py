"""Which commits count: the rules of a run's log, and properties of random logs."""

from hypothesis import given
from hypothesis import strategies as st

from tidepool.checkpoint.history import Commit, Entry, Incarnation, newest_incarnation, visible_commits


def commit(incarnation: int, step: int, attempt: str = "a") -> Commit:
    return Commit(incarnation, step, attempt)


def test_a_fallback_writes_the_steps_after_it_anew() -> None:
    """Commit 100 is damaged, so incarnation 2 starts from 90; both write step 100, and only the second one counts."""
    log = [Incarnation(1, None), commit(1, 80), commit(1, 90), commit(1, 100), Incarnation(2, commit(1, 90))]
    log += [commit(2, 100, "b"), commit(2, 110)]
    assert visible_commits(log) == [commit(2, 110), commit(2, 100, "b"), commit(1, 90), commit(1, 80)]


def test_a_start_from_scratch_forgets_what_was_before() -> None:
    assert visible_commits([Incarnation(1, None), commit(1, 10), Incarnation(2, None), commit(2, 5)]) == [commit(2, 5)]


def test_a_late_commit_of_an_old_driver_counts_for_nobody() -> None:
    log = [Incarnation(1, None), commit(1, 10), Incarnation(2, commit(1, 10)), commit(1, 20)]
    assert visible_commits(log) == [commit(1, 10)]


def test_an_incarnation_that_was_fallen_back_past_is_off_the_history() -> None:
    log = [Incarnation(1, None), commit(1, 10), Incarnation(2, commit(1, 10)), commit(2, 20), Incarnation(3, commit(1, 10)), commit(3, 15)]
    assert visible_commits(log) == [commit(3, 15), commit(1, 10)]


def test_a_base_that_retention_removed_still_says_how_far_its_claim_went_back() -> None:
    log = [Incarnation(1, None), commit(1, 5), commit(1, 20), Incarnation(2, commit(1, 10)), commit(2, 12)]
    assert visible_commits(log) == [commit(2, 12), commit(1, 5)]


def test_without_a_claim_nothing_counts() -> None:
    assert visible_commits([]) == []
    assert visible_commits([commit(1, 10)]) == []
    assert newest_incarnation([commit(1, 10)]) == 0


def test_names_are_parsed_and_other_objects_are_ignored() -> None:
    assert Commit.parse("3-12-abc") == commit(3, 12, "abc")
    assert Commit.parse(commit(3, 12, "abc").name) == commit(3, 12, "abc")
    assert [Commit.parse(name) for name in ("", "3-12", "x-1-a", "3-12-xyz", "3-12-abc.json")] == [None] * 5


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Entry], list[Commit]]:
    """A log in which each claim starts from a commit that counted then and older drivers commit late; what counts at its end."""
    log: list[Entry] = []
    counting: list[Commit] = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        counting = counting[: draw(st.integers(0, len(counting)))]
        base = counting[-1] if counting else None
        log.append(Incarnation(number, base))
        step = base.step if base else 0
        for _ in range(draw(st.integers(0, 4))):
            step += draw(st.integers(1, 3))
            late = draw(st.integers(1, number))
            log.append(commit(late, step))
            counting += [commit(late, step)] if late == number else []
    return log, counting


@given(logs())
def test_what_counts_is_the_one_history(log: tuple[list[Entry], list[Commit]]) -> None:
    entries, counting = log
    assert visible_commits(entries) == counting[::-1]
    assert newest_incarnation(entries) == max(entry.number for entry in entries if isinstance(entry, Incarnation))


@given(logs(), st.data())
def test_removing_old_commits_from_the_log_changes_nothing_for_the_others(
    log: tuple[list[Entry], list[Commit]], data: st.DataObject
) -> None:
    entries, counting = log
    kept = counting[len(counting) - data.draw(st.integers(0, len(counting))) :]
    rest = [entry for entry in entries if isinstance(entry, Incarnation) or entry in kept or entry not in counting]
    assert visible_commits(rest) == kept[::-1]


def test_a_stopped_writer_that_wakes_up_and_commits_an_older_step_does_not_turn_the_run_back() -> None:
    newer, older = Commit(1, 20, "b"), Commit(1, 10, "a")
    assert visible_commits([Incarnation(1, None), newer, older]) == [newer, older]
