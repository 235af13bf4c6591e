"""The plain batched engine: continuous batching with left-padded key-value caches, one batch for each adapter in use.

The life of a request: (1) `submit` checks it and puts it into the schedule; (2) it waits until fewer than `max_batch_size`
run; (3) in a turn of its adapter's group it is prefilled and joins the group's batch; (4) each further turn gives it a
token, and its stream an output; (5) a token, a stop string, its length, its client or a failure ends it.

Invariants:
- Everything here runs in the event loop; the model is touched only by the one compute thread, a turn or a change of
  adapters at a time. The loop never waits for it but with `await`.
- A greedy or seeded request gets the same tokens alone and in any company, but for what the model's arithmetic owes to the
  shape of a batch: a near tie between two tokens, and rotary frequencies that follow the longest row (RoPE of the types
  dynamic and longrope, beyond the model's original context).
- A request whose client left, however it left, is computed no further than the turn that is going on.

Prompts are computed whole, and no cache is shared between requests.
"""

import asyncio
import math
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.errors import EngineBusyError, ModelError, RequestError
from tidepool.inference.engine import EngineStats, GenerationRequest, Output, SamplingParameters
from tidepool.inference.runner import Attach, ModelRunner, Result
from tidepool.inference.schedule import Schedule
from tidepool.inference.sequence import Sequence, find_end_tokens
from tidepool.specs import EngineSpec

T = TypeVar("T")


