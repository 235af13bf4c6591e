"""A replica that does what its prompt says, in a module of its own so that Serve's processes can import it."""

import asyncio
import os
from collections.abc import AsyncGenerator

import ray
from ray import serve

from tests.serving.fakes import BASE_DIGEST
from tidepool.announcement import DIRECTORY
from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference.engine import Output
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame, Started
from tidepool.serving.engines import Presence
from tidepool.serving.host import Load, ReplicaHost

SIGNALS, NAMESPACE = "signals", "serving-test"


@ray.remote(num_cpus=0)
class Signals:
    """What a replica tells the test."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._changed = asyncio.Event()

    async def tell(self, what: str) -> None:
        self._seen.add(what)
        self._changed.set()

    async def wait_for(self, what: str) -> None:
        while what not in self._seen:
            self._changed.clear()
            await self._changed.wait()


class Obedient:
    """Does what the prompt says, and tells when it was cancelled."""

    def load(self) -> Load:
        return Load(0, 0, frozenset(), 10, 10, 1000)

    async def load_adapter(self, version: ModelVersion) -> None:
        raise AssertionError(version)

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        match call.prompt:
            case "busy":
                raise EngineBusyError("full")
            case "wrong":
                raise RequestError("wrong")
        try:
            yield Started(os.getpid())
            if not (call.resumed and call.resumed[0]):
                yield Output((1,), "a")
                if "wait" in str(call.prompt):
                    await asyncio.Event().wait()
                elif "hold" in str(call.prompt):
                    await ray.get_actor(SIGNALS, NAMESPACE).wait_for.remote("go on")
            yield Output((2,), "b", "stop")
        except asyncio.CancelledError:
            await ray.get_actor(SIGNALS, NAMESPACE).tell.remote(f"cancelled {call.prompt}")
            raise


class ObedientReplica:
    """The same as a deployment of Serve's, where gateways find it as they find replicas of engines."""

    async def __init__(self, application: str) -> None:  # type: ignore[misc]
        self._host = ReplicaHost(Obedient())
        endpoint = await self._host.open(f"obedient-{os.getpid()}", BASE_DIGEST, "127.0.0.1")
        self._presence = Presence(endpoint, serve.get_deployment_handle(DIRECTORY, application), lambda: self._host.is_busy)

    async def __del__(self) -> None:
        await self._presence.end()
        await self._host.leave(0.1)
