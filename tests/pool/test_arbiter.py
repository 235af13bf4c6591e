"""The arbiter's actor as a plain object in one event loop: who waits is answered when something is new, and not before."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from tidepool.messages import ClusterView, Node, Resources, RunReport
from tidepool.pool import arbiter
from tidepool.pool.arbiter import Arbiter

_TIMEOUT_S = 30.0


class NoInspector:
    """Finds every node well, at once."""

    def __init__(self, rules: object) -> None:
        """Goes by no rules."""

    def step(self, view: ClusterView, used: frozenset[str], reports: object, now_s: float) -> None:
        """Nothing to inspect."""

    def quarantined(self) -> dict[str, str]:
        return {}

    def unchecked(self) -> frozenset[str]:
        return frozenset()


def report(run: str, **rest: Any) -> RunReport:
    values = {"session": 1, "store": "memory://a", "project": "p", "tier": "standard", "priority": 0, "min_groups": 1, "max_groups": 2}
    values |= {"shards": 4, "workers_per_group": 1, "worker": Resources(1, 1)}
    return RunReport(run=run, **(values | rest))


@pytest.fixture(autouse=True)
def views(monkeypatch: pytest.MonkeyPatch) -> list[ClusterView]:
    """What the cluster says: the last one of the list."""
    views = [ClusterView((Node("n0", "H100", 2, 8),), {"n0": Resources(2, 8)})]
    monkeypatch.setattr(arbiter, "read_cluster", lambda: views[-1])
    monkeypatch.setattr(arbiter, "Inspector", NoInspector)
    monkeypatch.setattr(arbiter.Closures, "step", lambda _, view, *__: view)
    return views


async def until_granted(actor: Arbiter, said: RunReport, number: int) -> Any:
    deadline = time.monotonic() + _TIMEOUT_S
    while (standing := await actor.report(said)) is None or len(standing.grants) < number:
        assert time.monotonic() < deadline
    return standing


def test_a_run_is_granted_what_is_free() -> None:
    async def story() -> None:
        standing = await until_granted(Arbiter(), report("a"), 2)
        assert {grant.places for grant in standing.grants} == {(("n0", 1),)}
        assert len({grant.name for grant in standing.grants}) == 2

    asyncio.run(story())


def test_who_waits_hears_at_once_and_otherwise_after_a_while() -> None:
    async def story() -> None:
        actor = Arbiter()
        said = report("a")
        await until_granted(actor, said, 2)
        begun = time.monotonic()
        await actor.report(said)
        assert time.monotonic() - begun >= arbiter._HOLD_S * 0.9, "there was nothing new"
        waiting = asyncio.create_task(actor.report(said))
        await asyncio.sleep(0)
        await actor.deployment("app", "chat", "p", 0, 1, 1, 1, 1, 0)
        standing = await waiting
        assert len(standing.grants) == 1, "a grant that the run has not taken is taken back, and the run hears of it"

    asyncio.run(story())


def test_serving_is_allowed_what_has_a_place() -> None:
    async def story() -> None:
        actor = Arbiter()
        deadline = time.monotonic() + _TIMEOUT_S
        while (allowed := await actor.deployment("app", "chat", "p", 0, 1, 1, 3, 3, 0)) != 2:
            assert time.monotonic() < deadline, allowed
            await asyncio.sleep(0.01)  # an answer that is known waits for nothing, and would keep the loop to itself

    asyncio.run(story())


def test_an_unexpected_error_ends_the_process_for_ray_to_start_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        ended: list[int] = []
        monkeypatch.setattr(arbiter, "read_cluster", lambda: 1 / 0)
        monkeypatch.setattr(arbiter.os, "_exit", ended.append)
        actor = Arbiter()
        deadline = time.monotonic() + _TIMEOUT_S
        while not ended:
            await actor.report(report("a"))
            assert time.monotonic() < deadline
        assert ended == [1]

    asyncio.run(story())


def test_a_run_that_is_forgotten_while_it_waits_is_told_nothing_and_reports_again() -> None:
    async def story() -> None:
        actor = Arbiter()
        said = report("a")
        await until_granted(actor, said, 2)
        waiting = asyncio.create_task(actor.report(said))
        await asyncio.sleep(0)
        await actor.leave("a", 1)
        assert await waiting is None
        await until_granted(actor, said, 2)

    asyncio.run(story())


def test_an_older_driver_is_not_told_what_is_granted_to_the_newer_one() -> None:
    async def story() -> None:
        actor = Arbiter()
        await until_granted(actor, report("a", session=2), 2)
        assert await actor.report(report("a", session=1)) is None

    asyncio.run(story())


def test_an_arbiter_that_has_not_heard_of_every_run_tells_the_autoscaler_nothing(
    monkeypatch: pytest.MonkeyPatch, views: list[ClusterView]
) -> None:
    async def story() -> None:
        told: list[object] = []
        views[0] = replace(views[0], runs=frozenset({"a", "b"}))
        actor = Arbiter()
        monkeypatch.setattr(actor._demand, "tell", lambda *asked: told.append(asked))
        for _ in range(2):
            await actor.report(report("a"))
        assert told == [], "what the one before has asked for stands"
        deadline = time.monotonic() + _TIMEOUT_S
        while not told:
            await actor.report(report("b"))
            assert time.monotonic() < deadline

    asyncio.run(story())
