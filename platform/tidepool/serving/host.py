"""A replica as gateways reach it: calls come in over their channels, frames go out, and its state with them. Knows no Ray.

Invariants:
- A request is told to the gateway that submitted it, and cancelled when that one cancels it or is gone.
- Each request ends with one of done, failed or gone, unless its gateway left first.
- Once the replica leaves it takes nothing new. What is not finished within its patience is handed back as gone, so that the gateway
  has another replica finish it.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from tidepool.errors import TidepoolError
from tidepool.inference.engine import Output
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame, Started
from tidepool.serving.channel import Channel, listen
from tidepool.serving.prefixes import HeldPrefixes, prefix_digests
from tidepool.serving.router import ReplicaState
from tidepool.serving.waiting import Waits
from tidepool.serving.wire import (
    TO_GATEWAY,
    TO_REPLICA,
    Cancel,
    Done,
    Endpoint,
    Gone,
    Report,
    Submit,
    ToGateway,
    Told,
    ToReplica,
    Warm,
    failure,
)

REPORT_EVERY_S = 0.5
_logger = logging.getLogger(__name__)

ToOneGateway = Channel[ToGateway, ToReplica]


@dataclass(frozen=True)
class Load:
    """How busy a replica is; `adapters` are those that are loaded or on their way."""

    num_running: int
    num_queued: int
    adapters: frozenset[str]
    num_free_blocks: int
    num_blocks: int
    num_cache_tokens: int
    has_failed: bool = False


class Served(Protocol):
    """What a host serves: a `Replica`."""

    def generate(self, call: Call) -> AsyncGenerator[Frame, None]: ...

    async def load_adapter(self, version: ModelVersion) -> None: ...

    def load(self) -> Load: ...


@dataclass(eq=False)
class _Visit:
    """A gateway that is connected, and what it has submitted."""

    channel: ToOneGateway
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    num_changes_known: int = -1  # of the prefixes


class ReplicaHost:
    """Serves one replica to any number of gateways, in one event loop."""

    def __init__(self, replica: Served, report_every_s: float = REPORT_EVERY_S) -> None:
        self._replica, self._report_every_s = replica, report_every_s
        self._prefixes = HeldPrefixes(replica.load().num_cache_tokens)
        self._waits = Waits(time.monotonic)
        self._visits: set[_Visit] = set()
        self._server: asyncio.Server | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self, replica_id: str, base_digest: str, host: str) -> Endpoint:
        """Listen on a free port of a host; returns where, with a new secret."""
        secret = secrets.token_hex(32)
        self._server = await listen(host, secret, TO_GATEWAY, TO_REPLICA, self._visit)
        self._reporting = asyncio.create_task(self._report_regularly())
        return Endpoint(replica_id, base_digest, host, self._server.sockets[0].getsockname()[1], secret)

    @property
    def channels(self) -> Iterable[ToOneGateway]:
        """Those of the gateways that are connected."""
        return [visit.channel for visit in self._visits]

    @property
    def is_busy(self) -> bool:
        """Whether anything that was asked for is not finished."""
        return not self._idle.is_set()

    @property
    def ttft_s(self) -> float:
        """How long requests wait for their first token here, see `Waits`."""
        return self._waits.ttft_s

    async def leave(self, patience_s: float) -> None:
        """Take nothing new, finish what ends within a time, hand the rest back, and close."""
        self._is_leaving = True
        self._report()
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
        except TimeoutError:
            _logger.info("Handing %d requests to other replicas.", sum(len(visit.tasks) for visit in self._visits))
        await self.close()

    async def close(self) -> None:
        """Hand all requests back, and close."""
        if self._server is not None:
            self._server.close()
        if self._reporting is not None:
            self._reporting.cancel()
        visits = list(self._visits)
        for visit in visits:
            for request_id in visit.tasks:
                visit.channel.send(Gone(request_id, is_handed_back=True))
            visit.channel.close()
        tasks = [task for visit in visits for task in visit.tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(visit.channel.wait_closed() for visit in visits), return_exceptions=True)

    # --- One gateway -------------------------------------------------------------------------------------------------

    async def _visit(self, channel: ToOneGateway) -> None:
        visit = _Visit(channel)
        self._visits.add(visit)
        self._report()
        try:
            while True:
                for message in await channel.receive():
                    self._take(visit, message)
        finally:
            self._visits.discard(visit)
            for task in visit.tasks.values():
                task.cancel()

    def _take(self, visit: _Visit, message: ToReplica) -> None:
        match message:
            case Submit(call):
                self._start(visit, call.request_id, self._tell(visit.channel, call))
            case Warm(request_id, version):
                self._start(visit, request_id, self._replica.load_adapter(version))
            case Cancel(request_id):
                if request_id in visit.tasks:
                    visit.tasks[request_id].cancel()

    def _start(self, visit: _Visit, request_id: str, work: Coroutine[None, None, None]) -> None:
        """Do what was asked for, unless this replica leaves."""
        assert request_id not in visit.tasks
        if self._is_leaving:
            work.close()
            visit.channel.send(Gone(request_id, is_handed_back=True))
            return
        self._idle.clear()
        task = visit.tasks[request_id] = asyncio.create_task(self._do(visit.channel, request_id, work))
        task.add_done_callback(lambda _: self._forget(visit, request_id))

    def _forget(self, visit: _Visit, request_id: str) -> None:
        del visit.tasks[request_id]
        if not any(one.tasks for one in self._visits):
            self._idle.set()

    async def _do(self, channel: ToOneGateway, request_id: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
            channel.send(Done(request_id))
        except _EngineClosedError:
            channel.send(Gone(request_id))
        except Exception as error:  # noqa: BLE001 whatever it is, the gateway is told, and the others' requests go on
            if self._replica.load().has_failed:  # the engine's own fault, not the request's
                self._report()
                channel.send(Gone(request_id))
                return
            if not isinstance(error, TidepoolError):
                _logger.error("A request failed with %s.", type(error).__name__)  # its message may quote the prompt
            channel.send(failure(request_id, error))

    async def _tell(self, channel: ToOneGateway, call: Call) -> None:
        self._waits.begin(call.request_id)
        try:
            async with aclosing(self._replica.generate(call)) as frames:
                async for frame in frames:
                    if isinstance(frame, Output) and frame.finish_reason == "cancelled":
                        raise _EngineClosedError
                    if isinstance(frame, Started) and call.task == "generate":
                        self._prefixes.add(prefix_digests(call))
                    else:
                        self._waits.answer(call.request_id)
                    channel.send(Told(call.request_id, frame))
        finally:
            self._waits.leave(call.request_id)

    # --- Reports -----------------------------------------------------------------------------------------------------

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._report_every_s)
            self._report()

    def _report(self) -> None:
        load = self._replica.load()
        state = ReplicaState(
            load.adapters,
            frozenset(),
            load.num_running,
            load.num_queued,
            load.num_free_blocks,
            load.num_blocks,
            self._is_leaving or load.has_failed,
        )
        for visit in self._visits:
            if visit.num_changes_known == self._prefixes.num_changes:
                visit.channel.send(Report(state, has_prefixes=False))
            else:
                visit.channel.send(Report(replace(state, prefixes=frozenset(self._prefixes.digests))))
                visit.num_changes_known = self._prefixes.num_changes


class _EngineClosedError(Exception):
    """The engine ended a request that nobody cancelled."""
