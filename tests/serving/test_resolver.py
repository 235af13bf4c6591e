"""Names become versions: asked once per TTL, kept when the store is away, never answered by a version that cannot be served."""

import asyncio
import logging
import threading
from collections.abc import Mapping, Set
from typing import Any

import pytest

from tests.serving.fakes import BASE_DIGEST, adapter, full
from tidepool.errors import ClusterError, ModelError, RegistryError, StoreUnreachableError
from tidepool.registry import Meaning, ModelVersion
from tidepool.serving.resolver import Resolver


class FakeRegistry:
    """What names mean now, by a mapping; counts the questions, and can be away."""

    def __init__(self, meanings: Mapping[str, ModelVersion | Meaning | Exception]) -> None:
        self.meanings = dict(meanings)
        self.questions: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def meaning(self, ref: str) -> Meaning:
        self.questions.append(ref)
        assert self.gate.wait(10)
        meaning = self.meanings.get(ref, RegistryError(f"No {ref}."))
        if isinstance(meaning, Exception):
            raise meaning
        return Meaning(meaning) if isinstance(meaning, ModelVersion) else meaning


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def resolver_of(
    registry: FakeRegistry, deployed: Mapping[str, ModelVersion] | None = None, bases: Set[str] = frozenset({BASE_DIGEST}), **rest: Any
) -> tuple[Resolver, Clock]:
    clock = Clock()
    deployed = deployed or {"tides": full(), "bot": adapter()}
    return Resolver(registry.meaning, deployed, bases, ttl_s=2.0, clock=clock, **rest), clock


def test_a_name_is_asked_again_after_the_ttl_and_a_number_never() -> None:
    registry = FakeRegistry({"bot": adapter(number=2), "bot@1": adapter()})
    resolver, clock = resolver_of(registry)

    async def run() -> None:
        assert (await resolver.resolve("bot")).number == 1  # what was deployed is known
        clock.now += 1.9
        assert (await resolver.resolve("bot")).number == 1
        clock.now += 0.2
        assert (await resolver.resolve("bot")).number == 2
        assert (await resolver.resolve("bot@1")).number == 1
        clock.now += 1e9
        assert (await resolver.resolve("bot@1")).number == 1

    asyncio.run(run())
    assert registry.questions == ["bot", "bot@1"]


