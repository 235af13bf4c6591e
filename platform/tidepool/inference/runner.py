"""The model at work. All of it runs in the engine's one compute thread, and nothing else touches the model.

Invariants:
- The base model computes as if no adapter had ever been loaded; an adapter as if it were the only one.
- A step is one forward pass, whatever adapters are in it (and one for embeddings). A failure ends the sequences of its step, and no others.
"""

import inspect
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidepool.errors import ModelError
from tidepool.inference import native
from tidepool.inference.attention import Cache, Ragged, check_attention, pack
from tidepool.inference.engine import TokenLogprobs
from tidepool.inference.graphs import DecodeGraphs, Record
from tidepool.inference.log_probabilities import prompt_logprobs
from tidepool.inference.lora import PackedAdapter
from tidepool.inference.lora_layers import NO_SLOT, LoraLayers, runs_of
from tidepool.inference.sampler import Choice, Sampled, Sampler, SamplingState
from tidepool.inference.scheduler import Chunk
from tidepool.inference.sequence import PENDING, Sequence
from tidepool.inference.transfer import upload

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
    """What a step made of a chunk, with the log-probabilities that were asked for.

    `tokens` are none but for a sequence's last chunk: the right ones of its draft, and the one that follows them.
    """

    chunk: Chunk
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: Exception | None = None
    hidden_sum_H: Tensor | None = None
    """Of a chunk of an embedding: float32, in host memory."""

    @property
    def num_accepted(self) -> int:
        """Tokens of the draft that were right."""
        return max(0, len(self.tokens) - 1)


@dataclass
class _Pass:
    """A forward pass that has been launched: its chunks, where the tokens of each stand in the choice, and its prompts' part."""

    chunks: list[Chunk]
    choice: Choice | None
    spans: list[tuple[int, int]]
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]

    def read(self) -> list[Computed]:
        sampled = self.choice.read() if self.choice else Sampled([])
        return [self._of_chunk(index, chunk, sampled) for index, chunk in enumerate(self.chunks)]

    def _of_chunk(self, index: int, chunk: Chunk, sampled: Sampled) -> Computed:
        first, last = self.spans[index]
        if first < last and first in sampled.errors:
            return Computed(chunk, error=sampled.errors[first])
        right = first
        while right + 1 < last and sampled.tokens[right] == chunk.draft[right - first] and right + 1 not in sampled.errors:
            right += 1
        rows = range(first, min(right + 1, last))
        logprobs = tuple(sampled.logprobs[row] for row in rows if row in sampled.logprobs)
        return Computed(chunk, tuple(sampled.tokens[row] for row in rows), logprobs, self.prompt_logprobs.get(index, ()))


