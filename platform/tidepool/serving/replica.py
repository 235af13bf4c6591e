"""A replica: one base model in an engine, and the adapters on it that requests ask for. Knows no Ray and no HTTP.

Invariants:
- An adapter is fetched and loaded when it is first asked for, once however many requests wait for it, while other requests
  go on. A load that failed is tried again by the next request.
- A request whose stream is closed or cancelled is cancelled at the engine, whatever it was waiting for.
- Prompt and answer fit the context, or the request is refused with their lengths.

Adapters are prompted with the base's tokenizer and chat template.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from tidepool.errors import BaseMismatchError, ModelError, RegistryError
from tidepool.inference.engine import Engine, EngineStats, GenerationRequest, Output
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.linear import weights_dtype
from tidepool.inference.paged import PagedEngine
from tidepool.models import ModelSource, cache_folder, fetch_model, load_model, load_tokenizer, read_lora
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.backend import Call, ContextLengthError, Frame, Started
from tidepool.serving.host import Load
from tidepool.serving.prompts import Prompts, tokens_named
from tidepool.specs import EngineSpec
from tidepool.storage import open_store, release


class Replica:
    """Serves the calls for one base, in one event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        base_digest: str,
        registry: Registry,
        cache: Path,
        context_length: int,
    ) -> None:
        self._engine, self._prompts, self._base_digest = engine, Prompts(tokenizer), base_digest
        self._registry, self._cache = registry, cache
        self._context_length = context_length
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._tokenizing = ThreadPoolExecutor(1, "tokens")
        """A thread of its own: those that fetch adapters may all wait for the store."""

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """See `Backend.generate`; raises `BaseMismatchError` also for an adapter of another base."""
        started = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._start, call)
        spelled: set[int] = set()
        if call.task == "tokenize":
            self.check()
            yield started
            yield self._prompts.spell(set(started.prompt_tokens))
            yield Output((), "", "stop")
            return
        if call.adapter is not None:
            await self.load_adapter(call.adapter)
        request = self._request(call, started.prompt_tokens)
        outputs = self._engine.submit(request)
        try:
            # A grammar is refused, if it is, before the request counts as taken.
            first = [await anext(outputs)] if request.sampling.has_grammar else []
            yield started if call.echo else Started(started.num_prompt_tokens)
            async for output in _chain(first, outputs):
                if output.logprobs or output.prompt_logprobs:
                    prompt = started.prompt_tokens if output.prompt_logprobs else ()
                    new = tokens_named(output).union(prompt) - spelled
                    if new:
                        spelled |= new
                        yield self._prompts.spell(new)
                yield output
        finally:
            self._engine.cancel(call.request_id)

    def check(self) -> None:
        """Raises `ModelError` if the engine has failed, so that whoever runs replicas starts another."""
        if self._engine.stats().has_failed:
            raise ModelError("The engine of this replica has failed; its log says why.")

    def load(self) -> Load:
        """How busy the engine is."""
        stats = self._engine.stats()
        return Load(
            stats.num_running,
            stats.num_queued,
            frozenset(stats.adapters) | frozenset(self._loads),
            stats.num_free_blocks,
            stats.num_blocks,
            stats.num_blocks * BLOCK_SIZE,
            stats.has_failed,
        )

    def stats(self) -> EngineStats:
        """What the engine has counted."""
        return self._engine.stats()

    def _start(self, call: Call) -> Started:
        tokens = self._prompts.tokens(call.prompt)
        if call.task == "generate":
            self._check_room(call.sampling.max_tokens, len(tokens))
        text = call.prompt if isinstance(call.prompt, str) else self._prompts.text(tokens) if call.echo else ""
        return Started(len(tokens), tokens, text)

    def _request(self, call: Call, prompt_tokens: tuple[int, ...]) -> GenerationRequest:
        sampling = self._prompts.sampling(call.prompt, call.sampling)
        adapter = call.adapter.digest if call.adapter else None
        return GenerationRequest(call.request_id, prompt_tokens, sampling, adapter, call.client, call.task == "embed", call.resumed)

    def _check_room(self, max_tokens: int | None, num_prompt_tokens: int) -> None:
        num_wanted = 1 if max_tokens is None else max_tokens
        if num_prompt_tokens + num_wanted > self._context_length:
            raise ContextLengthError(
                f"The model's context is {self._context_length} tokens; the prompt has {num_prompt_tokens} and at least {num_wanted} "
                "more are asked for. Shorten the prompt, or ask for fewer tokens."
            )

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def load_adapter(self, version: ModelVersion) -> None:
        """Have an adapter of this base loaded. Raises `BaseMismatchError`, `ModelError`, `StoreError`, `EngineBusyError`."""
        if version.base_digest != self._base_digest:
            raise BaseMismatchError(
                f"{version.ref} was trained on {version.base} (files {str(version.base_digest)[:12]}), and this replica serves the "
                f"base with the files {self._base_digest[:12]}."
            )
        # Again, if others' adapters have pushed it out before this request could use it.
        while version.digest not in self._engine.stats().adapters:
            load = self._loads.get(version.digest)
            if load is None:
                load = self._loads[version.digest] = asyncio.create_task(self._fetch_and_load(version))
            await asyncio.shield(load)  # a client that leaves must not cancel the others' load

    async def _fetch_and_load(self, version: ModelVersion) -> None:
        try:
            folder = await asyncio.to_thread(self._registry.fetch, version, self._cache)
            try:
                await self._engine.load_adapter(version.digest, folder)
            finally:
                release(folder)  # the engine has its own copy; the node's cache may need the room
        except RegistryError as error:
            raise ModelError(f"The adapter {version.ref} cannot be fetched: {error}") from error
        finally:
            del self._loads[version.digest]


async def _chain(first: list[Output], rest: AsyncIterator[Output]) -> AsyncIterator[Output]:
    for output in first:
        yield output
    async for output in rest:
        yield output


def load_replica(store_url: str, base: ModelSource, spec: EngineSpec, device: Literal["cpu", "cuda"]) -> Replica:
    """Fetch a base model and load it into an engine. Raises `ModelError`, `StoreError`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("The replica was given a GPU and torch finds none: install torch for CUDA, or set gpus_per_replica to 0.")
    torch.set_num_threads(spec.threads)
    store = open_store(store_url)
    folder = fetch_model(base, store, cache_folder())
    model = load_model(folder, weights_dtype(spec.weights, device)).to(device)
    tokenizer = load_tokenizer(folder)
    engine = PagedEngine(model, tokenizer, spec, partial(read_lora, base_digest=base.digest))
    return Replica(engine, tokenizer, base.digest, Registry(store), cache_folder(), engine.context_length)
