"""A gateway's replicas, without Ray: who is asked, who finishes what another one began, and what waits for a replica."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.serving.fakes import BASE_DIGEST, adapter
from tests.serving.models import Published
from tidepool.errors import ClusterError, EngineBusyError, ModelError, RequestError, StoreUnreachableError
from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.models import ModelSource
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame, Started
from tidepool.serving.fleet import Fleet
from tidepool.serving.host import Load, ReplicaHost
from tidepool.serving.replica import Replica, load_replica
from tidepool.serving.wire import Endpoint, ReplicaFaultError
from tidepool.specs import EngineSpec

_TIMEOUT_S = 60


class Counting:
    """A replica whose answers count on from what was resumed; it does what its fields say."""

    def __init__(self, num_tokens: int = 5) -> None:
        self.num_tokens, self.pause_s = num_tokens, 0.001 if num_tokens > 50 else 0.0
        self.calls: list[Call] = []
        self.cancelled: list[str] = []
        self.loaded: set[str] = set()
        self.errors: list[Exception] = []
        self.load_errors: list[Exception] = []
        self.stops_after: int | None = None
        self.breaks_after: int | None = None
        self.stopped = asyncio.Event()
        self.has_failed = False

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)
        if call.adapter:
            self.loaded.add(call.adapter.digest)
        try:
            yield Started(3)
            done = len(call.resumed[0]) if call.resumed else 0
            for token in range(done, self.num_tokens):
                if token == self.breaks_after:
                    self.has_failed = True
                    raise RuntimeError("a fault of the engine")
                if token == self.stops_after:
                    self.stopped.set()
                    await asyncio.Event().wait()
                yield Output((token,), str(token), "length" if token == self.num_tokens - 1 else None)
                await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.cancelled.append(call.request_id)
            raise

    async def load_adapter(self, version: ModelVersion) -> None:
        if self.load_errors:
            raise self.load_errors.pop()
        self.loaded.add(version.digest)

    def load(self) -> Load:
        return Load(0, 0, frozenset(self.loaded), 10, 10, 1000, self.has_failed)


class Scene:
    """Hosts and a fleet that knows them."""

    def __init__(self, **options: Any) -> None:
        self.fleet = Fleet(**options)
        self.hosts: dict[str, ReplicaHost] = {}
        self.endpoints: dict[str, Endpoint] = {}

    async def add(self, name: str, replica: Any, base: str = BASE_DIGEST) -> ReplicaHost:
        host = self.hosts[name] = ReplicaHost(replica, report_every_s=0.05)
        self.endpoints[name] = await host.open(name, base, "127.0.0.1")
        self.fleet.update(self.endpoints.values())
        await until(lambda: name in self.fleet.states(base))
        return host

    def remove(self, name: str) -> None:
        del self.endpoints[name]
        self.fleet.update(self.endpoints.values())


@asynccontextmanager
async def scene(*replicas: Any, **options: Any) -> AsyncIterator[Scene]:
    """Replicas by the names a, b, c."""
    one = Scene(**options)
    try:
        for name, replica in zip("abc", replicas, strict=False):
            await one.add(name, replica)
        yield one
    finally:
        await one.fleet.close()
        await asyncio.gather(*(host.close() for host in one.hosts.values()))


async def until(condition: Any) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


def cut(host: ReplicaHost) -> None:
    """Cut the connections, as a killed process does, and let nobody in again."""
    assert host._server is not None
    host._server.close()
    for channel in host.channels:
        channel._writer.transport.abort()


def call_of(name: str = "r", version: ModelVersion | None = None, **sampling: Any) -> Call:
    return Call(name, BASE_DIGEST, version, "the tide", SamplingParameters(**sampling))


async def frames_of(fleet: Fleet, call: Call) -> list[Frame]:
    async with asyncio.timeout(_TIMEOUT_S):
        return [frame async for frame in fleet.generate(call)]


def text_of(frames: Iterable[Frame]) -> str:
    return "".join(frame.text for frame in frames if isinstance(frame, Output))


def play(work: Any) -> None:
    asyncio.run(work())


# --- Lost and handed back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops_after", [0, 3])
def test_a_request_whose_replica_dies_is_finished_by_another_without_a_gap(stops_after: int) -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = stops_after
        async with scene(first, second) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            await first.stopped.wait()
            cut(one.hosts["a"])
            frames = await asked
            assert (text_of(frames), frames.count(Started(3))) == ("01234", 1)
            assert second.calls[0].resumed == (tuple(range(stops_after)),)
            assert second.calls[0].sampling.seed == first.calls[0].sampling.seed
            assert one.fleet.num_replays == 1

    play(run)


def test_a_replica_that_leaves_takes_nothing_new_finishes_what_it_can_and_hands_back_the_rest() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = 2
        async with scene(first, second) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of("stuck")))
            await first.stopped.wait()
            leaving = asyncio.create_task(one.hosts["a"].leave(patience_s=0.5))
            await until(lambda: one.fleet.states(BASE_DIGEST)["a"].is_leaving)
            assert text_of(await frames_of(one.fleet, call_of("new"))) == "01234"
            assert not leaving.done()
            assert text_of(await asked) == "01234"
            await leaving
            assert [call.request_id for call in second.calls] == ["new.1", "stuck.2"]
            assert first.cancelled == ["stuck.1"]

    play(run)


def test_a_replica_with_nothing_to_do_leaves_at_once_though_a_gateway_is_connected() -> None:
    async def run() -> None:
        async with scene(Counting(), Counting()) as one:
            await frames_of(one.fleet, call_of())
            async with asyncio.timeout(5):
                await one.hosts["a"].leave(patience_s=1000)
            one.remove("a")
            await until(lambda: set(one.fleet.states(BASE_DIGEST)) == {"b"})
            assert text_of(await frames_of(one.fleet, call_of())) == "01234"

    play(run)


def test_a_silent_replica_is_given_up() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = 2
        async with scene(first, second, silence_s=0.5) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            await first.stopped.wait()
            reporting = one.hosts["a"]._reporting
            assert reporting is not None
            reporting.cancel()
            assert text_of(await asked) == "01234"

    play(run)


def test_an_engine_that_fails_costs_its_requests_nothing_and_gets_no_more() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.breaks_after = 3
        async with scene(first, second) as one:
            assert text_of(await frames_of(one.fleet, call_of())) == "01234"
            assert second.calls[0].resumed == ((0, 1, 2),)
            await until(lambda: one.fleet.states(BASE_DIGEST)["a"].is_leaving)
            await frames_of(one.fleet, call_of())
            assert len(first.calls) == 1

    play(run)


def test_a_request_that_breaks_one_replica_after_the_other_is_given_up() -> None:
    async def run() -> None:
        replicas = [Counting() for _ in range(3)]
        for replica in replicas:
            replica.stops_after = 0
        async with scene(*replicas) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            for _ in range(3):
                await until(lambda: any(replica.stopped.is_set() for replica in replicas))
                for name, replica in zip("abc", replicas, strict=True):
                    if replica.stopped.is_set():
                        cut(one.hosts[name])
                        replica.stopped.clear()
            with pytest.raises(ClusterError, match="one after the other"):
                await asked

    play(run)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_lost_when_nothing_is_missing_and_nothing_comes_twice(seed: int) -> None:
    """Replicas are killed or must go, at random, and others come, while forty requests of a hundred tokens are answered."""

    async def run() -> None:
        rng = random.Random(seed)
        async with scene(Counting(100), Counting(100), Counting(100)) as one:
            asked = [asyncio.create_task(frames_of(one.fleet, call_of(f"r{index}"))) for index in range(40)]
            for number in range(8):
                await asyncio.sleep(rng.random() * 0.02)
                name = rng.choice(sorted(one.endpoints))
                if rng.random() < 0.5:
                    cut(one.hosts[name])
                else:
                    await one.hosts[name].leave(patience_s=rng.random() * 0.02)
                one.remove(name)
                await one.add(f"new-{number}", Counting(100))
            for frames in await asyncio.gather(*asked):
                assert [frame.token_ids for frame in frames if isinstance(frame, Output)] == [(token,) for token in range(100)]
                assert frames.count(Started(3)) == 1
            assert one.fleet.num_replays > 20

    play(run)


# --- Who is asked ----------------------------------------------------------------------------------------------------


def test_a_busy_replica_is_passed_over_and_the_client_told_when_all_are() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.errors = [EngineBusyError("full"), EngineBusyError("full")]
        async with scene(first, second) as one:
            assert text_of(await frames_of(one.fleet, call_of())) == "01234"
            second.errors = [EngineBusyError("full too")]
            with pytest.raises(EngineBusyError, match="full"):
                await frames_of(one.fleet, call_of())

    play(run)


def test_a_replica_that_cannot_get_the_adapter_is_passed_over_too() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.errors = [StoreUnreachableError("away")]
        async with scene(first, second) as one:
            assert text_of(await frames_of(one.fleet, call_of("r", adapter()))) == "01234"
            first.errors, second.errors = [ModelError("broken")], [ModelError("broken")]
            with pytest.raises(ModelError, match="broken"):
                await frames_of(one.fleet, call_of("r", adapter()))

    play(run)


def test_a_request_that_was_taken_waits_for_a_replica_that_is_busy() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = 2
        async with scene(first, second) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            await first.stopped.wait()
            second.errors = [EngineBusyError("all adapters are in use")] * 2
            cut(one.hosts["a"])
            assert text_of(await asked) == "01234"
            assert len(second.calls) == 3

    play(run)


def test_errors_of_a_replica_arrive_and_are_not_tried_elsewhere() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.errors = [RequestError("wrong"), ValueError("a secret prompt")]
        async with scene(first, second) as one:
            with pytest.raises(RequestError, match="wrong"):
                await frames_of(one.fleet, call_of())
            with pytest.raises(ReplicaFaultError) as fault:
                await frames_of(one.fleet, call_of())
            assert "secret" not in str(fault.value)
            assert second.calls == []

    play(run)


def test_requests_spread_by_load_and_go_where_their_adapter_is() -> None:
    async def run() -> None:
        replicas = [Counting(), Counting()]
        for replica in replicas:
            replica.stops_after = 1
        replicas[1].loaded.add(adapter().digest)
        async with scene(*replicas) as one:
            await until(lambda: adapter().digest in one.fleet.states(BASE_DIGEST)["b"].adapters)
            tasks = []
            for index in range(20):
                tasks.append(asyncio.create_task(frames_of(one.fleet, call_of(f"r{index}", adapter()))))
                await until(lambda num=index: sum(len(replica.calls) for replica in replicas) > num)
            counts = [len(replica.calls) for replica in replicas]
            assert replicas[1].calls[0].request_id == "r0.1"
            assert min(counts) >= 5, "what is hot spreads"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: sum(len(replica.cancelled) for replica in replicas) == 20)

    play(run)


def test_closing_the_frames_early_cancels_the_request() -> None:
    async def run() -> None:
        replica = Counting()
        replica.stops_after = 2
        async with scene(replica) as one:
            async with aclosing(one.fleet.generate(call_of())) as frames:
                assert [await anext(frames), await anext(frames)] == [Started(3), Output((0,), "0")]
            await until(lambda: replica.cancelled == ["r.1"])

    play(run)


def test_an_adapter_is_prepared_where_the_one_before_it_is_else_at_one_replica() -> None:
    async def run() -> None:
        old, new, other = adapter(number=1), adapter(number=2), adapter(number=3)
        replicas = [Counting() for _ in range(3)]
        for replica in replicas[1:]:
            replica.loaded.add(old.digest)
        async with scene(*replicas) as one:
            await one.fleet.prepare(new, old)
            await until(lambda: all(new.digest in replica.loaded for replica in replicas[1:]))
            assert not replicas[0].loaded
            await one.fleet.prepare(other)
            assert sum(other.digest in replica.loaded for replica in replicas) == 1
            assert not any(replica.calls for replica in replicas)

    play(run)


def test_an_adapter_is_refused_where_no_replica_can_load_it_and_none_that_is_there_is_none_that_refuses() -> None:
    async def run() -> None:
        old, new = adapter(number=1), adapter(number=2)
        replicas = [Counting(), Counting()]
        for replica in replicas:
            replica.loaded.add(old.digest)
        async with scene() as one:
            await one.fleet.prepare(new, old)
            for name, replica in zip("ab", replicas, strict=True):
                await one.add(name, replica)
            replicas[0].load_errors = [ModelError("broken")]
            await one.fleet.prepare(new, old)
            for replica in replicas:
                replica.load_errors = [ModelError("broken")]
            with pytest.raises(ModelError, match="broken"):
                await one.fleet.prepare(adapter(number=4), old)

    play(run)


# --- None there ------------------------------------------------------------------------------------------------------


def test_a_request_to_a_base_without_a_replica_wakes_one_and_waits_for_it() -> None:
    async def run() -> None:
        woken: list[str] = []
        replica = Counting()

        async def wake(base_digest: str) -> None:
            woken.append(base_digest)
            await one.add("late", replica)

        async with scene() as one:
            one.fleet = Fleet(wake)
            found = await asyncio.gather(*(frames_of(one.fleet, call_of(f"r{index}")) for index in range(3)))
            assert [text_of(frames) for frames in found] == ["01234"] * 3
            assert woken == [BASE_DIGEST]

    play(run)


def test_a_request_that_waits_can_leave_and_one_whose_only_replica_died_waits_for_the_next() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = 2
        async with scene(first) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            await first.stopped.wait()
            cut(one.hosts["a"])
            one.remove("a")
            await until(lambda: not one.fleet.states(BASE_DIGEST))
            waiting = asyncio.create_task(frames_of(one.fleet, call_of("left")))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            await one.add("b", second)
            assert text_of(await asked) == "01234"
            assert [call.request_id for call in second.calls] == ["r.2"]

    play(run)


def test_a_directory_that_forgets_everybody_costs_nothing_while_replicas_are_connected() -> None:
    async def run() -> None:
        first, second = Counting(), Counting()
        first.stops_after = 2
        async with scene(first, second) as one:
            asked = asyncio.create_task(frames_of(one.fleet, call_of()))
            await first.stopped.wait()
            one.fleet.update([])
            assert text_of(await frames_of(one.fleet, call_of("new"))) == "01234"
            cut(one.hosts["a"])
            assert text_of(await asked) == "01234"
            assert set(one.fleet.states(BASE_DIGEST)) == {"b"}

    play(run)


# --- Real engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(published: Published) -> tuple[Replica, Replica]:
    base = ModelSource(published.base.ref, published.base.digest, published.base)
    one, other = (load_replica(published.store_url, base, EngineSpec(weights="fp32"), "cpu") for _ in range(2))
    return one, other


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}], ids=["greedy", "seeded"]
)
def test_sixteen_answers_of_real_engines_are_the_undisturbed_ones_and_a_step_is_a_frame(
    published: Published, engines: tuple[Replica, Replica], sampling: dict[str, Any]
) -> None:
    version = published.adapters[0]
    calls = [
        replace(
            call_of(f"r{index}", version if index % 2 else None, max_tokens=60, **sampling),
            base_digest=published.base.digest,
            prompt=f"the tide {index}",
        )
        for index in range(16)
    ]

    async def run() -> None:
        async with scene() as one:
            for name, replica in zip("ab", engines, strict=True):
                await one.add(name, replica, published.base.digest)
            undisturbed = await asyncio.gather(*(frames_of(one.fleet, call) for call in calls))
            num_told = [0] * len(calls)

            async def ask(index: int) -> list[Frame]:
                frames = []
                async for frame in one.fleet.generate(calls[index]):
                    frames.append(frame)
                    num_told[index] += 1
                return frames

            asked = [asyncio.create_task(ask(index)) for index in range(len(calls))]
            await until(lambda: min(num_told) >= 5)
            cut(one.hosts["a"])
            disturbed = await asyncio.gather(*asked)
            assert one.fleet.num_replays >= 4
            for before, after in zip(undisturbed, disturbed, strict=True):
                assert [one.token_ids for one in outputs(after)] == [one.token_ids for one in outputs(before)]
                assert text_of(after) == text_of(before)
                assert outputs(after)[-1].finish_reason == outputs(before)[-1].finish_reason
            [channel] = one.hosts["b"].channels
            assert channel.num_messages_sent > 4 * channel.num_frames_sent, "the tokens of a step travel together"

    play(run)


def outputs(frames: Iterable[Frame]) -> list[Output]:
    return [frame for frame in frames if isinstance(frame, Output)]
