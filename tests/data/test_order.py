"""The global sample order: every sample exactly once an epoch, and reads that stay near one another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.data.order import Layout, permutation, sample_at

layouts = st.builds(Layout, st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)


def epoch_order(seed: int, epoch: int, layout: Layout) -> list[int]:
    return [sample_at(seed, epoch, index, layout) for index in range(layout.num_samples)]


@given(seeds, epochs, layouts)
def test_each_epoch_reads_every_sample_exactly_once(seed: int, epoch: int, layout: Layout) -> None:
    assert sorted(epoch_order(seed, epoch, layout)) == list(range(layout.num_samples))


@given(seeds, layouts, st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=40))
def test_any_world_sizes_and_resume_points_read_every_sample_exactly_once(
    seed: int, layout: Layout, incarnations: list[tuple[int, int]]
) -> None:
    """Each incarnation has its own world size and takes some steps; the next one knows only the index to go on from."""
    cursor, read = 0, []
    for world_size, num_steps in [*incarnations, (1, layout.num_samples)]:
        for _ in range(num_steps):
            for rank in range(world_size):
                if cursor + rank < layout.num_samples:
                    read.append(sample_at(seed, 3, cursor + rank, layout))
            cursor += world_size
    assert sorted(read) == list(range(layout.num_samples))


@given(seeds, epochs, layouts)
def test_a_window_touches_no_more_row_groups_than_its_width(seed: int, epoch: int, layout: Layout) -> None:
    groups = [sample // layout.row_group_size for sample in epoch_order(seed, epoch, layout)]
    assert all(len(window) <= layout.window for window in _windows(groups, layout))


def _windows(groups: list[int], layout: Layout) -> list[set[int]]:
    """The sets of row groups read together: a new one starts when every sample of the sets before has been read."""
    left = {group: groups.count(group) for group in set(groups)}
    windows: list[set[int]] = [set()]
    for group in groups:
        if len(windows[-1]) == layout.window and not any(left[one] for one in windows[-1]):
            windows.append(set())
        windows[-1].add(group)
        left[group] -= 1
    return windows


def test_a_cache_of_one_window_fetches_each_row_group_once() -> None:
    layout = Layout(num_samples=16 * 7 * 5 + 3, row_group_size=16, window=7)
    cached: dict[int, None] = {}
    fetches = 0
    for sample in epoch_order(1, 0, layout):
        group = sample // layout.row_group_size
        fetches += group not in cached
        cached.pop(group, None)
        cached[group] = None
        if len(cached) > layout.window:
            del cached[next(iter(cached))]
    assert fetches == layout.num_row_groups


def test_epochs_and_seeds_differ() -> None:
    layout = Layout(num_samples=200, row_group_size=16, window=4)
    orders = {tuple(epoch_order(seed, epoch, layout)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_for_ever() -> None:
    """Runs resume under a later version of this code: these numbers never change."""
    layout = Layout(num_samples=1_000_003, row_group_size=64, window=16)
    assert [sample_at(7, 2, index, layout) for index in (0, 1, 2, 500_000, 1_000_002)] == [856607, 891788, 590234, 145084, 224240]


def test_a_huge_dataset_costs_no_more_than_a_small_one() -> None:
    layout = Layout(num_samples=10**15 + 7, row_group_size=64, window=16)
    samples = [sample_at(0, 0, index, layout) for index in range(0, 10**15, 10**13)]
    assert len(set(samples)) == 100
    assert all(0 <= sample < layout.num_samples for sample in samples)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_epoch_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        sample_at(0, 0, index, Layout(10, 4, 2))


@given(st.integers(1, 500), st.integers())
def test_a_permutation_is_a_bijection_and_its_inverse_undoes_it(size: int, key: int) -> None:
    permuted = permutation(size, key)
    assert sorted(map(permuted, range(size))) == list(range(size))
    assert all(permuted.inverse(permuted(number)) == number for number in range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 10, 100])
def test_each_number_goes_everywhere_about_equally_often(size: int) -> None:
    """Chi-squared of where 0 goes over many keys; the bound is far in the tail for a fair shuffle, and fixed keys repeat."""
    num_keys = 200 * size
    counts = [0] * size
    for key in range(num_keys):
        counts[permutation(size, key)(0)] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < size + 4 * (2 * size) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    permuted = permutation(1000, "neighbours")
    distances = [abs(permuted(number) - permuted(number + 1)) for number in range(999)]
    assert 300 < sum(distances) / 999 < 367  # a fair shuffle has (n + 1) / 3
    assert sum(1 for number in range(1000) if permuted(number) == number) < 6
