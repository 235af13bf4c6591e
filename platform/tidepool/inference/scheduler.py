"""Which tokens are computed next: a plain state machine that computes nothing and knows no clock, no thread and no tensor.

`schedule` decides a step, `complete` says that it has been computed, or, where steps follow one another without waiting, that it will
have been before the next one is: a token that is pending then is as good as any other, but names no block. A step holds at most
`max_step_tokens` tokens: first one of each running sequence that answers, then pieces (chunks) of prompts, so that nobody who reads
waits for a long prompt, and last guesses of what answers go on with.

Who starts next is fair between clients (an adapter and a fairness key together), by the virtual token counter of "Fairness in
Serving Large Language Models" (Sheng et al. 2024): each client has a counter of the work done for it, the lowest one is served, and
a client that comes back after a pause starts at the lowest counter of those who wait. Within a client it goes by arrival.

Where the one whose turn it is needs an adapter that can have no slot now (`slots`), the next one may start; the slot comes free for it.

When no block is free, the running sequence that arrived last gives its own back and waits again; what it had is computed anew, or found
where it still is. The oldest one never gives way, so that it ends, and then the next is the oldest.

Invariants:
- A sequence waits, runs, or is gone. Its blocks are those of its computed tokens and of the step that is going on; none if it waits.
- No token is in two steps unless its sequence gave its blocks back in between.
- All running sequences that answer are in every step, until they have all the tokens that they may have.
- What is guessed of an answer takes only tokens and blocks that nobody else wants in that step; blocks of wrong guesses are free after it.
- A token is charged once, whoever preempts whom; what was found in the cache is free.
"""

from bisect import insort
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import count, repeat

from tidepool.inference.blocks import Blocks, block_key
from tidepool.inference.sequence import Sequence
from tidepool.inference.slots import Slots

PROMPT_WEIGHT, ANSWER_WEIGHT = 1, 2
"""What a token costs a client, as in the paper."""


@dataclass(frozen=True)
class Chunk:
    """Compute tokens `start` to `end` of a sequence; if these are the last it has, its next one is chosen.

    `draft` are guesses of what follows `end`, computed too, each of which is right or wrong by the token chosen before it. `blocks` are
    the sequence's, also when it has ended while the step is going on.
    """

    sequence: Sequence
    start: int
    end: int
    is_last: bool
    blocks: list[int]
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """All that is computed."""
        return [*self.sequence.tokens[self.start : self.end], *self.draft]

    @property
    def num_wanted(self) -> int:
        """Tokens that are chosen: one after the last one that is known, and one after each guess."""
        return (1 + len(self.draft)) if self.is_last else 0


@dataclass
class Counters:
    """What has happened since the start. `num_chunks` counts the chunks that were not the last of their prompt, `num_placements`
    adapters that were given a slot."""

    num_steps: int = 0
    num_chunks: int = 0
    num_preemptions: int = 0
    num_prefix_hits: int = 0
    num_prefix_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_placements: int = 0


@dataclass
class _Client:
    served: int = 0
    num_sequences: int = 0
    waiting: list[Sequence] = field(default_factory=list)  # by arrival


