"""The scheduler under random traffic, against a cache that remembers what was written into it; fairness; preemption; sharing."""

from collections.abc import Sequence as Items
from itertools import cycle
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tidepool.inference.blocks import Blocks
from tidepool.inference.lookup import PromptLookup
from tidepool.inference.scheduler import ANSWER_WEIGHT, PROMPT_WEIGHT, Chunk, Scheduler
from tidepool.inference.sequence import PENDING, Sequence

Content = tuple[str | None, tuple[int, ...]]


def answer(index: int) -> int:
    """Token `index` of a sequence, if it is none of its prompt."""
    return 7 + index % 3


class Guesses(PromptLookup):
    """Guesses of which so many are right, one after the other, and the next one is wrong."""

    def __init__(self, nums_right: list[int]) -> None:
        self._nums_right = cycle(nums_right)

    def propose(self, tokens: Items[int], num: int) -> tuple[int, ...]:
        num_right = next(self._nums_right)
        return tuple(answer(len(tokens) + index) if index < num_right else 99 for index in range(num))


class Play:
    """A scheduler whose steps are computed by writing down, at each place of each block, what the model would have put there.

    With `is_ahead` what a step chose is told when the step after it has been scheduled.
    """

    def __init__(
        self,
        num_blocks: int = 12,
        block_size: int = 2,
        max_running: int = 4,
        max_step_tokens: int = 6,
        max_draft: int = 0,
        is_ahead: bool = False,
        num_slots: int | None = None,
    ) -> None:
        self.blocks = Blocks(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_running, max_step_tokens, num_slots, max_draft)
        self.in_slot: dict[int, str | None] = {}
        self.cache: dict[tuple[int, int], Content] = {}
        self.left: dict[Sequence, int] = {}  # tokens that each sequence will yet answer
        self.num_answers = 0
        self.is_ahead = is_ahead
        self.untold: list[Chunk] = []

    def add(self, tokens: list[int], num_answers: int = 1, client: str = "", adapter: str | None = None, **rest: Any) -> Sequence:
        sequence = Sequence(list(tokens), adapter, client, max_length=len(tokens) + num_answers, **rest)
        self.left[sequence] = num_answers
        self.scheduler.add(sequence)
        return sequence

    def step(self, cancel: Sequence | None = None, failing: str | None = "") -> list[Chunk]:
        """Schedule and compute; `cancel` ends while the step goes on, and the chunks with the adapter `failing` fail."""
        chunks = self.scheduler.schedule()
        assert sum(len(chunk.tokens) for chunk in chunks) <= self.scheduler._max_step_tokens
        assert all(chunk.end + len(chunk.draft) < chunk.sequence.max_length for chunk in chunks if chunk.draft)
        self.in_slot |= {move.slot: move.adapter for move in self.scheduler.slots.take_moves()}
        assert {None, *self.in_slot.values()} >= {chunk.sequence.adapter for chunk in chunks}
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        failed = [chunk for chunk in chunks if chunk.sequence.adapter == failing]
        computed = [chunk for chunk in chunks if chunk not in failed]
        for chunk in computed:
            for index in range(chunk.start, chunk.end + len(chunk.draft)):
                self.cache[self._place(chunk, index)] = self._content(chunk, index)
        for chunk in computed:  # after all writing: nobody may have written where another reads
            for index in range(chunk.end + len(chunk.draft)):
                assert self.cache[self._place(chunk, index)] == self._content(chunk, index)
        if cancel is not None:
            self.end(cancel)
        self.scheduler.fail(failed)
        for chunk in failed:
            if chunk.sequence in self.left:
                self.end(chunk.sequence)
        nums_right = [self._num_right(chunk) for chunk in computed]
        self.scheduler.complete(computed, nums_right)
        self._tell(computed)
        return chunks

    def _tell(self, computed: list[Chunk]) -> None:
        if self.is_ahead:
            for chunk in computed:
                if chunk.is_last:
                    chunk.sequence.expect()
            computed, self.untold = self.untold, computed
        for chunk in computed:
            for _ in range(1 + self._num_right(chunk)):
                if chunk.is_last and chunk.sequence in self.left:
                    self._answer(chunk.sequence)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.left[sequence]

    def drain(self, max_steps: int) -> None:
        for _ in range(max_steps):
            self.step()
        assert not self.left

    def _answer(self, sequence: Sequence) -> None:
        sequence.append(answer(sequence.num_known))
        self.num_answers += 1
        self.left[sequence] -= 1
        if not self.left[sequence]:
            self.end(sequence)

    def _place(self, chunk: Chunk, index: int) -> tuple[int, int]:
        return chunk.blocks[index // self.blocks.block_size], index % self.blocks.block_size

    @staticmethod
    def _content(chunk: Chunk, index: int) -> Content:
        tokens = [*chunk.sequence.tokens[: chunk.end], *chunk.draft][: index + 1]
        return chunk.sequence.adapter, tuple(answer(place) if token == PENDING else token for place, token in enumerate(tokens))

    @staticmethod
    def _num_right(chunk: Chunk) -> int:
        right = [guess == answer(chunk.end + index) for index, guess in enumerate(chunk.draft)]
        return right.index(False) if False in right else len(right)


class Traffic(RuleBasedStateMachine):
    """A sequence has 12 tokens at most, half of what the blocks have room for; prompts begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.play = Play(num_slots=2)

    @initialize(max_draft=st.sampled_from([0, 1, 3]), is_ahead=st.booleans())
    def choose(self, max_draft: int, is_ahead: bool) -> None:
        self.play = Play(max_draft=0 if is_ahead else max_draft, is_ahead=is_ahead, num_slots=2)

    @rule(
        length=st.integers(1, 8),
        ending=st.integers(0, 2),
        num_answers=st.integers(1, 4),
        client=st.sampled_from("ab"),
        adapter=st.sampled_from([None, *"xyz"]),
        share=st.booleans(),
        nums_right=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    )
    def add(self, length: int, ending: int, num_answers: int, client: str, adapter: str | None, share: bool, nums_right: list[int]) -> None:
        rest = {"prompt_logprobs": None if share else 0, "lookup": Guesses(nums_right) if ending else None}
        self.play.add([1] * (length - 1) + [ending], num_answers, client, adapter, **rest)

    @rule()
    def step(self) -> None:
        self.play.step()

    @precondition(lambda self: self.play.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.play.end(data.draw(st.sampled_from(list(self.play.left))))

    @precondition(lambda self: self.play.left)
    @rule(data=st.data())
    def cancel_in_a_step(self, data: st.DataObject) -> None:
        self.play.step(data.draw(st.sampled_from(list(self.play.left))), data.draw(st.sampled_from(["", "x"])))

    @rule(adapter=st.sampled_from([None, "x"]))
    def fail(self, adapter: str | None) -> None:
        self.play.step(failing=adapter)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.play.scheduler.check()
        assert self.play.scheduler.num_running + self.play.scheduler.num_waiting == len(self.play.left)

    def teardown(self) -> None:
        # The oldest goes on in each step, so that all end in the steps that they would take one after the other.
        self.play.drain(sum(len(one.tokens) + left for one, left in self.play.left.items()) + self.play.is_ahead)
        assert self.play.blocks.num_free == self.play.blocks.num_blocks
        self.play.scheduler.check()
        assert not self.play.scheduler._clients


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def spans(chunks: list[Chunk]) -> list[tuple[Sequence, int, int]]:
    return [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks]


def test_prompts_are_cut_to_the_budget_and_those_who_answer_never_wait() -> None:
    play = Play(num_blocks=30, max_step_tokens=6)
    first = play.add([1, 2, 3], 10)
    play.step()
    second = play.add(list(range(20, 32)), 2)
    found = [spans(play.step()) for _ in range(4)]
    assert found == [
        [(first, 3, 4), (second, 0, 5)],
        [(first, 4, 5), (second, 5, 10)],
        [(first, 5, 6), (second, 10, 12)],
        [(first, 6, 7), (second, 12, 13)],
    ]
    assert play.scheduler.counters.num_chunks == 2


def test_what_begins_alike_is_computed_once_even_in_the_same_step() -> None:
    play = Play(num_blocks=40, max_running=8, max_step_tokens=40)
    sequences = [play.add([5] * 8 + [number], 3) for number in range(3)]
    assert spans(play.step()) == [(sequences[0], 0, 9), (sequences[1], 8, 9), (sequences[2], 8, 9)]
    other = play.add([5] * 8 + [1], 1, adapter="x")
    alone = play.add([5] * 8 + [1], 1, prompt_logprobs=0)
    assert spans(play.step())[-2:] == [(other, 0, 9), (alone, 0, 9)]
    assert (play.scheduler.counters.num_prefix_hits, play.scheduler.counters.num_prefix_tokens) == (2, 16)
    play.drain(10)
    again = play.add([5] * 8, 1)  # the last token is computed again: its logits are wanted
    assert spans(play.step()) == [(again, 6, 8)]


def test_the_newest_gives_way_and_finds_again_what_nobody_needed() -> None:
    play = Play(num_blocks=7, block_size=2, max_step_tokens=8)
    old = play.add([1, 2, 3, 4], 8)
    new = play.add([5, 6, 7], 6)
    answered = []
    while old in play.left:
        answered.append([chunk.sequence for chunk in play.step()])
    assert answered[0] == [old, new]
    assert answered[-1] == [old]
    assert play.scheduler.counters.num_preemptions == 1
    assert not new.is_running
    assert play.step()[0].start == 2  # its first block was never given out again
    play.drain(10)


def test_of_two_clients_the_one_who_asks_for_more_does_not_get_more() -> None:
    play = Play(num_blocks=200, block_size=4, max_running=4, max_step_tokens=64)
    many = [play.add([1, number, *range(10)], 12, "many") for number in range(60)]
    few = [play.add([2, number], 4, "few") for number in range(60)]
    shares = play.scheduler._clients
    # The bound of the paper's Theorem 4.4: twice what one prompt may cost, or what all that runs may.
    bound = 2 * max(PROMPT_WEIGHT * 12, ANSWER_WEIGHT * 4 * 24)
    while shares[None, "many"].waiting and shares[None, "few"].waiting:
        play.step()
        assert abs(shares[None, "many"].served - shares[None, "few"].served) <= bound
    assert sum(one not in play.left for one in few) > 2 * sum(one not in play.left for one in many)


def test_a_client_who_comes_into_a_flood_waits_for_those_who_run_alone() -> None:
    play = Play(num_blocks=200, block_size=4, max_running=4, max_step_tokens=64)
    for number in range(100):
        play.add([1, number, 3], 10, "flood")
    for _ in range(15):
        play.step()
    late = play.add([2, 3], 1, "late")
    for _ in range(11):
        play.step()
    assert late not in play.left


def test_a_pause_earns_nothing() -> None:
    play = Play(num_blocks=200, block_size=4, max_running=1, max_step_tokens=64)
    play.add([9], 1, "pausing")
    play.add([1, 2], 30, "steady")
    for _ in range(20):
        play.step()
    steady = play.scheduler._clients[None, "steady"]
    play.add([9], 1, "pausing")
    assert play.scheduler._clients[None, "pausing"].served == steady.served > 10


def test_one_who_preempts_is_not_charged_twice() -> None:
    play = Play(num_blocks=6, block_size=2, max_step_tokens=8)
    play.add([1, 2, 3, 4], 8, "old")
    play.add([5, 6, 7], 6, "new")
    client = play.scheduler._clients[None, "new"]
    play.drain(40)
    assert play.scheduler.counters.num_preemptions
    assert client.served == 3 * PROMPT_WEIGHT + 5 * ANSWER_WEIGHT  # the last token is never an input


@pytest.mark.parametrize("num_blocks", [6, 7, 9])
def test_a_scarce_cache_makes_steps_not_tokens(num_blocks: int) -> None:
    play = Play(num_blocks=num_blocks, block_size=2, max_running=4, max_step_tokens=8)
    for number in range(5):
        play.add([number, 2, 3], 9)
    play.drain(120)
    assert play.scheduler.counters.num_preemptions > 0
    assert play.num_answers == 45


def test_guesses_that_are_right_save_steps_and_the_blocks_of_wrong_ones_are_free_again() -> None:
    play = Play(num_blocks=20, block_size=2, max_step_tokens=8, max_draft=3)
    sequence = play.add([1, 2, 3], 9, lookup=Guesses([3, 0, 1]))
    assert [(chunk.start, chunk.end, len(chunk.draft)) for chunk in play.step()] == [(0, 3, 0)]
    found = []
    while sequence in play.left:
        found += [(chunk.start, chunk.end, len(chunk.draft)) for chunk in play.step()]
        play.scheduler.check()
        if sequence in play.left:
            assert play.blocks.num_free == 20 - -(-sequence.num_computed // 2)
    # Three right, none, one; the last of the twelve tokens is never guessed, nor computed.
    assert found == [(3, 4, 3), (7, 8, 3), (8, 9, 2), (10, 11, 0)]
    assert (play.scheduler.counters.num_drafted_tokens, play.scheduler.counters.num_accepted_tokens) == (8, 4)
    again = play.add([1, 2, 3, *map(answer, range(3, 12))], 1)
    assert play.step()[0].start == 10, "what was guessed right can be found"
    assert again not in play.left


def test_guesses_take_only_what_nobody_else_wants() -> None:
    play = Play(num_blocks=6, block_size=2, max_step_tokens=5, max_draft=3)
    first = play.add([1], 8, lookup=Guesses([3]))
    assert len(play.step()[0].draft) == 3
    second = play.add([5, 6, 7], 2)
    found = {chunk.sequence: chunk for chunk in play.step()}
    assert (found[second].start, found[second].end) == (0, 3)
    assert len(found[first].draft) == 1, "of the five tokens of a step one is the answer's and three are the prompt's"
    assert play.scheduler.counters.num_preemptions == 0


def test_a_step_is_scheduled_before_the_tokens_of_the_one_before_it_are_known() -> None:
    play = Play(num_blocks=20, block_size=2, max_step_tokens=8, is_ahead=True)
    sequence = play.add([1, 2, 3], 3)
    assert [spans(play.step()) for _ in range(3)] == [[(sequence, 0, 3)], [(sequence, 3, 4)], [(sequence, 4, 5)]]
    assert sequence.tokens == [1, 2, 3, answer(3), answer(4), PENDING]
    assert play.step() == [], "it has all the tokens that it may have"
    assert sequence not in play.left


# --- Slots of adapters -----------------------------------------------------------------------------------------------


def test_who_waits_for_a_slot_holds_up_nobody_and_gets_one_from_those_who_would_never_leave_it() -> None:
    play = Play(num_blocks=400, block_size=4, max_running=8, max_step_tokens=64, num_slots=2)
    for number in range(40):
        play.add([number], 3 + number % 5, "hot", "xy"[number % 2])
    play.step()
    cold, of_base = play.add([100], 2, adapter="z"), play.add([101], 1)
    play.step()
    assert not cold.is_running
    for _ in range(10):  # those who run with x or y end, and nobody new starts with the one of them that is reserved
        play.step()
        assert play.scheduler.num_running > 3
    assert of_base not in play.left
    assert cold not in play.left
    play.drain(100)
    assert play.scheduler.counters.num_placements >= 4


def test_slots_of_idle_adapters_go_by_their_last_use() -> None:
    play = Play(num_blocks=100, block_size=4, num_slots=2)
    for adapter in "xyxz":
        play.add([1], 1, adapter=adapter)
        play.step()
    assert play.scheduler.slots.adapters == ("x", "z")
    assert play.scheduler.counters.num_placements == 3
    play.scheduler.slots.drop("z")
    play.scheduler.slots.drop("z")
    play.add([1], 1, adapter="y")
    play.step()
    assert play.scheduler.slots.adapters == ("x", "y")
    assert set(play.in_slot.values()) == {"x", "y"}
