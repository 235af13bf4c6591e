"""The model at work. All of it runs in the engine's one compute thread, and nothing else touches the model.

Invariants:
- The base model computes as if no adapter had ever been loaded; an adapter as if it were the only one.
- A step is one forward pass, whatever adapters are in it (and one for embeddings). A failure ends the sequences of its step, and no others.
"""

import inspect
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidepool.errors import ModelError
from tidepool.inference import native
from tidepool.inference.attention import Cache, Ragged, check_attention, pack, pack_alone
from tidepool.inference.log_probabilities import TokenLogprobs, prompt_logprobs
from tidepool.inference.lora import PackedAdapter
from tidepool.inference.lora_layers import NO_SLOT, LoraLayers, runs_of
from tidepool.inference.sampler import Sampler, SamplingState
from tidepool.inference.scheduler import Chunk

_INPUTS = {"position_ids", "logits_to_keep"}
_ATTENTIONS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Placement:
    """An adapter to put into a slot before a step; None: the slot gets empty."""

    slot: int
    digest: str | None
    adapter: PackedAdapter | None


@dataclass(frozen=True)
class Computed:
    """What a step made of a chunk: the next token if it was the sequence's last chunk, and the log-probabilities that were asked for."""

    chunk: Chunk
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: Exception | None = None
    hidden_sum_H: Tensor | None = None
    """Of a chunk of an embedding: float32, in host memory."""


class ModelRunner:
    """A base model, its adapters, and the cache. Raises `ModelError` for a model that it cannot run."""

    def __init__(self, model: PreTrainedModel, block_size: int, batch_invariant: bool = False) -> None:
        _check(model)
        if batch_invariant and (model.device.type != "cpu" or native.library() is None):
            raise ModelError("engine.batch_invariant needs a CPU and a C compiler: install one, or leave it out.")
        self._batch_invariant = batch_invariant
        self._base = model
        self._shapes = check_attention(model)
        self._block_size = block_size
        self._cache: Cache | None = None
        self._layers: LoraLayers | None = None
        self._slot_of: dict[str | None, int] = {None: NO_SLOT}
        self._sampler = Sampler()

    @property
    def block_size_bytes(self) -> int:
        """What a block takes of memory, in all layers."""
        itemsize: int = self._base.dtype.itemsize
        return self._block_size * sum(one.num_floats for one in self._shapes) * itemsize

    def allocate(self, num_blocks: int, num_slots: int) -> LoraLayers:
        """Make the cache, whose memory is taken as it is used, and the slots for adapters on the model's layers as they are now."""
        self._cache = Cache(self._shapes, num_blocks, self._block_size, self._base.dtype, self._base.device)
        self._layers = LoraLayers(self._base, num_slots)
        return self._layers

    def place(self, placements: Items[Placement]) -> None:
        """Change what slots hold, in this order."""
        assert self._layers is not None
        for placement in placements:
            self._slot_of = {digest: slot for digest, slot in self._slot_of.items() if slot != placement.slot}
            if placement.digest is not None:
                self._slot_of[placement.digest] = placement.slot
            self._layers.put(placement.slot, placement.adapter)

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk], placements: Items[Placement] = ()) -> list[Computed]:
        """Compute a step, after a change of what slots hold."""
        self.place(placements)
        # Those of one token first; then rows of the same adapter stand together.
        ordered = sorted(chunks, key=lambda chunk: (chunk.end - chunk.start > 1, self._slot_of[chunk.sequence.adapter]))
        embedding = [chunk for chunk in ordered if chunk.sequence.is_embedding]
        answering = [chunk for chunk in ordered if not chunk.sequence.is_embedding]
        try:
            computed = self._embed(embedding) if embedding else []  # first: the others may have found its blocks in this step
            return computed + (self._compute(answering) if answering else [])
        except Exception as error:  # noqa: BLE001 whatever the model raises, the engine must serve the requests after these
            return [Computed(chunk, error=error) for chunk in ordered]

    # --- A forward pass ----------------------------------------------------------------------------------------------

    def _embed(self, chunks: list[Chunk]) -> list[Computed]:
        """One forward pass over chunks of prompts, up to the hidden states after the last norm."""
        ragged = self._pack(chunks)
        inner = self._base.base_model
        with self._adapters_of(chunks, []):
            found = inner(input_ids=ragged.tokens_1T, position_ids=ragged.positions_1T, use_cache=False, paged=ragged)
        hidden_TH = found.last_hidden_state[0]
        sums = [part.float().sum(dim=0).cpu() for part in hidden_TH.split([chunk.end - chunk.start for chunk in chunks])]
        return [Computed(chunk, hidden_sum_H=hidden_sum_H) for chunk, hidden_sum_H in zip(chunks, sums, strict=True)]

    def _pack(self, chunks: list[Chunk]) -> Ragged:
        assert self._cache is not None
        return pack_alone(chunks, self._cache) if self._batch_invariant else pack(chunks, self._cache, self._base.device)

    def _compute(self, chunks: list[Chunk]) -> list[Computed]:
        """One forward pass over chunks, those of one token first, and the tokens that follow from it."""
        ragged = self._pack(chunks)
        rows, spans = _wanted(chunks)
        kept = rows or [0]
        with self._adapters_of(chunks, kept):
            logits_NV = self._base(
                input_ids=ragged.tokens_1T,
                position_ids=ragged.positions_1T,
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=self._base.device),
                paged=ragged,
            ).logits[0]
        prompts = {index: _prompt_logprobs(chunks[index], logits_NV[first:last]) for index, (first, last) in spans.items()}
        answering = [index for index, chunk in enumerate(chunks) if chunk.is_last]
        sampled = None
        if answering:
            logits_BV = logits_NV if len(rows) == len(answering) else logits_NV[_last_rows(chunks, spans)]
            sampled = self._sampler.sample(logits_BV, [_sampling(chunks[index]) for index in answering])
        row_of = {index: row for row, index in enumerate(answering)}
        results = []
        for index, chunk in enumerate(chunks):
            row = row_of.get(index)
            if row is None or sampled is None:
                results.append(Computed(chunk, prompt_logprobs=prompts.get(index, ())))
            elif row in sampled.errors:
                results.append(Computed(chunk, error=sampled.errors[row]))
            else:
                results.append(Computed(chunk, sampled.tokens[row], sampled.logprobs.get(row), prompts.get(index, ())))
        return results

    def _adapters_of(self, chunks: list[Chunk], kept: list[int]) -> AbstractContextManager[None]:
        """Within it all tokens of the chunks are computed with their own adapters, and so are the logits of those that are kept."""
        assert self._layers is not None
        of_token = [self._slot_of[chunk.sequence.adapter] for chunk in chunks for _ in range(chunk.start, chunk.end)]
        return self._layers.rows(runs_of(of_token), runs_of([of_token[row] for row in kept]))


