"""Worker threads of OpenMP end when they are told to, and come again when they are needed."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tidepool.openmp import _libraries, end_workers

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

    num = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as thread:  # one that has not computed yet
            thread.submit(play).result()
    finally:
        torch.set_num_threads(num)
