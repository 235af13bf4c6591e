"""Snapshots: the bytes of a safetensors file of what the tensors held, whatever happens to them later."""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from tidepool.checkpoint.snapshot import Snapshot, divide


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def tensors(step: int, rows: int = 3) -> dict[str, Tensor]:
    return {
        "model.bias": torch.full((5,), step, dtype=torch.bfloat16),
        "a": torch.arange(7, dtype=torch.uint8) + step,
        "count": torch.tensor(float(step)),
        "ids": torch.tensor([step, -step]),
        "mask": torch.tensor([True, False, step % 2 == 0]),
        "none": torch.empty(0, 4, dtype=torch.float64),
        "transposed": (torch.arange(rows * 4, dtype=torch.float32).view(rows, 4) * step).T,
    }


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


def test_it_is_a_safetensors_file_each_time_also_of_other_shapes(executor: Executor) -> None:
    snapshot = Snapshot()
    for step, rows in [(1, 3), (2, 3), (3, 2), (4, 90_000), (5, 1)]:
        snapshot.begin(tensors(step, rows), executor)
        check(load(bytes(snapshot.data())), tensors(step, rows))


def test_memory_is_used_again(executor: Executor) -> None:
    snapshot = Snapshot()
    snapshot.begin(tensors(1), executor)
    first = snapshot.data()
    snapshot.begin(tensors(2), executor)
    second = snapshot.data()
    assert bytes(first) == bytes(second)


def test_it_begins_with_a_page_so_that_a_disk_takes_it_as_it_is(executor: Executor) -> None:
    snapshot = Snapshot()
    for rows in (3, 90_000):
        snapshot.begin(tensors(1, rows), executor)
        assert torch.frombuffer(snapshot.data(), dtype=torch.uint8).data_ptr() % 4096 == 0


def test_what_changes_after_it_settled_is_not_in_it() -> None:
    may_copy = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        busy.submit(may_copy.wait)
        held, snapshot = tensors(1), Snapshot()
        snapshot.begin(held, busy)
        settled = threading.Event()
        thread = threading.Thread(target=lambda: (snapshot.settle(), settled.set()))
        thread.start()
        assert not settled.wait(0.2), "the copy has not begun"
        may_copy.set()
        thread.join()
        for tensor in held.values():
            tensor.zero_()
        check(load(bytes(snapshot.data())), tensors(1))


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=40), st.integers(1, 6))
def test_parts_hold_every_name_once_and_differ_by_no_more_than_the_largest(sizes: dict[str, int], num_parts: int) -> None:
    parts = divide(sizes, num_parts)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    filled = [sum(sizes[name] for name in part) for part in parts]
    assert max(filled) - min(filled) <= max(sizes.values(), default=0)
    assert parts == divide(dict(reversed(sizes.items())), num_parts), "the same for every worker"
