"""Worker threads of OpenMP end when they are told to, and come again when they are needed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.models import CONFIG, TEXT
from tidepool.checkpoint.snapshot import Snapshot
from tidepool.inference.adapters import Adapters
from tidepool.inference.paged import PagedEngine
from tidepool.models import build_model, train_tokenizer
from tidepool.openmp import _libraries, end_workers
from tidepool.specs import EngineSpec

pytestmark = pytest.mark.skipif(not _libraries(), reason="torch does not compute with GNU's OpenMP here")


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_workers_of_a_thread_end_and_come_again() -> None:
    def play() -> None:
        numbers = torch.randn(1_000_000)
        before = num_threads()
        total = numbers.exp()
        assert num_threads() == before + 1
        for _ in range(2):
            end_workers()
            assert num_threads() == before
        assert numbers.exp().equal(total)
        assert num_threads() == before + 1
        end_workers()

    in_a_fresh_thread(play)


def in_a_fresh_thread(play: Callable[[], None]) -> None:
    """In one that has not computed yet, where two would compute."""
    num = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(play).result()
    finally:
        torch.set_num_threads(num)


def test_an_engine_leaves_none_to_the_thread_that_made_it() -> None:
    def play() -> None:
        tokenizer = train_tokenizer([TEXT] * 4, vocab_size=300)
        model = build_model(CONFIG, len(tokenizer), seed=1, tokenizer=tokenizer)
        before = num_threads()
        torch.randn(1_000_000).exp()
        assert num_threads() == before + 1
        PagedEngine(model, tokenizer, EngineSpec(), lambda *_: {})
        assert num_threads() == before

    in_a_fresh_thread(play)


def test_snapshots_and_adapters_leave_none_to_the_threads_that_copy_and_read() -> None:
    def compute(_: Path) -> Any:
        torch.randn(1_000_000).exp()

    def play() -> None:
        source = torch.randn(1_000_000)
        end_workers()
        before = num_threads()
        with ThreadPoolExecutor(1) as copier:
            snapshot = Snapshot()
            snapshot.begin({"weight": source}, copier)
            snapshot.data()
            assert num_threads() == before + 1, "the copier alone"
        adapters = Adapters(compute, 1, lambda _: False, lambda _: None)
        assert num_threads() == before
        adapters._read_once(Path("unused"))
        assert num_threads() == before

    in_a_fresh_thread(play)
