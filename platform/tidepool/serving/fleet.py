"""A gateway's replicas, and the `Backend` made of them: who gets a request, and who finishes it. Knows no Ray.

Invariants:
- A replica that dies, is silent for `SILENCE_S`, or hands a request back costs its client nothing but time (`serving.replay`).
- A replica that is busy, or cannot get the adapter, is passed over while there is another one; a client learns of it when none is
  left, unless it has been promised an answer: then it waits.
- A request to a base that has no replica now waits for one, for as long as its gateway lets it.
- A request whose frames are closed is cancelled at its replica.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from dataclasses import replace

from tidepool.errors import ClusterError, EngineBusyError, ModelError, StoreError
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame
from tidepool.serving.channel import Channel, ChannelClosedError, connect
from tidepool.serving.plan import base_digest_of
from tidepool.serving.prefixes import prefix_digests
from tidepool.serving.replay import Replay
from tidepool.serving.router import Need, ReplicaState, choose
from tidepool.serving.wire import (
    TO_GATEWAY,
    TO_REPLICA,
    Cancel,
    Done,
    Endpoint,
    Failed,
    Gone,
    HandedBackError,
    ReplicaLostError,
    Report,
    Submit,
    ToGateway,
    Told,
    ToReplica,
    Warm,
    error_of,
)

SILENCE_S = 10.0
_RETRY_S = (0.1, 0.2, 0.5, 1.0)
_WAKE_AGAIN_S = 5.0
_TAKEN_RETRY_S = 0.5
_logger = logging.getLogger(__name__)

Wake = Callable[[str], Awaitable[None]]


class Link:
    """One replica as a gateway knows it: connected, or trying to be, until it is closed."""

    def __init__(self, endpoint: Endpoint, changed: Callable[[], None], silence_s: float = SILENCE_S) -> None:
        self.endpoint, self._changed, self._silence_s = endpoint, changed, silence_s
        self._channel: Channel[ToReplica, ToGateway] | None = None
        self._reported: ReplicaState | None = None
        self._asked: dict[str, asyncio.Queue[Told | Done | Failed | Gone]] = {}
        self._num_asked_then = 0  # when the last report came
        self._task = asyncio.create_task(self._stay_connected())

    @property
    def state(self) -> ReplicaState | None:
        """What it reported, and what was asked of it since then; None while it is not connected."""
        if self._reported is None:
            return None
        load = self._reported.num_running + self._reported.num_queued + len(self._asked) - self._num_asked_then
        return replace(self._reported, num_running=0, num_queued=max(load, len(self._asked)))

    async def ask(self, call: Call, need: Need) -> AsyncGenerator[Frame, None]:
        """The frames of a call. Raises what the replica raised, `ReplicaLostError`."""
        self._expect(need)
        async with aclosing(self._say(call.request_id, Submit(call))) as frames:
            async for frame in frames:
                yield frame

    async def warm(self, version: ModelVersion) -> None:
        """Have an adapter loaded. Raises what the replica raised, `ReplicaLostError`."""
        request_id = f"warm-{secrets.token_hex(8)}"
        async with aclosing(self._say(request_id, Warm(request_id, version))) as frames:
            async for _ in frames:
                pass

    def _expect(self, need: Need) -> None:
        """It is about to hold what this request needs."""
        known = self._reported
        adapters = {need.adapter} if need.adapter is not None else set()
        if known is not None and not (adapters <= known.adapters and known.prefixes.issuperset(need.prefixes)):
            self._reported = replace(known, adapters=known.adapters | adapters, prefixes=known.prefixes.union(need.prefixes))

    async def _say(self, request_id: str, message: Submit | Warm) -> AsyncGenerator[Frame, None]:
        """Say something that is answered by frames and an end."""
        channel = self._channel
        if channel is None:
            raise ReplicaLostError("The replica is not connected.")
        answers = self._asked[request_id] = asyncio.Queue()
        channel.send(message)
        is_over = False
        try:
            while not is_over:
                answer = await answers.get()
                is_over = not isinstance(answer, Told)
                match answer:
                    case Told(_, frame):
                        yield frame
                    case Failed():
                        raise error_of(answer)
                    case Gone(_, is_handed_back):
                        raise (HandedBackError if is_handed_back else ReplicaLostError)("The replica that served this request is gone.")
        finally:
            del self._asked[request_id]
            if not is_over:
                channel.send(Cancel(request_id))

    async def close(self) -> None:
        """Leave the replica, which cancels what was asked of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _stay_connected(self) -> None:
        end = self.endpoint
        num_failures = 0
        while True:
            try:
                self._channel = await connect(end.host, end.port, end.secret, TO_REPLICA, TO_GATEWAY)
                num_failures = 0
                await self._listen(self._channel)
            except (ChannelClosedError, TimeoutError) as error:
                _logger.info("Replica %s is not connected: %s", end.replica_id, error)
            finally:
                self._lose()
            await asyncio.sleep(_RETRY_S[min(num_failures, len(_RETRY_S) - 1)])
            num_failures += 1

    async def _listen(self, channel: Channel[ToReplica, ToGateway]) -> None:
        while True:
            async with asyncio.timeout(self._silence_s):
                messages = await channel.receive()
            for message in messages:
                if isinstance(message, Report):
                    self._take_report(message)
                elif asked := self._asked.get(message.request_id):
                    asked.put_nowait(message)

    def _take_report(self, report: Report) -> None:
        before = self._reported
        state = report.state
        if not report.has_prefixes and before is not None:
            state = replace(state, prefixes=before.prefixes)
        self._reported, self._num_asked_then = state, len(self._asked)
        if before is None or before.is_leaving != state.is_leaving:
            self._changed()

    def _lose(self) -> None:
        """The connection is over: whoever waits for something is told."""
        channel, self._channel, self._reported = self._channel, None, None
        if channel is not None:
            channel.close()
        for request_id, answers in self._asked.items():
            answers.put_nowait(Gone(request_id))
        self._changed()


