"""Whether requests can be answered: each base that is served has a replica that answers.

Asked of the replicas themselves, by the tokens of an empty text, which takes no turn of an engine. Those who ask at one time share one
question, and its answer holds for a second: nobody needs a key for it.
"""

import asyncio
import time
import uuid
from contextlib import aclosing

from tidepool.errors import EngineBusyError, TidepoolError
from tidepool.serving.backend import Backend, Call
from tidepool.serving.plan import base_digest_of
from tidepool.serving.resolver import Resolver

_TIMEOUT_S = 5.0
_MAX_AGE_S = 1.0


class Readiness:
    """Of one gateway, in one event loop."""

    def __init__(self, resolver: Resolver, backend: Backend) -> None:
        self._resolver, self._backend = resolver, backend
        self._asking: asyncio.Task[bool] | None = None
        self._asked_at = -float("inf")

    async def is_ready(self) -> bool:
        """Whether every base has a replica that answers now."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at > _MAX_AGE_S):
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        try:
            versions = await self._resolver.models()
        except TidepoolError:
            return False
        digests = {digest for version in versions.values() if (digest := base_digest_of(version))}
        answers = await asyncio.gather(*map(self._answers, digests))
        self._asked_at = time.monotonic()
        return all(answers)

    async def _answers(self, base_digest: str) -> bool:
        frames = self._backend.generate(Call(f"ready-{uuid.uuid4().hex}", base_digest, None, "", task="tokenize"))
        try:
            async with asyncio.timeout(_TIMEOUT_S), aclosing(frames):
                await anext(frames)
        except EngineBusyError:  # it is there
            return True
        except (TidepoolError, TimeoutError):
            return False
        return True
