"""A replica that does what its prompt says, in a module of its own so that Serve's processes can import it."""

import asyncio
import os
from collections.abc import AsyncGenerator

import ray

from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference.engine import Output
from tidepool.serving.backend import Call, Frame, Started

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

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        match call.prompt:
            case "busy":
                raise EngineBusyError("full")
            case "wrong":
                raise RequestError("wrong")
        try:
            yield Started(os.getpid())
            yield Output((1,), "a")
            if "wait" in str(call.prompt):
                await asyncio.Event().wait()
            yield Output((2,), "b", "stop")
        except asyncio.CancelledError:
            await ray.get_actor(SIGNALS, NAMESPACE).tell.remote(f"cancelled {call.prompt}")
            raise
