"""One request at the backend: its calls, what comes back, and what it costs.

Invariants:
- The calls of a request end together: when all answers are complete, when one call fails, or when the exchange is closed; each is closed
  at the backend then.
- Tokens are counted once, where they come in; an answer ends at the spec's `max_new_tokens`, which a request that names no number can
  reach.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tidepool.errors import ClusterError
from tidepool.inference.engine import Output
from tidepool.serving.access import Admission
from tidepool.serving.api.ask import Answer, Event, usage_of
from tidepool.serving.backend import Backend, Call, Frame, Started
from tidepool.specs import GatewaySpec

_MAX_CALLS_AT_ONCE = 128  # an embedding may have thousands of inputs, and an engine's queue is not for one client


class Exchange:
    """The calls of one request, and the answer made from their frames. With `is_prompt_alone` what answers them is left out."""

    def __init__(
        self, backend: Backend, calls: Sequence[Call], answer: Answer, is_prompt_alone: bool, admission: Admission, spec: GatewaySpec
    ) -> None:
        streams = [backend.generate(call) for call in calls]
        self._frames: AsyncGenerator[Frame | tuple[int, Frame], None] = streams[0] if len(streams) == 1 else _together(streams)
        self._num_calls, self._num_open = len(calls), sum(call.sampling.n for call in calls)
        self._is_prompt_alone = is_prompt_alone
        self._admission, self.answer, self.spec = admission, answer, spec
        self._first: list[tuple[int, Frame]] = []
        self._num_prompt_tokens = 0
        self._num_tokens: Counter[tuple[int, int]] = Counter()
        self._over: set[tuple[int, int]] = set()

    async def start(self) -> None:
        """Wait until the engine has taken all of the request; ends the request if that fails."""
        try:
            num_started = 0
            while num_started < self._num_calls:
                index, frame = await self._next()
                self._first.append((index, frame))
                if isinstance(frame, Started):
                    num_started += 1
                    self._num_prompt_tokens += frame.num_prompt_tokens
                    self._admission.spend(frame.num_prompt_tokens)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        try:
            await self._frames.aclose()
        finally:
            self._admission.leave()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        await self.start()
        async with aclosing(self._frames):
            async for index, frame in self._counted():
                self.answer.take(index, frame)
            return self.answer.whole(self._usage)

    async def events(self) -> AsyncIterator[Event]:
        """The answer as it comes, after `start`."""
        for event in self.answer.opening():
            yield event
        async for index, frame in self._counted():
            for event in self.answer.take(index, frame):
                yield event
        for event in self.answer.ending(self._usage):
            yield event

    @property
    def _usage(self) -> dict[str, int]:
        return usage_of(self._num_prompt_tokens, self._num_tokens.total())

    async def _counted(self) -> AsyncIterator[tuple[int, Frame]]:
        """The frames, up to the end of the last answer."""
        first, self._first = self._first, []
        for index, frame in first:
            if told := self._count(index, frame):
                yield index, told
        while self._num_open:
            index, frame = await self._next()
            self._admission.check()
            if told := self._count(index, frame):
                yield index, told

    async def _next(self) -> tuple[int, Frame]:
        try:
            frame = await anext(self._frames)
        except StopAsyncIteration:
            raise _incomplete() from None
        return frame if isinstance(frame, tuple) else (0, frame)

    def _count(self, index: int, frame: Frame) -> Frame | None:
        """A frame as the client may have it; None if nothing is left of it."""
        if not isinstance(frame, Output):
            return frame
        answer = index, frame.answer
        if answer in self._over:
            return None
        if frame.finish_reason == "cancelled":
            raise _incomplete()
        if self._is_prompt_alone:
            frame = replace(frame, token_ids=(), text="", logprobs=(), finish_reason="length")
        self._num_tokens[answer] += len(frame.token_ids)
        self._admission.spend(len(frame.token_ids))
        limit = self.spec.max_new_tokens
        if limit is not None and frame.finish_reason is None and self._num_tokens[answer] >= limit:
            frame = replace(frame, finish_reason="length")
        if frame.finish_reason is not None:
            self._over.add(answer)
            self._num_open -= 1
        return frame


def _incomplete() -> ClusterError:
    return ClusterError("The replica stopped before the answer was complete: try again.")


async def _together(streams: Sequence[AsyncGenerator[Frame, None]]) -> AsyncGenerator[tuple[int, Frame], None]:
    """The frames of several streams as they come, each with the number of its stream; the first error ends all of them."""
    places = asyncio.Semaphore(_MAX_CALLS_AT_ONCE)
    queue: asyncio.Queue[tuple[int, Frame] | Exception | None] = asyncio.Queue(maxsize=1024)

    async def pass_on(number: int, stream: AsyncGenerator[Frame, None]) -> None:
        async with places, aclosing(stream):
            try:
                async for frame in stream:
                    await queue.put((number, frame))
            except Exception as error:  # noqa: BLE001  it is raised where the frames are read
                await queue.put(error)
                return
        await queue.put(None)

    tasks = [asyncio.create_task(pass_on(*each)) for each in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
