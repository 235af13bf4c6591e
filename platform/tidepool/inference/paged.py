"""The engine: continuous batching over a paged cache. `_drive` shows all of it: schedule, run, postprocess.

The life of a request: (1) `submit` checks it and makes its answers, which wait in the scheduler; (2) the scheduler lets them run as
places, blocks and fairness allow; (3) each step computes a piece of a prompt, or a token for everybody who answers; (4) its stream gets
an output for each token; (5) a token, a stop string, its length, its client or a failure ends it, and its blocks are free at once.

Invariants:
- Everything here runs in the event loop; the model is touched only by the one compute thread, a step or a change of adapters at
  a time. The loop never waits for it but with `await`.
- A greedy or seeded request gets the same tokens alone and in any company, cut, preempted or found in the cache, but for what the
  model's arithmetic owes to the shape of a batch: a near tie between two tokens.
- A request whose client left, however it left, is computed no further than the step that is going on.
- The text of a step's tokens is made while the next step computes.
- On a GPU a step is launched before the tokens of the one before it are known, unless somebody's next token depends on more than
  logits; at most two are on their way.
"""

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.errors import EngineBusyError, ModelError, RequestError
from tidepool.inference.adapters import Adapters
from tidepool.inference.answer import Answer, find_end_tokens
from tidepool.inference.blocks import Blocks
from tidepool.inference.engine import EngineStats, FinishReason, GenerationRequest, Output, TokenLogprobs
from tidepool.inference.fused import fuse
from tidepool.inference.grammar import CompiledGrammar, Grammars
from tidepool.inference.graphs import cuda_graphs
from tidepool.inference.limits import BLOCK_SIZE, adapters_bytes, context_length, num_blocks
from tidepool.inference.linear import swap_linear_layers
from tidepool.inference.lora import Matrices, pack
from tidepool.inference.runner import Computed, Flight, ModelRunner, Placement
from tidepool.inference.scheduler import Chunk, Scheduler
from tidepool.inference.sequence import Sequence
from tidepool.inference.stream import Stream
from tidepool.openmp import end_workers
from tidepool.specs import EngineSpec

T = TypeVar("T")
log = logging.getLogger(__name__)


class ReadAdapter(Protocol):
    """Reads the adapter in a folder: its matrices by the names of linear layers, given those layers' sizes and which makes the logits.

    Raises `ModelError` (`BaseMismatchError`) if it does not belong to the model.
    """

    def __call__(self, folder: Path, sizes: Mapping[str, tuple[int, int]], output_layer: str | None, /) -> Mapping[str, Matrices]: ...


@dataclass(eq=False)
class _Live:
    """A request that has not ended. Only its client holds the stream, so that the engine notices when nobody does."""

    request: GenerationRequest
    stream: weakref.ref[Stream]
    answers: list[Answer] = field(default_factory=list)  # none before its grammar is there
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class _Accepted:
    """A token whose text is not made yet."""

    live: _Live
    answer: Answer
    token: int
    logprobs: TokenLogprobs | None
    reason: FinishReason | None


@dataclass(frozen=True)
class _Step:
    """A step that has been launched; `is_expected`: the scheduler counts it as computed."""

    flight: Future[Flight]
    is_expected: bool


