"""The directory: who is listed, what moved, and that a gateway hears of it at once."""

import asyncio

from tests.serving.fakes import BASE_DIGEST
from tidepool.serving.bases import base_id
from tidepool.serving.directory import LISTED_S, Directory, View, answering
from tidepool.serving.wire import Endpoint

ONE, TWO = (Endpoint(name, BASE_DIGEST, "127.0.0.1", port, "s") for name, port in (("one", 1), ("two", 2)))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def seen_by(directory: Directory, before: View | None = None, timeout_s: float = 0.0) -> View:
    return await directory.watch(before.epoch if before else "", before.number if before else -1, timeout_s)


def test_a_replica_is_listed_until_it_leaves_or_is_silent_too_long() -> None:
    async def run() -> None:
        clock = Clock()
        directory = Directory(clock)
        for endpoint in (ONE, TWO):
            directory.report(endpoint)
        assert (await seen_by(directory)).endpoints == (ONE, TWO)
        clock.now += LISTED_S - 1
        directory.report(TWO)
        clock.now += 2
        view = await seen_by(directory)
        assert view.endpoints == (TWO,)
        directory.leave("two")
        directory.leave("two")
        assert (await seen_by(directory, view)).endpoints == ()

    asyncio.run(run())


def test_who_watches_hears_of_what_is_new_and_of_nothing_else() -> None:
    async def run() -> None:
        directory = Directory()
        view = await seen_by(directory)
        assert view.moved is None, "who has seen nothing asks for all"
        watching = asyncio.create_task(seen_by(directory, view, 60))
        await asyncio.sleep(0)
        directory.report(ONE)
        view = await watching
        assert (view.endpoints, view.moved) == ((ONE,), ())
        directory.report(ONE)  # as it does again and again
        same = await seen_by(directory, view, 0.01)
        assert same == view
        watching = asyncio.create_task(seen_by(directory, view, 60))
        await asyncio.sleep(0)
        directory.announce("bot")
        view = await watching
        directory.announce("tides")
        directory.announce("tides")
        assert (view.moved, (await seen_by(directory, view)).moved) == (("bot",), ("tides",))

    asyncio.run(run())


def test_a_directory_that_starts_anew_lets_everybody_ask_for_all() -> None:
    async def run() -> None:
        first, second = Directory(), Directory()
        view = await seen_by(first)
        first.announce("bot")
        after = await seen_by(second, view, 60)
        assert after.epoch != view.epoch
        assert after.moved is None

    asyncio.run(run())


def test_moves_that_are_long_past_are_forgotten_and_who_missed_them_asks_for_all() -> None:
    async def run() -> None:
        directory = Directory()
        view = await seen_by(directory)
        for index in range(5000):
            directory.announce(f"n{index}")
        assert (await seen_by(directory, view)).moved is None

    asyncio.run(run())


def test_replicas_say_whether_they_have_something_to_do_and_who_watches_is_not_bothered_with_it() -> None:
    async def run() -> None:
        clock = Clock()
        directory = Directory(clock)
        assert directory.busy() == {}
        directory.report(ONE, is_busy=False)
        directory.report(TWO, is_busy=True)
        view = await seen_by(directory)
        assert directory.busy() == {base_id(BASE_DIGEST): True}
        directory.report(TWO, is_busy=False)
        assert directory.busy() == {base_id(BASE_DIGEST): False}
        assert (await seen_by(directory, view)).number == view.number
        clock.now += LISTED_S + 1
        assert directory.busy() == {}

    asyncio.run(run())


def test_a_base_may_answer_from_its_first_replica_until_it_is_offered_no_longer() -> None:
    async def run() -> None:
        directory = Directory()
        old = "01" * 32
        view = await seen_by(directory)
        assert answering({old}, view) == {old}, "nobody has looked yet"
        directory.offer(frozenset({base_id(old), base_id(BASE_DIGEST)}))
        assert answering({old}, await seen_by(directory, view, 60)) == {old}
        directory.report(ONE)
        both = answering({old}, await seen_by(directory))
        assert both == {old, BASE_DIGEST}
        directory.leave("one")
        assert answering(both, await seen_by(directory)) == both, "it has gone to no replica"
        directory.offer(frozenset({base_id(BASE_DIGEST)}))
        assert answering(both, await seen_by(directory)) == {BASE_DIGEST}

    asyncio.run(run())
