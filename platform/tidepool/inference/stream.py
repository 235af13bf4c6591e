"""The outputs of one request on their way to its client, in one event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable

from tidepool.inference.engine import Output


class Stream(AsyncIterator[Output]):
    """The outputs of one request. Left early (`aclose`, a cancelled wait, or no longer referenced), it cancels the request."""

    def __init__(self, num_answers: int, leave: Callable[[], None]) -> None:
        self._num_open = num_answers
        self._leave = leave
        self._items: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def put(self, item: Output | Exception) -> None:
        """An error is the last item; else the last answer's end is."""
        self._items.put_nowait(item)

    async def __anext__(self) -> Output:
        if not self._num_open:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, Exception):
            self._num_open = 0
            raise item
        self._num_open -= item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Leave; nothing if the stream is over."""
        if self._num_open:
            self._num_open = 0
            self._leave()