class Scheduler:
    """Sequences from their start to their end. A sequence alone must fit the blocks, or it could never be computed.

    `num_slots`: adapters that a step can compute with; default: one for each sequence. `max_draft`: guesses for a sequence in a step.
    """

    def __init__(self, blocks: Blocks, max_running: int, max_step_tokens: int, num_slots: int | None = None, max_draft: int = 0) -> None:
        assert max_step_tokens >= max_running
        self.slots = Slots(num_slots or max_running)
        self._max_draft = max_draft
        self._blocks, self._max_running, self._max_step_tokens = blocks, max_running, max_step_tokens
        self._clients: dict[tuple[str | None, str], _Client] = {}
        self._running: list[Sequence] = []  # by arrival
        self._arrivals = count()
        self.counters = Counters()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(len(client.waiting) for client in self._clients.values())

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits, with at least one token."""
        sequence.arrival = next(self._arrivals)
        floor = self._floor()
        client = self._clients.setdefault((sequence.adapter, sequence.client), _Client())
        if not client.num_sequences:
            client.served = max(client.served, floor)
        client.num_sequences += 1
        client.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, however it did: its place and its blocks are free at once."""
        client = self._client(sequence)
        if sequence.is_running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            client.waiting.remove(sequence)
        client.num_sequences -= 1
        if not client.num_sequences:
            self._forget_clients()

    def fail(self, chunks: list[Chunk]) -> None:
        """These were not computed, so that nobody may find them; their sequences are to be removed before the next step."""
        for chunk in chunks:
            self._blocks.forget(chunk.blocks[chunk.start // self._blocks.block_size :])

    def schedule(self) -> list[Chunk]:
        """The next step; empty if there is nothing to do. Each sequence has one chunk at most."""
        chunks: list[Chunk] = []
        budget = self._max_step_tokens
        self.slots.begin()
        # Those who answer come first, then the prompts that have begun, each by arrival; a preemption shortens the list from its end.
        for sequence in sorted(self._running, key=lambda one: (len(one.tokens) - one.num_computed > 1, one.arrival)):
            if sequence.is_running and sequence.has_work and budget:
                budget -= self._continue(sequence, budget, chunks)
        while budget and len(self._running) < self._max_running and (newcomer := self._start()):
            budget -= self._continue(newcomer, budget, chunks)
        self.counters.num_steps += bool(chunks)
        if self._max_draft:
            self._guess(chunks, budget)
        return chunks

    def complete(self, chunks: list[Chunk], nums_accepted: Items[int] = ()) -> None:
        """A step has been computed, and of each chunk's draft so many tokens were right; the caller appends what was chosen.

        Sequences that ended meanwhile are none of its business.
        """
        for chunk, num_accepted in zip(chunks, nums_accepted or repeat(0), strict=False):
            sequence = chunk.sequence
            self.counters.num_accepted_tokens += num_accepted
            if sequence.is_running:
                sequence.num_computed = chunk.end + num_accepted
                num_blocks = -(-sequence.num_computed // self._blocks.block_size)
                self._blocks.release(sequence.blocks[num_blocks:])
                del sequence.blocks[num_blocks:]

    def check(self) -> None:
        """Assert the invariants that hold between two steps."""
        waiting = [sequence for client in self._clients.values() for sequence in client.waiting]
        assert len({id(one) for one in [*waiting, *self._running]}) == len(waiting) + len(self._running)
        assert len(self._running) <= self._max_running
        assert not any(one.blocks or one.num_computed for one in waiting)
        size = self._blocks.block_size
        assert all(len(one.blocks) == -(-one.num_computed // size) for one in self._running)
        self._blocks.check([one.blocks for one in self._running])
        self.slots.check([one.adapter for one in self._running])

    # --- One sequence ------------------------------------------------------------------------------------------------

    def _continue(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the sequence's next chunk; returns its length, 0 if it had to give way."""
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + budget)
        size = self._blocks.block_size
        while len(sequence.blocks) * size < end:
            if not self._blocks.num_free and not self._preempt(sequence, chunks):
                return 0
            sequence.blocks.append(self._blocks.give_out())
        self._publish(sequence, end)
        self._charge(sequence, end)
        chunks.append(Chunk(sequence, start, end, end == len(sequence.tokens), sequence.blocks))
        self.counters.num_chunks += end < len(sequence.tokens)
        return end - start

    def _start(self) -> Sequence | None:
        """Let the next sequence run, with what is found of it, if there is room for all of its tokens."""
        waiting = sorted((one for one in self._clients.values() if one.waiting), key=lambda one: (one.served, one.waiting[0].arrival))
        client = next((one for one in waiting if self.slots.can_start(one.waiting[0].adapter)), None)
        if client is None:
            return None
        sequence = client.waiting[0]
        found = self._find(sequence)
        size = self._blocks.block_size
        needed = -(-len(sequence.tokens) // size) - len(found)
        # A block for each of the others, so that the next tokens do not push out who has just come.
        if self._running and self._blocks.num_free_without(found) < needed + len(self._running):
            return None
        del client.waiting[0]
        self._blocks.hold(found)
        self.counters.num_placements += self.slots.start(sequence.adapter)
        sequence.is_running, sequence.blocks, sequence.num_computed = True, found, len(found) * size
        sequence.num_published = len(found)
        sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
        self.counters.num_prefix_hits += bool(found)
        self.counters.num_prefix_tokens += sequence.num_computed
        insort(self._running, sequence, key=lambda one: one.arrival)
        return sequence

    def _preempt(self, for_whom: Sequence, chunks: list[Chunk]) -> bool:
        """Take the blocks of the running sequence that arrived last; False if it is the one that asked for some."""
        victim = self._running.pop()
        assert self._running or victim is not for_whom, "a sequence alone must fit the blocks"
        # What this step would have computed of it is not there. Nobody has found it yet: newcomers come last, and push out nobody.
        chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
        self._blocks.forget(victim.blocks[victim.num_computed // self._blocks.block_size :])
        self._release(victim)
        insort(self._client(victim).waiting, victim, key=lambda one: one.arrival)
        self.counters.num_preemptions += 1
        return victim is not for_whom

    def _guess(self, chunks: list[Chunk], budget: int) -> None:
        """Add guesses to the chunks of those who answer, as far as the budget and free blocks go."""
        size = self._blocks.block_size
        for index, chunk in enumerate(chunks):
            sequence, blocks = chunk.sequence, chunk.blocks
            room = (len(blocks) + self._blocks.num_free) * size - chunk.end
            num = min(self._max_draft, budget, room, sequence.max_length - chunk.end - 1)
            if sequence.lookup is None or num < 1 or not chunk.is_last or chunk.end - chunk.start > 1:
                continue
            draft = sequence.lookup.propose(sequence.tokens, num)
            while len(blocks) * size < chunk.end + len(draft):
                blocks.append(self._blocks.give_out())
            chunks[index] = replace(chunk, draft=draft)
            budget -= len(draft)
            self.counters.num_drafted_tokens += len(draft)

    # --- Blocks and their content ------------------------------------------------------------------------------------

    def _find(self, sequence: Sequence) -> list[int]:
        """The published blocks that begin the sequence; its last token is always computed, since its logits are wanted."""
        if sequence.prompt_logprobs is not None or sequence.is_embedding:
            return []
        num_blocks = (len(sequence.tokens) - 1) // self._blocks.block_size
        self._extend_keys(sequence, num_blocks)
        return self._blocks.find(sequence.keys[:num_blocks])

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Others of this step may use what this one computes in it: each layer writes all keys and values before it reads them."""
        size = self._blocks.block_size
        num_full = min(end, sequence.num_known) // size
        self._extend_keys(sequence, num_full)
        for index in range(sequence.num_published, num_full):
            self._blocks.publish(sequence.blocks[index], sequence.keys[index])
        sequence.num_published = num_full

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        size = self._blocks.block_size
        while (index := len(sequence.keys)) < num_blocks:
            parent = sequence.keys[-1] if index else sequence.root
            sequence.keys.append(block_key(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _release(self, sequence: Sequence) -> None:
        self.slots.stop(sequence.adapter)
        self._blocks.release(sequence.blocks)
        sequence.is_running, sequence.blocks, sequence.num_computed, sequence.num_published = False, [], 0, 0

    # --- Fairness ----------------------------------------------------------------------------------------------------

    def _client(self, sequence: Sequence) -> _Client:
        return self._clients[sequence.adapter, sequence.client]

    def _charge(self, sequence: Sequence, end: int) -> None:
        new = range(sequence.num_charged, end)
        num_prompt = len(range(new.start, min(new.stop, sequence.num_prompt)))
        self._client(sequence).served += PROMPT_WEIGHT * num_prompt + ANSWER_WEIGHT * (len(new) - num_prompt)
        sequence.num_charged = max(sequence.num_charged, end)

    def _floor(self) -> int:
        """Where a client that comes now starts: at the least that has been done for one who is here."""
        return min((client.served for client in self._clients.values() if client.num_sequences), default=0)

    def _forget_clients(self) -> None:
        """Clients who are gone, and would start at the floor if they came back."""
        floor, is_idle = self._floor(), not any(client.num_sequences for client in self._clients.values())
        self._clients = {key: one for key, one in self._clients.items() if one.num_sequences or (one.served > floor and not is_idle)}
