"""Which nodes are checked when, and which end up in quarantine: the state machine under good checks, bad nodes and lying checks."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.messages import Node, Resources, RunReport, Straggler, WorkerDeath
from tidepool.pool.health import CallOff, Check, Decision, Health, Rules, Word

RULES = Rules()
GOOD: dict[str, Any] = {
    "disks": [{"folder": "/tmp", "free_bytes": 10**11, "total_bytes": 10**12}],
    "gpus": None,
    "rates": {"the CPU": 1e10},
    "wrong": [],
    "exchange": None,
}
FULL = GOOD | {"disks": [{"folder": "/tmp", "free_bytes": 10**6, "total_bytes": 10**12}]}
SLOW = GOOD | {"rates": {"the CPU": 4e9}}
RATE = {"exchange": 1e9}


class Pool:
    """A pool whose checks answer what the test says, in a time that it makes pass. `answers` are by node; None: the check hangs."""

    def __init__(self, num_nodes: int, health: Health | None = None, **answers: Any) -> None:
        self.nodes = [Node(f"n{number}", "cpu", 0, 4) for number in range(num_nodes)]
        self.health, self.now_s = health or Health(RULES), 1_000_000.0
        self.used: set[str] = set()
        self.reports: list[RunReport] = []
        self.answers: dict[str, Any] = answers
        self.pairs: dict[frozenset[str], Any] = {}
        self.checked: list[tuple[float, tuple[str, ...]]] = []
        self.words: list[Word] = []
        self._running: dict[int, Check] = {}

    def step(self, seconds: float = 1.0) -> list[Decision]:
        """Let time pass, then let the machine see the pool, and let the checks answer that it has begun before."""
        self.now_s += seconds
        decisions: list[Decision] = []
        for number, check in list(self._running.items()):
            answer = self.pairs.get(frozenset(check.nodes), RATE) if len(check.nodes) > 1 else self.answers.get(check.nodes[0], GOOD)
            if answer is not None:
                del self._running[number]
                problem = answer if isinstance(answer, str) else ""
                decisions += self.health.answer(number, None if problem else answer, problem, self.now_s)
        decisions += self.health.observe(self.nodes, frozenset(self.used), self.reports, self.now_s)
        for decision in decisions:
            match decision:
                case Check(number, nodes):
                    assert not self.used & set(nodes), "a check beside a run"
                    assert not any(set(nodes) & set(other.nodes) for other in self._running.values()), "two checks on a node"
                    self.checked.append((self.now_s, nodes))
                    self._running[number] = decision
                case CallOff(number):
                    del self._running[number]
                case Word():
                    self.words.append(decision)
        return decisions

    def live(self, seconds: float) -> "Pool":
        for _ in range(math.ceil(seconds)):
            self.step()
        return self

    @property
    def quarantined(self) -> dict[str, str]:
        return {name: one.kind for name, one in self.health.quarantined.items()}

    def num_checks(self, node: str) -> int:
        return sum(nodes == (node,) for _, nodes in self.checked)


def report(deaths: Iterable[WorkerDeath] = (), stragglers: Iterable[Straggler] = (), run: str = "tides") -> RunReport:
    return RunReport(
        run, 1, "file:///store", "p", "standard", 0, 1, 2, 4, 1, Resources(), deaths=tuple(deaths), stragglers=tuple(stragglers)
    )


def deaths(node: str, times: int, at_s: float, prefix: str = "1") -> list[WorkerDeath]:
    return [WorkerDeath(f"{prefix}/{number}.0", node, at_s + number) for number in range(times)]


# --- When nodes are checked -----------------------------------------------------------------------------------------------


def test_a_node_is_checked_when_it_joins_and_held_back_until_it_has_passed() -> None:
    pool = Pool(3)
    pool.step()
    assert pool.health.unchecked == {"n0", "n1", "n2"}
    pool.step()
    assert pool.health.unchecked == frozenset()
    assert sorted(nodes for _, nodes in pool.checked if len(nodes) == 1) == [("n0",), ("n1",), ("n2",)]


def test_a_node_without_anything_to_give_is_no_matter() -> None:
    pool = Pool(1)
    pool.nodes.append(Node("head", "cpu", 0, 0))
    pool.live(10)
    assert {name for _, nodes in pool.checked for name in nodes} == {"n0"}


def test_a_node_in_use_is_never_checked_and_one_that_gets_used_has_its_check_called_off() -> None:
    pool = Pool(1, n0=None)
    pool.step()
    pool.used = {"n0"}
    assert [type(decision) for decision in pool.step()] == [CallOff]
    assert pool.live(1000).num_checks("n0") == 1
    assert pool.health.unchecked == frozenset(), "whoever came has not asked"


def test_between_runs_a_node_is_checked_once_nobody_has_wanted_it_for_a_while() -> None:
    pool = Pool(1).live(5)
    pool.used = {"n0"}
    pool.live(100)
    pool.used = set()
    pool.live(RULES.idle_s - 1)
    pool.used = {"n0"}
    pool.live(5)
    pool.used = set()
    pool.live(RULES.idle_s - 1)
    assert pool.num_checks("n0") == 1
    pool.live(5)
    assert pool.num_checks("n0") == 2
    assert pool.live(5000).num_checks("n0") == 2, "it has not been used since"


# --- What a check finds ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_quarantined_with_its_reason_and_checked_again_until_it_is_not_full() -> None:
    pool = Pool(3, n1=FULL).live(3)
    assert pool.health.quarantined["n1"].why == "the disk of /tmp is full: 1 MB of 1,000,000 MB are free"
    assert any(word.is_loud and "node n1 is in quarantine: the disk of /tmp is full" in word.text for word in pool.words)
    pool.live(RULES.hold_s - 10)
    assert pool.num_checks("n1") == 1
    pool.live(15)
    assert (pool.num_checks("n1"), pool.quarantined) == (2, {"n1": "disk"})
    pool.live(2 * RULES.hold_s - 20)
    assert pool.num_checks("n1") == 2, "the wait is twice as long"
    pool.answers["n1"] = GOOD
    pool.live(30)
    assert (pool.num_checks("n1"), pool.quarantined, pool.health.unchecked) == (3, {}, frozenset())
    assert "node n1 is back" in pool.words[-1].text


def test_quarantines_get_longer_up_to_a_bound() -> None:
    pool = Pool(2, n1=FULL)
    pool.live(20 * 3600)
    times = [at_s for at_s, nodes in pool.checked if nodes == ("n1",)]
    gaps = [later - before for before, later in pairwise(times)]
    assert all(later >= before for before, later in pairwise(gaps))
    assert max(gaps) == pytest.approx(RULES.max_hold_s, abs=5)


def test_what_is_far_below_its_peers_must_be_found_twice() -> None:
    pool = Pool(3, n2=SLOW)
    pool.live(5)
    assert pool.quarantined == {}
    pool.live(RULES.retry_s + 3)
    assert pool.quarantined == {"n2": "rate"}
    assert pool.health.quarantined["n2"].why == "the CPU computes 4 GFLOP/s, and 10 are usual among its peers"
    busy = Pool(3, n2=SLOW).live(5)
    busy.answers["n2"] = GOOD
    assert busy.live(100).quarantined == {}, "it was a busy moment"


def test_a_slow_node_that_came_first_shows_when_there_is_something_to_compare_with() -> None:
    pool = Pool(1, n0=SLOW).live(10)
    pool.nodes += [Node(f"n{number}", "cpu", 0, 4) for number in (1, 2)]
    assert pool.live(60).quarantined == {"n0": "rate"}


def test_of_two_nodes_nobody_is_the_slow_one_and_kinds_are_not_compared() -> None:
    assert Pool(2, n0=SLOW).live(100).quarantined == {}
    mixed = Pool(4, n0=SLOW)
    mixed.nodes[0] = replace(mixed.nodes[0], kind="small")
    assert mixed.live(100).quarantined == {}


def test_a_node_whose_all_reduces_are_slow_with_everybody_is_found_by_them() -> None:
    pool = Pool(4)
    pool.pairs = {frozenset({"n1", f"n{other}"}): {"exchange": 3e8} for other in (0, 2, 3)}
    pool.live(60)
    assert pool.quarantined == {"n1": "bandwidth"}
    assert pool.health.quarantined["n1"].why == "an all-reduce with other nodes moves 300 MB/s, and 1e+03 are usual among its peers"
    pool.pairs.clear()
    assert pool.live(RULES.hold_s + 30).quarantined == {}, "measured with others again"


def test_a_partner_that_boasts_hides_no_slow_node() -> None:
    pool = Pool(4)
    pool.pairs = {frozenset({"n1", f"n{other}"}): {"exchange": 3e8} for other in (0, 3)} | {frozenset({"n1", "n2"}): {"exchange": 1e30}}
    assert pool.live(60).quarantined == {"n1": "bandwidth"}


def test_a_pool_too_small_to_tell_who_is_slow_measures_no_pairs() -> None:
    assert [nodes for _, nodes in Pool(3).live(200).checked if len(nodes) == 2] == []


# --- What drivers report --------------------------------------------------------------------------------------------------


def test_a_straggler_has_its_node_quarantined_and_checked_before_it_returns() -> None:
    pool = Pool(3).live(5)
    pool.used = {"n0", "n1"}
    pool.reports = [report(stragglers=[Straggler("2.0", "n1", 0.41)])]
    pool.step()
    assert pool.health.quarantined["n1"].why == "worker 2.0 of run tides has long computed at 0.41 of its peers' speed"
    pool.live(RULES.hold_s * 2)
    assert pool.num_checks("n1") == 1, "not while anybody is there"
    pool.used, pool.reports = {"n0"}, []
    pool.live(5)
    assert (pool.num_checks("n1"), pool.quarantined) == (2, {})


def test_repeated_deaths_are_a_nodes_fault_unless_the_run_dies_everywhere() -> None:
    pool = Pool(3).live(5)
    pool.reports = [report(deaths("n1", RULES.num_deaths - 1, pool.now_s))]
    assert pool.live(5).quarantined == {}
    pool.reports = [report(deaths("n1", RULES.num_deaths, pool.now_s - 100))]
    assert pool.live(5).quarantined == {"n1": "deaths"}
    everywhere = Pool(3).live(5)
    everywhere.reports = [report([*deaths("n1", 5, everywhere.now_s), *deaths("n2", 4, everywhere.now_s, "2")])]
    assert everywhere.live(5).quarantined == {}
    everywhere.reports.append(report(deaths("n1", 2, everywhere.now_s), run="another"))
    assert everywhere.live(5).quarantined == {"n1": "deaths"}, "1 more than elsewhere, and 2"


def test_old_deaths_and_those_before_a_return_do_not_count() -> None:
    pool = Pool(3).live(5)
    pool.reports = [report(deaths("n1", 5, pool.now_s - RULES.deaths_within_s - 100))]
    assert pool.live(5).quarantined == {}
    pool.reports = [report(deaths("n1", 3, pool.now_s - 10))]
    assert pool.live(5).quarantined == {"n1": "deaths"}
    pool.live(RULES.hold_s + 5)
    assert pool.quarantined == {}, "the driver still tells of them"


# --- Checks that lie ------------------------------------------------------------------------------------------------------

NONSENSE: list[Any] = [
    {},
    [],
    "a traceback's last line",
    17,
    {"disks": []},
    GOOD | {"rates": {"the CPU": math.nan}},
    GOOD | {"rates": {"the CPU": -1.0}},
    GOOD | {"rates": {"the CPU": math.inf}},
    GOOD | {"disks": [{"folder": "/tmp", "free_bytes": 5, "total_bytes": 4}]},
    GOOD | {"disks": "many"},
    GOOD | {"extra": 1},
    GOOD | {"gpus": [{"name": "x"}]},
]


@pytest.mark.parametrize("lie", [None, *NONSENSE], ids=lambda lie: str(lie)[:30])
def test_a_check_that_hangs_dies_or_talks_nonsense_is_tried_twice_and_then_failed(lie: Any) -> None:
    pool = Pool(3, n1=lie)
    pool.live(3)
    assert pool.quarantined == {}
    assert pool.health.unchecked == {"n1"}, "nobody else waits"
    pool.live(2 * RULES.deadline_s + RULES.retry_s + 5)
    assert pool.quarantined == {"n1": "silence"}
    assert pool.num_checks("n1") == RULES.num_tries
    assert pool.health.quarantined["n1"].why.startswith("its check failed 2 times: ")


def test_a_check_that_boasts_condemns_nobody() -> None:
    assert Pool(3, n1=GOOD | {"rates": {"the CPU": 1e30}}).live(200).quarantined == {}
    boast = Pool(4)
    boast.pairs = {frozenset({"n1", f"n{other}"}): {"exchange": 1e30} for other in (0, 2, 3)}
    assert boast.live(200).quarantined == {}
    assert len([nodes for _, nodes in boast.checked if len(nodes) == 2]) == 6, "each with each"


@given(st.dictionaries(st.sampled_from(["n1", "n2"]), st.one_of(st.none(), st.sampled_from([*NONSENSE, FULL, SLOW])), max_size=1))
def test_a_lie_is_held_against_its_own_node_alone(answers: dict[str, Any]) -> None:
    pool = Pool(5, **answers).live(300)
    assert pool.quarantined.keys() <= answers.keys()
    assert pool.health.unchecked == frozenset()


@pytest.mark.parametrize("answer", [FULL, None, {}, GOOD | {"wrong": ["the CPU"]}])
@pytest.mark.parametrize(("num_nodes", "most"), [(1, 0), (2, 1), (3, 1), (9, 3)])
def test_where_a_check_fails_everywhere_it_is_not_believed_everywhere(answer: Any, num_nodes: int, most: int) -> None:
    pool = Pool(num_nodes, **{f"n{number}": answer for number in range(num_nodes)}).live(200)
    assert len(pool.quarantined) == most
    assert pool.health.unchecked == frozenset(), "the others are used"
    refused = [word.text for word in pool.words if word.is_loud and "stays in use, though" in word.text]
    assert len(refused) == num_nodes - most, "said once of each"
    assert "it is the only one" in refused[0] if num_nodes == 1 else "Look at what these nodes share, and at the check" in refused[0]


# --- What is remembered ---------------------------------------------------------------------------------------------------


def test_a_machine_made_anew_knows_quarantines_and_checks_nothing_again() -> None:
    pool = Pool(3, n1=FULL).live(5)
    remembered = json.loads(json.dumps(pool.health.to_json()))
    anew = Pool(3, Health(RULES, remembered))
    anew.now_s = pool.now_s
    anew.step()
    assert anew.quarantined == {"n1": "disk"}
    assert anew.health.unchecked == frozenset()
    anew.answers["n1"] = GOOD
    anew.live(RULES.hold_s - 10)
    assert [nodes for _, nodes in anew.checked if len(nodes) == 1] == []
    assert anew.live(15).quarantined == {}


def test_a_node_that_left_is_forgotten_with_its_check() -> None:
    pool = Pool(2, n1=None)
    pool.step()
    del pool.nodes[1]
    assert CallOff in [type(decision) for decision in pool.step()]
    assert pool.live(200).quarantined == {}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.sampled_from([GOOD, FULL, SLOW, None, {}]))
def test_whatever_comes_and_goes_no_check_runs_beside_anybody(changes: list[tuple[int, bool]], answer: Any) -> None:
    pool = Pool(4, n0=answer)  # which asserts it
    for number, is_used in changes:
        (pool.used.add if is_used else pool.used.discard)(f"n{number}")
        pool.step(7)
        assert set(pool.quarantined) <= {"n0"}
    pool.used.clear()
    pool.live(400)
    assert pool.health.unchecked == frozenset()