def test_requests_at_one_time_share_a_question_and_one_that_leaves_does_not_end_it() -> None:
    registry = FakeRegistry({"bot:canary": adapter(number=3)})
    resolver, _ = resolver_of(registry)
    registry.gate.clear()

    async def run() -> None:
        tasks = [asyncio.create_task(resolver.resolve("bot:canary")) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        registry.gate.set()
        assert {version.number for version in await asyncio.gather(*tasks[1:])} == {3}

    asyncio.run(run())
    assert registry.questions == ["bot:canary"]


def test_a_store_that_is_away_leaves_the_last_known_version(caplog: pytest.LogCaptureFixture) -> None:
    registry = FakeRegistry({"bot": adapter(number=2)})
    resolver, clock = resolver_of(registry)

    async def run() -> None:
        clock.now += 3
        await resolver.resolve("bot")
        registry.meanings["bot"] = StoreUnreachableError("away")
        clock.now += 3
        with caplog.at_level(logging.WARNING, "tidepool"):
            assert (await resolver.resolve("bot")).number == 2
            assert (await resolver.resolve("bot")).number == 2
        registry.meanings["bot"] = adapter(number=3)
        clock.now += 3
        assert (await resolver.resolve("bot")).number == 3

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["bot cannot be looked up (away): requests go on with bot@2."]


def test_an_error_is_not_remembered() -> None:
    registry = FakeRegistry({"bot@2": StoreUnreachableError("away")})
    resolver, _ = resolver_of(registry)

    async def run() -> None:
        with pytest.raises(StoreUnreachableError):
            await resolver.resolve("bot@2")
        with pytest.raises(RegistryError, match=r"No bot@3"):
            await resolver.resolve("bot@3")
        registry.meanings |= {"bot@2": adapter(number=2), "bot@3": adapter(number=3)}
        assert (await resolver.resolve("bot@2")).number == 2
        assert (await resolver.resolve("bot@3")).number == 3

    asyncio.run(run())


@pytest.mark.parametrize("ref", ["bots", "", "other", "bot@", "bot@0", "bot@01", "bot@³", "bot@1:x", "bot@" + "9" * 100, "bot:a@1", "tide"])
def test_what_is_not_listed_is_not_looked_up(ref: str) -> None:
    registry = FakeRegistry({})
    resolver, _ = resolver_of(registry)
    with pytest.raises(RegistryError, match="not served here"):
        asyncio.run(resolver.resolve(ref))
    assert registry.questions == []


def test_near_names_are_told() -> None:
    with pytest.raises(RegistryError, match="did you mean tides"):
        asyncio.run(resolver_of(FakeRegistry({}))[0].resolve("tide"))


def test_an_entry_with_a_version_or_an_alias_stands_for_itself_alone() -> None:
    registry = FakeRegistry({"bot": adapter(number=9), "bot@3": adapter(number=3)})
    resolver, _ = resolver_of(registry, {"bot@2": adapter(number=2), "tides:canary": full()})

    async def run() -> None:
        assert (await resolver.resolve("bot@2")).number == 2
        assert (await resolver.resolve("tides:canary")).number == 1
        for ref in ("bot", "bot@3", "tides"):
            with pytest.raises(RegistryError, match="not served here"):
                await resolver.resolve(ref)

    asyncio.run(run())


@pytest.mark.parametrize("moved", [full(number=2, digest="0f" * 32), adapter("tides", 2, base_digest="0f" * 32)])
def test_an_alias_that_moves_off_the_deployed_bases_leaves_the_last_served_version(
    moved: ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    registry = FakeRegistry({"tides": moved, "tides@2": moved, "tides:canary": moved})
    resolver, clock = resolver_of(registry)

    async def run() -> None:
        with caplog.at_level(logging.WARNING, "tidepool"):
            for _ in range(3):
                clock.now += 3
                assert (await resolver.resolve("tides")).number == 1
        for ref in ("tides@2", "tides:canary"):  # never served: no other version answers in its place
            with pytest.raises(ClusterError, match=rf"tides@2 needs .*list {ref} among the models that are served"):
                await resolver.resolve(ref)

    asyncio.run(run())
    assert len(caplog.records) == 1
    assert "tides is tides@2 now" in caplog.records[0].getMessage()


def test_a_version_answers_from_when_its_base_runs_and_the_one_before_no_longer_when_its_base_is_gone() -> None:
    registry, bases = FakeRegistry({"tides": full(number=2, digest="0f" * 32), "bot": adapter()}), {BASE_DIGEST}
    resolver, clock = resolver_of(registry, bases=bases)

    async def run() -> None:
        clock.now += 3
        assert (await resolver.resolve("tides")).number == 1
        bases.add("0f" * 32)
        assert (await resolver.resolve("tides")).number == 2
        bases.remove(BASE_DIGEST)
        with pytest.raises(ClusterError, match="needs the base tides@1, which is being started"):
            await resolver.resolve("bot")

    asyncio.run(run())


def test_the_last_served_version_is_the_newest_one_that_could_be_served() -> None:
    registry = FakeRegistry({"bot": adapter(number=2)})
    resolver, clock = resolver_of(registry)

    async def run() -> None:
        clock.now += 3
        await resolver.resolve("bot")
        registry.meanings["bot"] = adapter(number=3, base_digest="0f" * 32)
        clock.now += 3
        assert (await resolver.resolve("bot")).number == 2

    asyncio.run(run())


def test_all_entries_are_listed_with_their_version() -> None:
    resolver, _ = resolver_of(FakeRegistry({}))
    assert {name: version.ref for name, version in asyncio.run(resolver.models()).items()} == {"tides": "tides@1", "bot": "bot@1"}


# --- New versions are made ready first -------------------------------------------------------------------------------


class Preparation:
    """Makes versions ready when it is told to, or fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, version: ModelVersion, instead_of: ModelVersion) -> None:
        self.asked.append((version.ref, instead_of.ref))
        await self.gate.wait()
        if self.error:
            raise self.error


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_go_on_with_the_version_before_until_the_new_one_is_ready() -> None:
    async def run() -> None:
        registry, preparation = FakeRegistry({"bot": adapter(number=2), "tides": full()}), Preparation()
        resolver, clock = resolver_of(registry, prepare=preparation)
        clock.now += 3
        assert (await resolver.resolve("bot")).number == 1
        clock.now += 3
        assert (await resolver.resolve("bot")).number == 1
        assert preparation.asked == [("bot@2", "bot@1")]
        preparation.gate.set()
        await settled()
        assert (await resolver.resolve("bot")).number == 2
        await resolver.close()

    asyncio.run(run())


def test_a_name_that_moved_is_asked_at_once_and_others_are_not() -> None:
    async def run() -> None:
        registry, preparation = FakeRegistry({"bot": adapter(number=2), "tides": full(), "bot:canary": adapter(number=2)}), Preparation()
        preparation.gate.set()
        resolver, _ = resolver_of(registry, prepare=preparation)
        await resolver.resolve("bot:canary")
        registry.questions.clear()
        await resolver.refresh({"bot"})
        await settled()
        assert sorted(registry.questions) == ["bot", "bot:canary"]
        assert (await resolver.resolve("bot")).number == 2
        assert sorted(registry.questions) == ["bot", "bot:canary"], "no request asks"
        await resolver.refresh()
        assert "tides" in registry.questions

    asyncio.run(run())


def test_a_version_that_cannot_be_made_ready_does_not_answer_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        registry, preparation = FakeRegistry({"bot": adapter(number=2), "tides": full()}), Preparation()
        preparation.gate.set()
        preparation.error = ModelError("broken")
        resolver, clock = resolver_of(registry, prepare=preparation)
        with caplog.at_level(logging.WARNING, "tidepool"):
            for _ in range(8):
                clock.now += 1
                await resolver.refresh()
                await settled()
                assert (await resolver.resolve("bot")).number == 1
        assert preparation.asked == [("bot@2", "bot@1")] * 2
        preparation.error = None
        clock.now += 5
        await resolver.refresh()
        await settled()
        assert (await resolver.resolve("bot")).number == 2

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["bot@2 cannot be made ready (broken): requests go on with bot@1."]


def test_a_version_that_takes_long_answers_after_a_while_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidepool.serving.resolver.PREPARE_S", 0.05)

    async def run() -> None:
        resolver, _ = resolver_of(FakeRegistry({"bot": adapter(number=2), "tides": full()}), prepare=Preparation())
        await resolver.refresh()
        async with asyncio.timeout(30):
            while (await resolver.resolve("bot")).number == 1:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_an_alias_that_moves_on_while_a_version_is_made_ready_skips_it() -> None:
    async def run() -> None:
        registry, preparation = FakeRegistry({"bot": adapter(number=2), "tides": full()}), Preparation()
        resolver, _ = resolver_of(registry, prepare=preparation)
        await resolver.refresh()
        await settled()
        registry.meanings["bot"] = adapter(number=3)
        await resolver.refresh()
        await settled()
        preparation.gate.set()
        await settled()
        assert (await resolver.resolve("bot")).number == 3
        assert preparation.asked == [("bot@2", "bot@1"), ("bot@3", "bot@1")]

    asyncio.run(run())


# --- Canaries ----------------------------------------------------------------------------------------------------------


def test_a_canary_answers_its_share_and_no_list_names_it() -> None:
    draws = iter([0.05, 0.5, 0.099, 0.1])

    async def run() -> None:
        registry = FakeRegistry({"bot": Meaning(adapter(), adapter(number=2), 0.1)})
        resolver, clock = resolver_of(registry, draw=lambda: next(draws))
        clock.now += 3
        assert [(await resolver.resolve("bot")).number for _ in range(4)] == [2, 1, 2, 1]
        assert (await resolver.models(lambda name: name == "bot"))["bot"].number == 1

    asyncio.run(run())


def test_a_canary_is_made_ready_and_ends_with_the_alias() -> None:
    async def run() -> None:
        registry, preparation = FakeRegistry({"bot": Meaning(adapter(), adapter(number=2), 0.5), "tides": full()}), Preparation()
        resolver, _ = resolver_of(registry, prepare=preparation, draw=lambda: 0.0)
        await resolver.refresh()
        await settled()
        assert (await resolver.resolve("bot")).number == 1
        preparation.gate.set()
        await settled()
        assert (await resolver.resolve("bot")).number == 2
        registry.meanings["bot"] = adapter()
        await resolver.refresh()
        assert (await resolver.resolve("bot")).number == 1

    asyncio.run(run())


def test_a_canary_whose_base_is_not_deployed_answers_nothing() -> None:
    async def run() -> None:
        registry = FakeRegistry({"bot": Meaning(adapter(), adapter(number=2, base_digest="0f" * 32), 0.9)})
        resolver, clock = resolver_of(registry, draw=lambda: 0.0)
        clock.now += 3
        assert (await resolver.resolve("bot")).number == 1

    asyncio.run(run())