def _sampling(chunk: Chunk) -> SamplingState:
    assert chunk.sequence.sampling is not None
    return chunk.sequence.sampling


def _wanted(chunks: list[Chunk]) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """The tokens of the row whose logits are wanted, and where those of prompts' log-probabilities stand among them, by chunk."""
    rows: list[int] = []
    spans: dict[int, tuple[int, int]] = {}
    first = 0
    for index, chunk in enumerate(chunks):
        length = chunk.end - chunk.start
        if chunk.sequence.prompt_logprobs is not None and chunk.start < chunk.sequence.num_prompt:
            spans[index] = (len(rows), len(rows) + length)
            rows += range(first, first + length)
        elif chunk.is_last:
            rows.append(first + length - 1)
        first += length
    return rows, spans


def _last_rows(chunks: list[Chunk], spans: dict[int, tuple[int, int]]) -> list[int]:
    """Where the logits of each last token stand among the wanted ones."""
    found, next_row = [], 0
    for index, chunk in enumerate(chunks):
        num_rows = spans[index][1] - spans[index][0] if index in spans else int(chunk.is_last)
        next_row += num_rows
        if chunk.is_last:
            found.append(next_row - 1)
    return found


def _prompt_logprobs(chunk: Chunk, logits_NV: Tensor) -> tuple[TokenLogprobs, ...]:
    """Of the prompt's tokens that follow those of the chunk."""
    sequence = chunk.sequence
    assert sequence.prompt_logprobs is not None
    following = sequence.tokens[chunk.start + 1 : min(chunk.end + 1, sequence.num_prompt)]
    if not following:
        return ()
    return tuple(prompt_logprobs(logits_NV[: len(following)], following, sequence.prompt_logprobs))


def _check(model: PreTrainedModel) -> None:
    kind = model.config.model_type
    if absent := sorted(_INPUTS - set(inspect.signature(model.forward).parameters)):
        raise ModelError(f"The engine cannot run a {kind} model: it takes no {', '.join(absent)}. Serve another model.")
    kinds = set(cast(list[str], getattr(model.config.get_text_config(), "layer_types", None) or []))
    if getattr(model, "_is_stateful", False) or not kinds <= _ATTENTIONS:
        raise ModelError(
            f"The engine cannot run a {kind} model: not all of its layers are full or sliding attention, and it caches "
            "keys and values alone. Serve another model."
        )
    if model.config.is_encoder_decoder:
        raise ModelError(f"The engine cannot run a {kind} model: it has an encoder. Serve another model.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"The engine cannot run a {kind} model: its attention cannot be replaced in transformers. Serve another model.")