class PagedEngine:
    """An `Engine` of a model in eval mode, which nobody else may use from now on, and its tokenizer.

    `is_ahead`: a step is launched before the tokens of the one before it are known (None: on a GPU; never with guesses, which are
    made of known tokens). Raises `ModelError` for a model that it cannot run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: EngineSpec,
        read: ReadAdapter,
        is_ahead: bool | None = None,
    ) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self.context_length = context_length(model, spec)
        """Tokens that a prompt and its answer have room for together."""
        self._num_tokens = int(model.get_input_embeddings().weight.shape[0])
        self._end_tokens = find_end_tokens(model, tokenizer)
        self._grammars = Grammars(tokenizer, self._end_tokens, self._num_tokens)
        self._runner = ModelRunner(model, BLOCK_SIZE, spec.batch_invariant)
        swap_linear_layers(model, spec.weights, spec.batch_invariant)
        fuse(model)
        self._blocks = Blocks(num_blocks(spec, self.context_length, self._runner.block_size_bytes, model.device), BLOCK_SIZE)
        layers = self._runner.allocate(self._blocks.num_blocks, spec.max_adapters)
        if model.device.type != "cpu":
            max_rows, num_columns = spec.max_batch_size * (1 + spec.speculative_tokens), -(-self.context_length // BLOCK_SIZE)
            self._runner.record(max_rows, num_columns, cuda_graphs())
        max_step_tokens = max(spec.max_step_tokens, spec.max_batch_size)
        self._scheduler = Scheduler(self._blocks, spec.max_batch_size, max_step_tokens, spec.max_adapters, spec.speculative_tokens)
        self._is_ahead = (model.device.type != "cpu" if is_ahead is None else is_ahead) and not spec.speculative_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._uncomputed: dict[int, Exception] = {}  # blocks of the step before that failed
        self._guesses = spec.speculative_tokens > 0
        self._live: dict[str, _Live] = {}
        self._of_sequence: dict[Sequence, tuple[_Live, Answer]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._num_generated_tokens = 0
        self._is_closed = self._has_failed = False
        self._tasks: set[asyncio.Task[None]] = set()  # grammars being compiled
        self._adapters = Adapters(
            lambda folder: pack(read(folder, layers.sizes, layers.output_layer), model.dtype, model.device.type == "cuda"),
            adapters_bytes(spec),
            lambda digest: self._user_of(digest) is not None,
            self._empty_slot,
        )
        end_workers()  # of the thread that has made all this: the compute thread has its own

    # --- Requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Stream:
        """See `Engine.submit`."""
        if self._has_failed:
            raise ModelError("This engine has failed and takes no more requests (its log says why); its replica is replaced: try again.")
        assert not self._is_closed
        self._check(request)
        if request.adapter is not None:
            self._adapters.touch(request.adapter)
        stream = Stream(request.sampling.n, lambda: self._end(live))
        live = self._live[request.request_id] = _Live(request, weakref.ref(stream))
        if request.sampling.has_grammar:
            self._keep(self._start_with_grammar(live))
        else:
            self._start(live, None)
        return stream

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if live := self._live.get(request_id):
            open_answers = [answer.number for answer in live.answers if not answer.is_over]
            for number in open_answers if live.answers else range(live.request.sampling.n):
                self._tell(live, Output((), "", "cancelled", number))
            self._end(live)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        num_compiling = sum(live.request.sampling.n for live in self._live.values() if not live.answers)
        return EngineStats(
            self._scheduler.num_running,
            self._scheduler.num_waiting + num_compiling,
            self._num_generated_tokens,
            self._adapters.digests,
            **asdict(self._scheduler.counters),
            num_free_blocks=self._blocks.num_free,
            num_blocks=self._blocks.num_blocks,
            has_failed=self._has_failed,
        )

    async def close(self) -> None:
        """End all requests as cancelled, and the compute thread after its current step. Nothing can be submitted afterwards."""
        self._is_closed = True
        for request_id in list(self._live):
            self.cancel(request_id)
        await asyncio.gather(*self._tasks, *([self._driver] if self._driver else []), return_exceptions=True)
        await self._adapters.close()
        self._grammars.close()
        self._thread.shutdown()

    # --- Steps -------------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        accepted: list[_Accepted] = []
        steps: deque[_Step] = deque()  # launched: one, or two where the second needs nothing that the first one brings to the host
        while True:
            is_next = (not steps or steps[-1].is_expected) and (chunks := self._next_step())
            if is_next:
                steps.append(self._launch(chunks))
            self._tell_all(accepted)
            accepted = []
            if not steps:
                return
            if is_next and len(steps) == 1 and steps[0].is_expected:
                continue
            results = await self._collect(steps.popleft())
            accepted = [one for result in results for one in self._accept(result)]

    def _launch(self, chunks: list[Chunk]) -> _Step:
        """Begin a step. If nobody's next token depends on more than logits, the step after it can be scheduled at once."""
        states = [chunk.sequence.sampling for chunk in chunks]
        is_expected = self._is_ahead and all(state is None or state.can_look_ahead for state in states)
        step = _Step(self._thread.submit(self._runner.launch, chunks, self._placements()), is_expected)
        if is_expected:
            self._scheduler.complete(chunks)
            for chunk in chunks:
                if chunk.is_last and chunk.sequence.sampling is not None:
                    chunk.sequence.expect()
        return step

    async def _collect(self, step: _Step) -> list[Computed]:
        """What a step has made, and who failed with it."""
        results = await self._compute(lambda: self._runner.collect(step.flight.result()))
        for index, one in enumerate(results):  # who found, in a step launched meanwhile, what a step that failed did not compute
            if found := self._uncomputed.keys() & one.chunk.blocks:
                results[index] = Computed(one.chunk, error=self._uncomputed[found.pop()])
        failed = [one for one in results if one.error]
        self._scheduler.fail([one.chunk for one in failed])
        self._uncomputed = {}
        for one in failed:
            if step.is_expected and one.error:
                self._uncomputed |= dict.fromkeys(one.chunk.blocks[one.chunk.start // BLOCK_SIZE :], one.error)
        if not step.is_expected:
            computed = [one for one in results if not one.error]
            self._scheduler.complete([one.chunk for one in computed], [one.num_accepted for one in computed])
        return results

    def _next_step(self) -> list[Chunk]:
        for live in [live for live in self._live.values() if live.stream() is None]:  # nobody waits for these any more
            self._end(live)
        return self._scheduler.schedule()

    def _accept(self, result: Computed) -> list[_Accepted]:
        """Take in what a step made of a sequence; the next step needs no more than this."""
        live, answer = self._of_sequence.get(result.chunk.sequence, (None, None))
        if live is None or answer is None:  # it ended during the step
            return []
        if result.error is not None:
            self._tell(live, result.error)
            self._end(live)
            return []
        if result.hidden_sum_H is not None:
            if output := answer.embed(result.chunk, result.hidden_sum_H):
                self._tell(live, output)
                self._end(live)
            return []
        answer.keep_prompt_logprobs(result.chunk.start, result.prompt_logprobs)
        accepted = []
        for token, logprobs in zip_longest(result.tokens, result.logprobs):
            self._num_generated_tokens += 1
            reason = answer.accept(token)
            accepted.append(_Accepted(live, answer, token, logprobs, reason))
            if reason is not None:
                self._end_answer(answer)
                break
        return accepted

    def _tell_all(self, accepted: list[_Accepted]) -> None:
        """Make the texts, and end who left or whose text is over."""
        for one in accepted:
            if one.live.ended.is_set() or one.answer.is_over:
                continue
            if one.live.stream() is None:
                self._end(one.live)
                continue
            try:
                output = one.answer.tell(one.token, one.reason, one.logprobs)
            except Exception as error:  # noqa: BLE001 whatever a tokenizer raises, the others' steps must go on
                self._tell(one.live, error)
                self._end(one.live)
                continue
            self._tell(one.live, output)
            if output.finish_reason is not None:
                one.answer.is_over = True
                self._end_answer(one.answer)
                if all(answer.is_over for answer in one.live.answers):
                    self._end(one.live)

    # --- How a request begins and ends -------------------------------------------------------------------------------

    async def _start_with_grammar(self, live: _Live) -> None:
        try:
            grammar = await self._grammars.compile(live.request.sampling)
        except Exception as error:  # noqa: BLE001 the stream's client is told, whatever it is
            self._tell(live, error)
            self._end(live)
            return
        if not live.ended.is_set():
            self._start(live, grammar)

    def _start(self, live: _Live, grammar: CompiledGrammar | None) -> None:
        for number in range(live.request.sampling.n):
            answer = Answer(live.request, number, self._tokenizer, self._end_tokens, self.context_length, grammar, self._guesses)
            live.answers.append(answer)
        if live.request.resumed is not None and not self._resume(live, live.request.resumed):
            return
        for answer in live.answers:
            if not answer.is_over:
                self._of_sequence[answer.sequence] = live, answer
                self._scheduler.add(answer.sequence)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
            self._driver.add_done_callback(self._tell_of_a_bug)

    def _resume(self, live: _Live, resumed: tuple[tuple[int, ...], ...]) -> bool:
        """Bring each answer to where another engine left off; returns whether there is more to compute."""
        try:
            for answer, tokens in zip(live.answers, resumed, strict=True):
                if reason := answer.resume(tokens):
                    answer.is_over = True
                    self._tell(live, Output((), "", reason, answer.number))
        except Exception as error:  # noqa: BLE001 whatever a tokenizer raises, as in `_tell_all`
            self._tell(live, error)
            self._end(live)
            return False
        if all(answer.is_over for answer in live.answers):
            self._end(live)
            return False
        return True

    def _tell_of_a_bug(self, driver: asyncio.Task[None]) -> None:
        """If the steps end with an error of ours, nobody waits for ever; the scheduler's state is not trusted any more."""
        if not driver.cancelled() and isinstance(error := driver.exception(), Exception):
            log.error("The engine has a fault and takes no more requests", exc_info=error)
            self._has_failed = True
            for live in self._live.values():
                self._tell(live, error)
                live.ended.set()
            self._live.clear()
            self._of_sequence.clear()

    def _tell(self, live: _Live, item: Output | Exception) -> None:
        if stream := live.stream():
            stream.put(item)

    def _end_answer(self, answer: Answer) -> None:
        """The scheduler need not know of it any more."""
        if self._of_sequence.pop(answer.sequence, None):
            self._scheduler.remove(answer.sequence)

    def _end(self, live: _Live) -> None:
        if live.ended.is_set():
            return
        live.ended.set()
        del self._live[live.request.request_id]
        for answer in live.answers:
            self._end_answer(answer)

    def _compute(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _check(self, request: GenerationRequest) -> None:
        prompt = request.prompt_tokens
        if not prompt:
            raise RequestError("The prompt is empty: give at least one token.")
        if len(prompt) + (not request.is_embedding) > self.context_length:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, and the context of {self.context_length} must hold "
                f"{'it' if request.is_embedding else 'at least one more'}: shorten it."
            )
        if unknown := [token for token in prompt if not 0 <= token < self._num_tokens]:
            raise RequestError(f"The model has no token {unknown[0]}: its tokens are 0 to {self._num_tokens - 1}. Use its own tokenizer.")
        if request.request_id in self._live:
            raise RequestError(f"A request with the id {request.request_id} is in flight: give each request an id of its own.")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise RequestError(f"The adapter {request.adapter[:12]} is not loaded: load it first.")
        request.sampling.check(self._num_tokens)
        if request.resumed is not None:  # it was taken before, and is not refused now
            _check_resumed(request, self._num_tokens)
            return
        stats = self.stats()
        if stats.num_running + stats.num_queued + request.sampling.n > self._spec.max_batch_size + self._spec.max_queued_requests:
            raise EngineBusyError(
                f"{stats.num_running} answers are running and {stats.num_queued} waiting, and this engine takes "
                f"{self._spec.max_batch_size + self._spec.max_queued_requests} at most. Try again later, add replicas, or raise "
                "engine.max_queued_requests."
            )

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def load_adapter(self, digest: str, folder: Path) -> None:
        """See `Engine.load_adapter`. It may push others out that are idle."""
        await self._adapters.load(digest, folder)

    async def drop_adapter(self, digest: str) -> None:
        """See `Engine.drop_adapter`. New requests cannot use it, unless it is loaded again before the last one has ended."""
        self._adapters.leave(digest)
        while self._adapters.is_leaving(digest) and (live := self._user_of(digest)):
            await live.ended.wait()
        if self._adapters.is_leaving(digest):  # else it has been loaded again meanwhile, or dropped twice
            self._adapters.forget(digest)

    def _empty_slot(self, digest: str) -> None:
        """The adapter's memory is free when the compute thread has heard of it."""
        self._scheduler.slots.drop(digest)
        if placements := self._placements():
            self._compute(partial(self._runner.place, placements))

    def _placements(self) -> list[Placement]:
        """What slots are to hold from the next work of the compute thread on, for which this is asked."""
        moves = self._scheduler.slots.take_moves()
        return [Placement(move.slot, move.adapter, None if move.adapter is None else self._adapters[move.adapter]) for move in moves]

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        """Work that is waited for when the engine closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _user_of(self, digest: str) -> _Live | None:
        return next((live for live in self._live.values() if live.request.adapter == digest), None)


def _check_resumed(request: GenerationRequest, num_tokens: int) -> None:
    """Raises `RequestError` for tokens that no answer of this request can have."""
    resumed = request.resumed or ()
    if len(resumed) != request.sampling.n:
        raise RequestError(f"A request for {request.sampling.n} answers is resumed with {len(resumed)}: give the tokens of each.")
    if unknown := [token for tokens in resumed for token in tokens if not 0 <= token < num_tokens]:
        raise RequestError(f"The model has no token {unknown[0]}: a request is resumed by the model that began it.")