class Stream(AsyncIterator[Output]):
    """The outputs of one request. Left early (`aclose`, a cancelled wait, or no longer referenced), it cancels the request."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._items: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._is_over = False

    def put(self, item: Output | Exception) -> None:
        self._items.put_nowait(item)

    async def __anext__(self) -> Output:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._is_over = isinstance(item, Exception) or item.finish_reason is not None
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        """Leave; nothing if the stream is over."""
        if not self._is_over:
            self._is_over = True
            self._leave()


@dataclass(frozen=True, eq=False)
class _Live:
    """A request that has not ended. Only its client holds the stream, so that the engine notices when nobody does."""

    sequence: Sequence
    stream: weakref.ref[Stream]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class BatchedEngine:
    """An `Engine` of a model in eval mode, which nobody else may use from now on, and its tokenizer.

    Raises `ModelError` for a model that it cannot run.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EngineSpec, attach: Attach) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self.context_length = _context_length(model, spec)
        """Tokens that a prompt and its answer have room for together."""
        self._num_tokens = int(model.get_input_embeddings().weight.shape[0])
        self._end_tokens = find_end_tokens(model, tokenizer)
        self._runner = ModelRunner(model, attach)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._schedule = Schedule(spec.max_batch_size)
        self._live: dict[str, _Live] = {}
        self._driver: asyncio.Task[None] | None = None
        self._num_generated_tokens = 0
        self._is_closed = False
        self._adapters: dict[str, None] = {}  # those that requests may use, the least recently used first
        self._leaving: set[str] = set()  # those that only requests in flight use
        self._changes: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # --- Requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Stream:
        """See `Engine.submit`."""
        assert not self._is_closed
        self._check(request)
        if not self._schedule.has_room and self._schedule.num_waiting >= self._spec.max_queued_requests:
            raise EngineBusyError(
                f"{self._schedule.num_running} requests are running and {self._schedule.num_waiting} waiting, the most that this engine "
                "takes. Try again later, add replicas, or raise engine.max_queued_requests."
            )
        if request.adapter is not None:
            self._touch(request.adapter)
        sequence = Sequence(request, self._tokenizer, self._end_tokens, self.context_length)
        stream = Stream(lambda: self._end(live))
        live = self._live[request.request_id] = _Live(sequence, weakref.ref(stream))
        self._schedule.add(sequence)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        return stream

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if live := self._live.get(request_id):
            self._end(live, Output((), "", "cancelled"))

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return EngineStats(self._schedule.num_running, self._schedule.num_waiting, self._num_generated_tokens, tuple(self._adapters))

    async def close(self) -> None:
        """End all requests as cancelled, and the compute thread after its current turn. Nothing can be submitted afterwards."""
        self._is_closed = True
        for request_id in list(self._live):
            self.cancel(request_id)
        await asyncio.gather(*self._changes, *([self._driver] if self._driver else []), return_exceptions=True)
        self._thread.shutdown()

    async def _drive(self) -> None:
        while turn := self._schedule.next_turn():
            group, sequences = turn
            for result in await self._compute(lambda: self._runner.take_turn(group, sequences)):  # noqa: B023 awaited at once
                self._deliver(result)

    def _deliver(self, result: Result) -> None:
        sequence, item = result
        live = self._live.get(sequence.request.request_id)
        if live is None or live.sequence is not sequence:  # cancelled during the turn
            return
        if isinstance(item, Output):
            self._num_generated_tokens += len(item.token_ids)
        stream = live.stream()
        if stream is None:
            self._end(live)
        elif isinstance(item, Exception) or item.finish_reason:
            self._end(live, item)
        else:
            stream.put(item)

    def _end(self, live: _Live, item: Output | Exception | None = None) -> None:
        if live.ended.is_set():
            return
        live.ended.set()
        del self._live[live.sequence.request.request_id]
        self._schedule.remove(live.sequence)
        if item is not None and (stream := live.stream()):
            stream.put(item)

    async def _compute(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _check(self, request: GenerationRequest) -> None:
        prompt = request.prompt_tokens
        if not prompt:
            raise RequestError("The prompt is empty: give at least one token.")
        if len(prompt) >= self.context_length:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, and the context of {self.context_length} must hold at least one more: shorten it."
            )
        if unknown := [token for token in prompt if not 0 <= token < self._num_tokens]:
            raise RequestError(f"The model has no token {unknown[0]}: its tokens are 0 to {self._num_tokens - 1}. Use its own tokenizer.")
        if request.request_id in self._live:
            raise RequestError(f"A request with the id {request.request_id} is in flight: give each request an id of its own.")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise RequestError(f"The adapter {request.adapter[:12]} is not loaded: load it first.")
        _check_sampling(request.sampling)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def load_adapter(self, digest: str, folder: Path) -> None:
        """See `Engine.load_adapter`. With `max_adapters` there, the least recently used idle one goes.

        Raises `EngineBusyError` if all of them are in use.
        """
        await self._change(lambda: self._load(digest, folder))

    async def drop_adapter(self, digest: str) -> None:
        """See `Engine.drop_adapter`. New requests cannot use it, unless it is loaded again before the last one has ended."""
        if digest in self._adapters:
            del self._adapters[digest]
            self._leaving.add(digest)
        while digest in self._leaving and (live := self._user_of(digest)):
            await live.ended.wait()
        await self._change(lambda: self._forget(digest))

    async def _change(self, change: Callable[[], Coroutine[None, None, None]]) -> None:
        """Make a change after those before it, and to its end whether or not the caller is cancelled: the model is shared."""

        async def in_turn() -> None:
            async with self._changing:
                await change()

        task = asyncio.get_running_loop().create_task(in_turn())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _load(self, digest: str, folder: Path) -> None:
        if digest in self._adapters or digest in self._leaving:
            self._leaving.discard(digest)
            self._touch(digest)
            return
        # Out of use before the new one is there, so that no request starts with it; it goes when the new one has come.
        victim = self._make_room()
        try:
            await self._compute(lambda: self._runner.attach(digest, folder))
        except BaseException:
            if victim is not None:
                self._adapters = {victim: None, **self._adapters}
            raise
        self._adapters[digest] = None
        if victim is not None:
            await self._compute(lambda: self._runner.detach(victim))

    def _make_room(self) -> str | None:
        """The adapter that has to go, taken from those that requests may use."""
        if len(self._adapters) + len(self._leaving) < self._spec.max_adapters:
            return None
        victim = next((digest for digest in self._adapters if not self._user_of(digest)), None)
        if victim is None:
            raise EngineBusyError(
                f"All {self._spec.max_adapters} adapters of this engine are in use. Try again later, or raise engine.max_adapters."
            )
        del self._adapters[victim]
        return victim

    async def _forget(self, digest: str) -> None:
        if digest in self._leaving and not self._user_of(digest):  # else it has been loaded again meanwhile, or dropped twice
            self._leaving.remove(digest)
            await self._compute(lambda: self._runner.detach(digest))

    def _user_of(self, digest: str) -> _Live | None:
        return next((live for live in self._live.values() if live.sequence.request.adapter == digest), None)

    def _touch(self, digest: str) -> None:
        self._adapters.pop(digest, None)
        self._adapters[digest] = None


def _context_length(model: PreTrainedModel, spec: EngineSpec) -> int:
    of_model = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [length for length in (of_model, spec.max_sequence_length) if length is not None]
    if not lengths:
        raise ModelError("The model's config.json does not say how long its context is: set engine.max_sequence_length.")
    return min(lengths)


def _check_sampling(sampling: SamplingParameters) -> None:
    if sampling.max_tokens < 1:
        raise RequestError(f"max_tokens is {sampling.max_tokens}: ask for at least one.")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise RequestError(f"temperature is {sampling.temperature}: give a number that is not negative.")
    if not 0 < sampling.top_p <= 1:
        raise RequestError(f"top_p is {sampling.top_p}: give a number above 0, and 1 at most.")
    if "" in sampling.stop:
        raise RequestError("A stop string is empty: leave it out.")
