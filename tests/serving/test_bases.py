"""Which bases get a deployment and which go: a new one takes over when it runs, and no answer of an old one is cut."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from tidepool.models.source import ModelSource
from tidepool.serving.bases import KEEP_S, QUIET_S, RETRY_S, Bases, Deploy, Remove, Ring, Seen, Step

A, B, C = "a" * 12, "b" * 12, "c" * 12


class World:
    """What Serve and the registry say, as the steps are done."""

    def __init__(self, *named: str, first: tuple[str, ...] = (A,), deployed: tuple[str, ...] = ()) -> None:
        self.named, self.deployed = set(named), dict.fromkeys(deployed, False)
        self.replicas: dict[str, bool] = {}
        self.now = 100.0
        self.first = first
        self.bases = Bases(first)

    def round(self, after_s: float = 1.0) -> list[Step]:
        """One round; what is to be done is done, but for replicas."""
        self.now += after_s
        steps = self.bases.decide(Seen({one: source(one) for one in self.named}, dict(self.deployed), dict(self.replicas)), self.now)
        for step in steps:
            match step:
                case Deploy(base):
                    self.deployed.setdefault(base.digest[:12], False)
                    self.bases.note_deployed(base.digest[:12])
                case Remove(one):
                    del self.deployed[one]
                    self.replicas.pop(one, None)
        return steps

    def rounds(self, seconds: float) -> list[Step]:
        return [step for _ in range(round(seconds)) for step in self.round()]


def source(one: str) -> ModelSource:
    return ModelSource(one, one * 5)


def test_what_is_named_is_deployed_and_offered_at_once_where_nothing_could_answer_instead() -> None:
    world = World(A, B, first=(A, B))
    assert world.round() == [Deploy(source(A)), Deploy(source(B))]
    assert world.bases.offered == {A, B}
    assert world.rounds(100) == [], "no replica is asked for: there may be none until there is traffic"


def test_a_new_base_is_asked_for_a_replica_and_the_old_one_stays_until_it_has_one() -> None:
    world = World(A)
    world.round()
    world.replicas = {A: True}
    world.named = {B}
    assert world.round() == [Deploy(source(B))]
    assert world.rounds(100) == [Ring(B)] * 100
    assert world.bases.offered == {A, B}
    world.replicas[B] = False
    assert world.rounds(KEEP_S) == []
    assert world.bases.offered == {A, B}, "gateways may be behind, and somebody may go back"
    assert world.rounds(200) == [], "it still has something to do"
    assert world.bases.offered == {B}
    world.replicas[A] = False
    assert world.rounds(QUIET_S) == []
    assert world.round() == [Remove(A)]
    assert world.rounds(100) == []


def test_going_back_while_both_are_there_costs_nothing_and_later_another_start() -> None:
    world = World(A)
    world.round()
    world.named, world.replicas = {B}, {A: False, B: False}
    world.rounds(KEEP_S)
    world.named = {A}
    assert world.rounds(KEEP_S) == []
    assert world.bases.offered == {A, B}
    assert world.rounds(2 + QUIET_S) == [Remove(B)]
    world.named = {B}
    assert world.round() == [Deploy(source(B))]


def test_a_base_that_cannot_be_started_is_tried_again_and_one_that_ran_is_serves_to_mend() -> None:
    world = World(A)
    world.round()
    world.replicas = {A: False}
    world.named = {A, B}
    world.round()
    world.deployed[B] = world.deployed[A] = True
    steps = [step for step in world.rounds(RETRY_S + 2) if not isinstance(step, Ring)]
    assert steps == [Remove(B), Deploy(source(B))]


def test_whoever_starts_anew_finds_what_there_is_and_makes_sure_that_it_is_as_the_spec_says() -> None:
    world = World(B, deployed=(A, B))
    world.replicas = {A: False, B: True}
    assert world.round() == [Deploy(source(B))]
    assert world.rounds(KEEP_S + QUIET_S + 2) == [Remove(A)], "what another one had not come to"


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from([A, B, C]), min_size=1), st.dictionaries(st.sampled_from([A, B, C]), st.booleans()), st.integers(1, 30)
        )
    )
)
def test_what_is_named_or_busy_is_never_removed(changes: list[tuple[set[str], Mapping[str, bool], int]]) -> None:
    world = World(A)
    for named, replicas, seconds in changes:
        world.named = named
        for _ in range(seconds):
            world.replicas = {one: is_busy for one, is_busy in replicas.items() if one in world.deployed}
            before = dict(world.deployed)
            steps = world.round()
            assert {step.base.digest[:12] for step in steps if isinstance(step, Deploy)} >= named - before.keys()
            for step in steps:
                if isinstance(step, Remove):
                    assert step.base_id not in named
                    assert not replicas.get(step.base_id)
            assert named <= world.bases.offered
