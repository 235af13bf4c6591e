"""Reading ahead of the steps: the right samples whatever is asked, bounded, errors where they belong, no thread left."""

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.data import Samples
from tidepool.errors import StoreUnreachableError
from tidepool.training.prefetch import Key, Prefetch

WAIT_S = 30


def samples_of(step: int, shard: int) -> Samples:
    tokens = np.full((1, 4), step * 100 + shard, np.int32)
    return Samples(tokens, tokens > 0, tokens)


def what(samples: Samples) -> Key:
    return divmod(int(samples.tokens_NT[0, 0]), 100)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


class Reads:
    """Reads that are noted when they begin, and that wait at the gate."""

    def __init__(self) -> None:
        self.begun: list[Key] = []
        self.changed = threading.Condition()
        self.gate = threading.Event()

    def __call__(self, step: int, shard: int) -> Samples:
        with self.changed:
            self.begun.append((step, shard))
            self.changed.notify_all()
        assert self.gate.wait(WAIT_S)
        return samples_of(step, shard)

    def wait_for(self, num: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= num, WAIT_S), self.begun


@settings(max_examples=30, deadline=None)
@given(
    planned=st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True).map(sorted),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=30),
    max_shards=st.integers(1, 20),
)
def test_what_is_taken_is_what_was_asked_for_whatever_was_planned(planned: list[int], asked: list[Key], max_shards: int) -> None:
    with closing(Prefetch(samples_of, 10, max_shards * 10)) as prefetch:
        prefetch.plan(range(2, 8), planned)
        assert [what(prefetch.take(*key)) for key in asked] == asked
        prefetch.plan(range(5, 8), planned)
        assert [what(prefetch.take(*key)) for key in asked] == asked


def test_the_next_steps_are_read_while_nobody_asks_and_no_further_than_the_bound() -> None:
    reads = Reads()
    with closing(Prefetch(reads, shard_bytes=10, max_bytes=69)) as prefetch:
        prefetch.plan(range(100), [3, 4])
        reads.wait_for(4)
        assert len(prefetch._ahead) == 4, "two steps at first"
        reads.gate.set()
        assert what(prefetch.take(0, 3)) == (0, 3)
        assert what(prefetch.take(0, 4)) == (0, 4)
        reads.wait_for(8)
        assert len(prefetch._ahead) == 6, "and more with each that is taken"
        for step in range(1, 50):
            for shard in (3, 4):
                assert what(prefetch.take(step, shard)) == (step, shard)
                assert len(prefetch._ahead) <= 6
        assert sorted(reads.begun) == sorted(set(reads.begun)), "nothing is read twice"


def test_what_is_ready_costs_no_wait_and_what_is_not_is_counted() -> None:
    reads = Reads()
    reads.gate.set()
    with closing(Prefetch(reads, 1)) as prefetch:
        prefetch.plan(range(2), [0])
        for reading in list(prefetch._ahead.values()):
            reading.result(WAIT_S)
        for step in range(2):
            prefetch.take(step, 0)
        assert prefetch.waited_s == 0
        prefetch.take(1, 0)
        assert prefetch.waited_s > 0, "taken before: it is read again"


def test_an_error_comes_out_where_the_data_is_needed_and_another_try_may_succeed() -> None:
    failing = [(2, 0)]

    def read(step: int, shard: int) -> Samples:
        if (step, shard) in failing:
            raise StoreUnreachableError("no answer")
        return samples_of(step, shard)

    with closing(Prefetch(read, 1)) as prefetch:
        prefetch.plan(range(5), [0])
        for reading in list(prefetch._ahead.values()):
            reading.exception(WAIT_S)
        assert [what(prefetch.take(step, 0)) for step in (0, 1)] == [(0, 0), (1, 0)]
        with pytest.raises(StoreUnreachableError):
            prefetch.take(2, 0)
        failing.clear()
        assert [what(prefetch.take(step, 0)) for step in (2, 3, 4)] == [(2, 0), (3, 0), (4, 0)]


def test_close_waits_for_reads_under_way_and_begins_no_other() -> None:
    reads = Reads()
    prefetch = Prefetch(reads, 1)
    prefetch.plan(range(100), [0, 1, 2, 3])
    reads.wait_for(8)
    closing_it = threading.Thread(target=prefetch.close)
    closing_it.start()
    reads.gate.set()
    closing_it.join(WAIT_S)
    assert not closing_it.is_alive()
    num_begun = len(reads.begun)
    assert what(prefetch.take(3, 0)) == (3, 0)
    assert len(reads.begun) == num_begun + 1
