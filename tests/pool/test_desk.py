"""The arbiter's desk: what is said to it, in any order and again after it died, and what it answers. A small world without Ray."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tidepool.messages import ClusterView, Group, Node, ReplicaActor, Resources, RunReport
from tidepool.pool.desk import LISTEN_S, SILENT_S, Desk, Wish, deployment_name
from tidepool.pool.rules import Rules

CHAT = deployment_name("app", "chat")
ONE = Resources(gpus=1, cpus=1)


@dataclass
class Driver:
    """A run as its driver has it. Groups that are asked back are gone a few rounds later."""

    name: str
    least: int = 1
    most: int = 4
    session: int = 1
    rest: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    account: Any = None
    priority: int = 0

    def report(self) -> RunReport:
        values: dict[str, Any] = {"project": "p", "tier": "standard", "shards": 12} | self.rest
        groups = tuple(self.groups.values())
        return RunReport(
            run=self.name,
            session=self.session,
            store="file:///s",
            priority=self.priority,
            min_groups=self.least,
            max_groups=self.most,
            workers_per_group=1,
            worker=ONE,
            groups=groups,
            settled=frozenset(self.groups),
            account=self.account,
            **values,
        )


class World:
    """Nodes, drivers and a deployment, with the desk between them; a second passes in each round."""

    def __init__(self, *gpus: int, rules: Rules | None = None) -> None:
        self.nodes = tuple(Node(f"n{number}", "H100", count, 4 * count) for number, count in enumerate(gpus))
        self.rules, self.now_s, self.epoch = rules or Rules(), 1_000_000.0, 0
        self.desk = Desk(self.rules, "0", self.now_s)
        self.drivers: dict[str, Driver] = {}
        self.others: dict[str, int] = {}
        self.replicas: list[ReplicaActor] = []
        self.wanted: int | None = None
        self.needed: int | None = None  # as many as wanted
        self.num_replicas_started = 0

    def add(self, name: str, **rest: Any) -> Driver:
        self.drivers[name] = Driver(name, **rest)
        return self.drivers[name]

    def restart(self) -> None:
        """Another desk that knows nothing."""
        self.epoch += 1
        self.desk = Desk(self.rules, str(self.epoch), self.now_s)

    def used(self, node: str) -> int:
        groups = sum(group.places == ((node, 1),) for driver in self.drivers.values() for group in driver.groups.values())
        return groups + self.others.get(node, 0) + sum(one.node == node for one in self.replicas)

    def view(self) -> ClusterView:
        free = {node.name: Resources(node.gpus - self.used(node.name), node.cpus - self.used(node.name)) for node in self.nodes}
        return ClusterView(self.nodes, free, tuple(self.replicas), (), frozenset(self.drivers))

    def round(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        self.desk.see_cluster(self.view(), self.now_s)
        if self.wanted is not None:
            needed = self.wanted if self.needed is None else self.needed
            self.desk.see_wish(CHAT, Wish("serving", 0, ONE, self.wanted, needed, self.now_s))
        for driver in self.drivers.values():
            self.desk.see_run(driver.report(), self.now_s)
        self.desk.decide(self.now_s)
        for driver in self.drivers.values():
            self._obey(driver)
        self._serve()
        for node in self.nodes:
            assert self.used(node.name) <= node.gpus

    def _obey(self, driver: Driver) -> None:
        standing = self.desk.standing(driver.name)
        assert standing is not None
        driver.account, driver.priority = standing.account, standing.priority
        for name, group in list(driver.groups.items()):
            if group.leaving:
                del driver.groups[name]
            elif name in dict(standing.leave):
                driver.groups[name] = replace(group, leaving=True)
        for grant in standing.grants:
            if grant.name not in driver.used:
                driver.used.add(grant.name)
                driver.groups[grant.name] = Group(grant.name, grant.places, self.now_s)

    def _serve(self) -> None:
        """What Serve does: starts a replica where there is a place, ends those that are not allowed."""
        allowed = self.desk.allowed(CHAT)
        if self.wanted is None or allowed is None:
            return
        while len(self.replicas) > allowed:
            self.replicas.pop()
        for node in self.nodes:
            is_open = node.name not in self.desk.quarantined
            while is_open and len(self.replicas) < allowed and self.used(node.name) < node.gpus:
                self.num_replicas_started += 1
                self.replicas.append(ReplicaActor("app", "chat", f"r{self.num_replicas_started}", node.name, True, ONE))

    def sizes(self) -> dict[str, int]:
        return {name: len(driver.groups) for name, driver in self.drivers.items()}


def rounds(world: World, number: int) -> None:
    for _ in range(number):
        world.round()


def test_a_run_gets_all_that_is_free() -> None:
    world = World(2, 2)
    world.add("a")
    rounds(world, 3)
    assert world.sizes() == {"a": 4}


def test_serving_takes_places_and_training_takes_them_back_at_once() -> None:
    world = World(4)
    world.add("a")
    rounds(world, 3)
    world.wanted = 2
    rounds(world, 4)
    assert (world.sizes(), len(world.replicas)) == ({"a": 2}, 2)
    world.wanted = 0
    rounds(world, 3)
    assert (world.sizes(), len(world.replicas)) == ({"a": 4}, 0)


def test_a_run_below_its_min_is_paused_and_comes_back() -> None:
    world = World(2)
    run = world.add("a", least=2)
    rounds(world, 3)
    world.wanted = 1
    rounds(world, 4)
    assert (world.sizes(), len(world.replicas)) == ({"a": 0}, 1)
    standing = world.desk.standing("a")
    assert standing is not None
    assert (standing.place, standing.num_queued) == (1, 1)
    assert "do not fit" in standing.reason
    assert run.account.waiting_since_s is not None
    world.wanted = 0
    rounds(world, 4)
    assert world.sizes() == {"a": 2}
    assert run.account.waiting_since_s is None


def test_the_queue_is_in_the_order_of_the_policy() -> None:
    world = World(1)
    world.add("first", rest={"tier": "premium"})
    rounds(world, 3)
    world.add("basic", rest={"tier": "basic"})
    world.add("standard")
    rounds(world, 2)
    places = {name: standing.place for name in world.drivers if (standing := world.desk.standing(name))}
    assert places == {"first": None, "standard": 1, "basic": 2}


def test_a_priority_is_carried_by_the_run() -> None:
    world = World(1)
    run = world.add("a")
    rounds(world, 2)
    assert world.desk.set_priority("a", 7)
    world.round()
    world.restart()
    world.round()
    standing = world.desk.standing("a")
    assert standing is not None
    assert run.priority == standing.priority == 7
    assert not world.desk.set_priority("nobody", 1)


def test_what_others_hold_is_no_room() -> None:
    world = World(4)
    world.others["n0"] = 3
    world.add("a")
    rounds(world, 3)
    assert world.sizes() == {"a": 1}
    world.others["n0"] = 1
    rounds(world, 3)
    assert world.sizes() == {"a": 3}


def test_no_second_group_goes_for_a_replica_whose_place_ray_has_given_and_not_named_yet() -> None:
    world = World(4)
    world.replicas = [ReplicaActor("app", "chat", "r1", "n0", True, ONE)]
    world.add("a")
    rounds(world, 3)
    assert world.sizes() == {"a": 3}
    world.replicas.append(ReplicaActor("app", "chat", "r2", "", False, ONE))
    while world.sizes() == {"a": 3}:
        world.round()
    world.others["n0"] = 1  # Ray's accounts have it as soon as there is room; its table of actors, once the process runs
    rounds(world, 10)
    assert world.sizes() == {"a": 2}
    world.others["n0"], world.replicas[1] = 0, ReplicaActor("app", "chat", "r2", "n0", True, ONE)
    rounds(world, 3)
    assert world.sizes() == {"a": 2}
    world.replicas.append(ReplicaActor("app", "chat", "r3", "", False, ONE))
    rounds(world, 3)
    assert world.sizes() == {"a": 1}, "one that pends while all is held by who is known gets a place"


def test_what_somebody_else_has_taken_meanwhile_is_a_replicas_place_for_a_while_only() -> None:
    world = World(2)
    world.add("a", most=1)
    rounds(world, 3)
    world.others["n0"] = 1
    world.replicas.append(ReplicaActor("app", "chat", "r1", "", False, ONE))
    rounds(world, 10)
    assert world.sizes() == {"a": 1}
    rounds(world, 40)
    assert world.sizes() == {"a": 0}


def test_a_desk_that_starts_anew_listens_first() -> None:
    world = World(4)
    world.add("a")
    rounds(world, 3)
    held = dict(world.drivers["a"].groups)
    world.restart()
    late = world.drivers.pop("a")
    world.add("b")
    view = replace(world.view(), runs=frozenset({"a", "b"}), free={"n0": Resources(0, 12)})
    world.desk.see_cluster(view, world.now_s)
    world.desk.see_run(world.drivers["b"].report(), world.now_s)
    assert not world.desk.decide(world.now_s)  # `a` has a driver, and has not been heard of
    world.drivers["a"] = late
    rounds(world, 3)
    assert late.groups.items() <= held.items(), "what it has stays its own"
    assert world.sizes() == {"a": 3, "b": 1}


def test_it_does_not_listen_for_ever() -> None:
    world = World(1)
    run = world.add("a")
    world.desk.see_cluster(replace(world.view(), runs=frozenset({"a", "stuck"})), world.now_s)
    world.desk.see_run(run.report(), world.now_s)
    assert not world.desk.decide(world.now_s + LISTEN_S)
    assert world.desk.decide(world.now_s + LISTEN_S + 0.1)


def test_the_places_of_a_driver_that_died_are_free_again() -> None:
    world = World(2)
    world.add("a")
    rounds(world, 3)
    del world.drivers["a"]
    world.add("b")
    rounds(world, int(SILENT_S) + 3)
    assert world.sizes() == {"b": 2}


def test_a_new_driver_takes_the_place_of_the_old_one_and_keeps_its_account() -> None:
    world = World(2)
    world.add("a")
    rounds(world, 100)
    world.drivers["a"] = Driver("a", session=2)
    world.round()
    account = world.drivers["a"].account
    assert account.held_s == pytest.approx(98, abs=3)
    assert account.submitted_s == pytest.approx(1_000_001)
    assert not world.desk.see_run(replace(world.drivers["a"].report(), session=1), world.now_s)


def test_a_run_that_leaves_holds_its_places_until_its_groups_are_gone() -> None:
    world = World(2)
    run = world.add("a")
    rounds(world, 3)
    run.most = 0
    world.add("b")
    world.desk.see_run(run.report(), world.now_s)
    rounds(world, 2)
    assert world.sizes() == {"a": 2, "b": 0}
    run.groups.clear()
    rounds(world, 3)
    assert world.sizes() == {"a": 0, "b": 2}


def test_a_quarantined_node_is_vacated() -> None:
    world = World(2, 2)
    world.add("a")
    rounds(world, 3)
    world.desk.quarantined = {"n1": "it burns"}
    rounds(world, 3)
    assert {group.places[0][0] for group in world.drivers["a"].groups.values()} == {"n0"}
    world.desk.quarantined = {}
    rounds(world, 3)
    assert world.sizes() == {"a": 4}


def test_serving_keeps_its_replicas_while_serve_moves_them_off_a_quarantined_node() -> None:
    world = World(2, 2)
    world.wanted = 2
    rounds(world, 3)
    world.add("a")
    rounds(world, 3)
    assert ({one.node for one in world.replicas}, world.sizes()) == ({"n0"}, {"a": 2})
    world.desk.quarantined = {"n0": "it burns"}
    world.round()
    assert world.desk.allowed(CHAT) == 2
    world.replicas.pop()  # which Serve ends first is Serve's to choose; the place of the other is made before
    rounds(world, 3)
    world.replicas = [one for one in world.replicas if one.node == "n1"]
    rounds(world, 3)
    assert ([one.node for one in world.replicas], world.sizes()) == (["n1", "n1"], {"a": 0})


def test_who_gave_room_to_another_run_waits_before_it_grows_again() -> None:
    rules = Rules(tenure_s=10.0, cooldown_s=60.0)
    world = World(8, rules=rules)
    world.add("large", most=8, rest={"shards": 8})
    rounds(world, 12)
    assert world.sizes() == {"large": 8}
    world.add("small", most=2, rest={"shards": 8})
    rounds(world, 15)
    assert world.sizes()["small"] >= 1
    assert world.drivers["large"].account.resized_s <= world.now_s


def test_a_premium_run_below_its_min_takes_replicas_that_traffic_does_not_need() -> None:
    world = World(4)
    world.wanted = world.needed = 4
    rounds(world, 3)
    world.add("standard", least=2)
    run = world.add("premium", least=2, rest={"tier": "premium"})
    rounds(world, 3)
    assert world.sizes() == {"standard": 0, "premium": 0}
    world.needed = 1
    rounds(world, 4)
    assert (world.sizes(), len(world.replicas)) == ({"standard": 0, "premium": 2}, 2)
    run.least = run.most = 4  # its min does not fit beside what is needed
    rounds(world, 4)
    assert len(world.replicas) == 2
    world.needed = 3
    rounds(world, 4)
    assert len(world.replicas) == 3


@pytest.mark.parametrize("seed", range(40))
def test_random_lives(seed: int) -> None:
    """Runs come and go, traffic rises and falls, the desk dies: no place is given twice (see `round`), and in the end none is idle."""
    chance = random.Random(seed)
    world = World(*(chance.choice([1, 2, 4]) for _ in range(chance.randint(1, 4))))
    total = sum(node.gpus for node in world.nodes)
    for number in range(120):
        match chance.randrange(12):
            case 0 if len(world.drivers) < 4:
                least = chance.randint(1, max(1, total // 2))
                tier = chance.choice(["premium", "standard", "basic"])
                world.add(f"r{number}", least=least, most=least + chance.randint(0, 4), rest={"tier": tier})
            case 1 if world.drivers:
                world.drivers.pop(chance.choice(sorted(world.drivers)))
            case 2:
                world.wanted = chance.randint(0, total)
            case 3:
                world.restart()
            case 4 if world.drivers:
                driver = world.drivers[chance.choice(sorted(world.drivers))]
                if driver.groups:
                    driver.groups.pop(chance.choice(sorted(driver.groups)))  # it died
        world.round(chance.choice([0.1, 1.0, 5.0]))
    world.wanted = world.wanted and min(world.wanted, total - 1)
    world.drivers = {"last": Driver("last", most=total, rest={"shards": 64})}
    rounds(world, 30)
    assert len(world.replicas) == (world.wanted or 0)
    assert world.sizes() == {"last": total - len(world.replicas)} or total - len(world.replicas) - world.sizes()["last"] < 2