@dataclass
class Flight:
    """A step that has been launched, and may not have been computed yet."""

    results: list[Computed]
    """Those that are there already: embeddings and failures."""
    answering: _Pass | None = None


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
        self._graphs: DecodeGraphs | None = None
        self._layers: LoraLayers | None = None
        self._slot_of: dict[str | None, int] = {None: NO_SLOT}
        self._sampler = Sampler()
        self._row_of: dict[Sequence, int] = {}
        self._chosen_B: Tensor | None = None

    @property
    def block_size_bytes(self) -> int:
        """What a block takes of memory, in all layers."""
        itemsize: int = self._base.dtype.itemsize
        return self._block_size * sum(one.num_floats for one in self._shapes) * itemsize

    def allocate(self, num_blocks: int, num_slots: int) -> LoraLayers:
        """Make the cache, whose memory is taken as it is used, and the slots for adapters on the model's layers as they are now.

        The cache has a block more, which is nobody's.
        """
        self._cache = Cache(self._shapes, num_blocks + 1, self._block_size, self._base.dtype, self._base.device)
        self._layers = LoraLayers(self._base, num_slots)
        return self._layers

    @torch.inference_mode()
    def record(self, max_rows: int, num_columns: int, record: Record) -> None:
        """Record forward passes of the base alone, of decoding rows only, for `DecodeGraphs`; others are computed as before."""
        assert self._cache is not None
        self._graphs = DecodeGraphs(self._logits, self._cache, max_rows, num_columns, record)

    def place(self, placements: Items[Placement]) -> None:
        """Change what slots hold, in this order."""
        assert self._layers is not None
        for placement in placements:
            self._slot_of = {digest: slot for digest, slot in self._slot_of.items() if slot != placement.slot}
            if placement.digest is not None:
                self._slot_of[placement.digest] = placement.slot
            self._layers.put(placement.slot, placement.adapter)

    @torch.inference_mode()
    def launch(self, chunks: Items[Chunk], placements: Items[Placement] = ()) -> Flight:
        """Begin a step, after a change of what slots hold. A token that is pending is one that the step launched before it chooses."""
        self.place(placements)
        lost = [chunk for chunk in chunks if _num_pending(chunk) and chunk.sequence not in self._row_of]
        flight = Flight([Computed(chunk, error=RuntimeError("The step before this one failed.")) for chunk in lost])
        # Those of one token first; then rows of the same adapter stand together.
        ordered = sorted(
            (chunk for chunk in chunks if chunk not in lost),
            key=lambda chunk: (chunk.end - chunk.start > 1, self._slot_of[chunk.sequence.adapter]),
        )
        embedding = [chunk for chunk in ordered if chunk.sequence.is_embedding]
        answering = [chunk for chunk in ordered if not chunk.sequence.is_embedding]
        try:
            # Embeddings first: the others may have found their blocks in this step.
            flight.results += self._embed(embedding) if embedding else []
            flight.answering = self._compute(answering) if answering else None
        except Exception as error:  # noqa: BLE001 whatever the model raises, the engine must serve the requests after these
            done = [one.chunk for one in flight.results]
            flight.results += [Computed(chunk, error=error) for chunk in ordered if chunk not in done]
        self._remember(flight.answering)
        return flight

    def collect(self, flight: Flight) -> list[Computed]:
        """What a step has computed, once it has."""
        if flight.answering is None:
            return flight.results
        try:
            return flight.results + flight.answering.read()
        except Exception as error:  # noqa: BLE001 a GPU says here what went wrong there
            return flight.results + [Computed(chunk, error=error) for chunk in flight.answering.chunks]

    # --- A forward pass ----------------------------------------------------------------------------------------------

    def _compute(self, chunks: list[Chunk]) -> _Pass:
        """One forward pass over chunks, those of one token first, and the choice of the tokens that follow."""
        wanted, prompts, answers = _wanted(chunks)
        logits_NV = self._forward(chunks, wanted or [0])
        prompt_logprobs = {index: _prompt_logprobs(chunks[index], logits_NV[first:last]) for index, (first, last) in prompts.items()}
        states: list[SamplingState] = []
        ahead: list[int] = []
        spans: list[tuple[int, int]] = []
        for chunk in chunks:
            spans.append((len(states), len(states) + chunk.num_wanted))
            states += [_sampling(chunk)] * chunk.num_wanted
            ahead += [_num_pending(chunk) + index for index in range(chunk.num_wanted)]
        choice = None
        if answers:
            logits_BV = logits_NV if len(answers) == len(wanted) else logits_NV[answers]
            choice = self._sampler.choose(logits_BV, states, ahead)
        return _Pass(chunks, choice, spans, prompt_logprobs)

    def _embed(self, chunks: list[Chunk]) -> list[Computed]:
        """One forward pass over chunks of prompts, up to the hidden states after the last norm."""
        ragged = self._pack(chunks).to(self._base.device)
        inner = self._base.base_model
        with self._adapters_of(chunks, []):
            found = inner(input_ids=ragged.tokens_1T, position_ids=ragged.positions_1T, use_cache=False, paged=ragged)
        hidden_TH = found.last_hidden_state[0]
        sums = [part.float().sum(dim=0).cpu() for part in hidden_TH.split([chunk.end - chunk.start for chunk in chunks])]
        return [Computed(chunk, hidden_sum_H=hidden_sum_H) for chunk, hidden_sum_H in zip(chunks, sums, strict=True)]

    def _pack(self, chunks: list[Chunk]) -> Ragged:
        assert self._cache is not None
        return pack(chunks, self._cache, self._batch_invariant)

    def _forward(self, chunks: list[Chunk], wanted: list[int]) -> Tensor:
        """The logits of the wanted ones of the tokens of the chunks."""
        device, ragged = self._base.device, self._pack(chunks)
        if self._graphs is not None and not any(chunk.sequence.adapter for chunk in chunks) and self._graphs.can_run(ragged):
            logits_TV = self._graphs.run(ragged, lambda tokens_1T: self._fill_in(tokens_1T, chunks))
            return logits_TV if len(wanted) == len(logits_TV) else logits_TV[upload(torch.tensor(wanted), device)]
        ragged = ragged.to(device)
        self._fill_in(ragged.tokens_1T, chunks)
        with self._adapters_of(chunks, wanted):
            return self._logits(ragged, upload(torch.tensor(wanted), device))

    def _logits(self, ragged: Ragged, wanted: Tensor | Literal[0] = 0) -> Tensor:
        """Of the wanted tokens, or of all (0)."""
        logits_1NV: Tensor = self._base(
            input_ids=ragged.tokens_1T, position_ids=ragged.positions_1T, use_cache=False, logits_to_keep=wanted, paged=ragged
        ).logits
        return logits_1NV[0]

    def _fill_in(self, tokens_1T: Tensor, chunks: list[Chunk]) -> None:
        """Put the tokens that the step before chooses in their places."""
        places, rows, first = [], [], 0
        for chunk in chunks:
            first += len(chunk.tokens)
            if _num_pending(chunk):
                places.append(first - 1)
                rows.append(self._row_of[chunk.sequence])
        if places:
            assert self._chosen_B is not None
            places_P, rows_P = (upload(torch.tensor(one), tokens_1T.device) for one in (places, rows))
            tokens_1T[0, places_P] = self._chosen_B[rows_P]

    def _remember(self, one: _Pass | None) -> None:
        """Where the tokens are that this step chooses."""
        self._row_of, self._chosen_B = {}, None
        if one is not None and one.choice is not None:
            self._row_of = {chunk.sequence: first for chunk, (first, _) in zip(one.chunks, one.spans, strict=True)}
            self._chosen_B = one.choice.tokens_B

    def _adapters_of(self, chunks: list[Chunk], kept: list[int]) -> AbstractContextManager[None]:
        """Within it all tokens of the chunks are computed with their own adapters, and so are the logits of those that are kept."""
        assert self._layers is not None
        of_token = [self._slot_of[chunk.sequence.adapter] for chunk in chunks for _ in chunk.tokens]
        return self._layers.rows(runs_of(of_token), runs_of([of_token[row] for row in kept]))


def _sampling(chunk: Chunk) -> SamplingState:
    assert chunk.sequence.sampling is not None
    return chunk.sequence.sampling


def _num_pending(chunk: Chunk) -> int:
    """Tokens of the chunk that are not known yet: its last one, or none."""
    return int(chunk.sequence.tokens[chunk.end - 1] == PENDING)


def _wanted(chunks: list[Chunk]) -> tuple[list[int], dict[int, tuple[int, int]], list[int]]:
    """The tokens of the row whose logits are wanted, where those of prompts' log-probabilities stand among them, by chunk, and
    where those from which tokens are chosen do.
    """
    rows: list[int] = []
    prompts: dict[int, tuple[int, int]] = {}
    answers: list[int] = []
    first = 0
    for index, chunk in enumerate(chunks):
        after = first + chunk.end - chunk.start + len(chunk.draft)
        if chunk.sequence.prompt_logprobs is not None and chunk.start < chunk.sequence.num_prompt:
            prompts[index] = (len(rows), len(rows) + chunk.end - chunk.start)
            rows += range(first, after)
        else:
            rows += range(after - chunk.num_wanted, after)
        answers += range(len(rows) - chunk.num_wanted, len(rows))
        first = after
    return rows, prompts, answers


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
