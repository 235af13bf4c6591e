"""Which commits count: rules of the chain, as properties of random histories."""

from hypothesis import given
from hypothesis import strategies as st

from tidepool.checkpoint.chain import Commit, Incarnation, visible_commits


def commit(incarnation: int, step: int, attempt: str = "a") -> Commit:
    return Commit(incarnation, step, attempt)


def test_a_fallback_writes_the_steps_after_it_anew() -> None:
    """Commit 100 is damaged, so incarnation 2 starts from 90; both write step 100, and only the second one counts."""
    commits = [commit(1, 80), commit(1, 90), commit(1, 100), commit(2, 100, "b"), commit(2, 110)]
    incarnations = [Incarnation(1, None), Incarnation(2, commit(1, 90))]
    assert visible_commits(incarnations, commits) == [commit(2, 110), commit(2, 100, "b"), commit(1, 90), commit(1, 80)]


def test_a_start_from_scratch_forgets_what_was_before() -> None:
    assert visible_commits([Incarnation(1, None), Incarnation(2, None)], [commit(1, 10), commit(2, 5)]) == [commit(2, 5)]


def test_a_late_commit_of_an_old_driver_counts_for_nobody() -> None:
    incarnations = [Incarnation(1, None), Incarnation(2, commit(1, 10))]
    assert visible_commits(incarnations, [commit(1, 10), commit(1, 20)]) == [commit(1, 10)]


def test_an_incarnation_that_was_fallen_back_past_is_off_the_history() -> None:
    incarnations = [Incarnation(1, None), Incarnation(2, commit(1, 10)), Incarnation(3, commit(1, 10))]
    assert visible_commits(incarnations, [commit(1, 10), commit(2, 20), commit(3, 15)]) == [commit(3, 15), commit(1, 10)]


def test_without_an_incarnation_nothing_counts() -> None:
    assert visible_commits([], [commit(1, 10)]) == []


def test_names_are_parsed_and_other_objects_are_ignored() -> None:
    assert Commit.parse("3-12-abc") == commit(3, 12, "abc")
    assert Commit.parse(commit(3, 12, "abc").name) == commit(3, 12, "abc")
    assert [Commit.parse(name) for name in ("", "3-12", "x-1-a", "3-12-xyz", "3-12-abc.json")] == [None] * 5


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Incarnation], list[Commit], list[Commit]]:
    """Incarnations that each start from a commit that counted then; every commit written; those that counted at the end."""
    incarnations: list[Incarnation] = []
    commits: list[Commit] = []
    counting: list[Commit] = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        kept = draw(st.integers(0, len(counting)))
        counting = counting[:kept]
        base = counting[-1] if counting else None
        incarnations.append(Incarnation(number, base))
        step = base.step if base else 0
        for _ in range(draw(st.integers(0, 4))):
            step += draw(st.integers(1, 3))
            commits.append(commit(number, step))
            counting.append(commits[-1])
    return incarnations, commits, counting


@given(histories(), st.randoms())
def test_what_counts_is_the_one_history(history: tuple[list[Incarnation], list[Commit], list[Commit]], random: object) -> None:
    incarnations, commits, counting = history
    random.shuffle(commits)  # type: ignore[attr-defined]
    assert visible_commits(incarnations, commits) == counting[::-1]