class Fleet:
    """The `Backend` of all replicas that a gateway has heard of.

    `wake` is called with the digest of a base that a request waits for, and returns once it may have a replica.
    """

    def __init__(self, wake: Wake | None = None, silence_s: float = SILENCE_S) -> None:
        self._wake, self._silence_s = wake, silence_s
        self._listed: dict[str, Endpoint] = {}
        self._links: dict[str, Link] = {}
        self._next_change: asyncio.Event = asyncio.Event()
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_replays = 0

    def update(self, endpoints: Iterable[Endpoint]) -> None:
        """These are the replicas that there are. One that is not among them is forgotten once it is not connected any more."""
        self._listed = {endpoint.replica_id: endpoint for endpoint in endpoints}
        for replica_id, endpoint in self._listed.items():
            if replica_id not in self._links:
                self._links[replica_id] = Link(endpoint, self._change, self._silence_s)
        self._change()

    async def prepare(self, version: ModelVersion, instead_of: ModelVersion | None = None) -> None:
        """Have an adapter loaded where its requests will go; returns when the first replica has it, or if there is none.

        That is where the version is that it replaces, else at the replica of its base that has the least to do. Raises what loading it
        raised if it failed everywhere.
        """
        base_digest = base_digest_of(version)
        if version.kind != "adapter" or base_digest is None:
            return
        states = self.states(base_digest)
        names = [name for name, state in states.items() if instead_of is not None and instead_of.digest in state.adapters]
        if not names and (name := choose(states, Need(version.digest))) is not None:
            names = [name]
        tasks = {self._keep(self._links[name].warm(version)) for name in names}
        error: BaseException | None = None
        while tasks:  # those that are left go on by themselves
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is None:
                    return
        if error is not None and not isinstance(error, ReplicaLostError):
            raise error

    def states(self, base_digest: str) -> dict[str, ReplicaState]:
        """The replicas of a base that are connected."""
        links = {name: link for name, link in self._links.items() if link.endpoint.base_digest == base_digest}
        return {name: state for name, link in links.items() if (state := link.state) is not None}

    async def close(self) -> None:
        """Leave all replicas."""
        for task in [*self._waking.values(), *self._tasks]:
            task.cancel()
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._tasks, return_exceptions=True)

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """See `Backend.generate`."""
        replay = Replay(call)
        need = Need(call.adapter.digest if call.adapter else None, prefix_digests(call) if call.task == "generate" else ())
        num_asked, unable = 0, set[str]()
        while True:
            link = await self._link_for(call.base_digest, need, unable)
            num_asked += 1
            attempt = replace(replay.call, request_id=f"{call.request_id}.{num_asked}")
            try:
                async with aclosing(link.ask(attempt, need)) as frames:
                    async for frame in frames:
                        if (told := replay.take(frame)) is not None:
                            yield told
                return
            except (EngineBusyError, ModelError, StoreError):
                unable.add(link.endpoint.replica_id)
                if self._choose(call.base_digest, need, unable) is None:
                    if not replay.is_taken:
                        raise
                    await asyncio.sleep(_TAKEN_RETRY_S)  # it was promised an answer
                    unable.clear()
            except ReplicaLostError as error:
                if not isinstance(error, HandedBackError):
                    replay.lose()
                self.num_replays += 1
                unable.clear()

    async def _link_for(self, base_digest: str, need: Need, but: set[str]) -> Link:
        while (link := self._choose(base_digest, need, but)) is None:
            self._start_waking(base_digest)
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAKE_AGAIN_S):
                    await self._next_change.wait()
        return link

    def _choose(self, base_digest: str, need: Need, but: set[str]) -> Link | None:
        chosen = choose(self.states(base_digest), need, but)
        return None if chosen is None else self._links[chosen]

    def _start_waking(self, base_digest: str) -> None:
        if self._wake is not None and base_digest not in self._waking:
            task = self._waking[base_digest] = asyncio.create_task(self._wake_up(base_digest))
            task.add_done_callback(lambda _: self._waking.pop(base_digest))

    async def _wake_up(self, base_digest: str) -> None:
        assert self._wake is not None
        try:
            await self._wake(base_digest)
        except ClusterError as error:  # who waits asks again
            _logger.warning("No replica of the base %s could be asked for: %s", base_digest[:12], error)

    def _change(self) -> None:
        """Something is there or gone: forget what is gone for good, and let those look again who wait."""
        for replica_id in [name for name, link in self._links.items() if name not in self._listed and link.state is None]:
            self._keep(self._links.pop(replica_id).close())
        change, self._next_change = self._next_change, asyncio.Event()
        change.set()

    def _keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """A task that `close` ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # who waits for it hears of it, if anybody does
        return task
