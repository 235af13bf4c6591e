import pytest

from tests.pool.pools import run
from tidepool.pool.speed import speed_at, useful_sizes


def test_only_sizes_with_fewer_shards_per_worker_are_useful() -> None:
    assert [size for size, _ in useful_sizes(run("r", 1, 16, shards=8))] == [1, 2, 3, 4, 8]


def test_sizes_count_groups_of_several_workers() -> None:
    assert [size for size, _ in useful_sizes(run("r", 1, 9, shards=12, workers_per_group=2))] == [1, 2, 3, 6]


def test_more_workers_than_shards_are_never_useful() -> None:
    assert useful_sizes(run("r", 1, 9, shards=1)) == ((1, 1.0),)


def test_the_first_useful_size_is_the_min_even_if_a_smaller_one_is_as_fast() -> None:
    assert [size for size, _ in useful_sizes(run("r", 5, 8, shards=8))] == [5, 8]


def test_a_measured_size_that_does_not_help_is_not_useful() -> None:
    slow = run("r", 1, 4, shards=4, speeds=((1, 10.0), (2, 19.0), (4, 19.1)))
    assert [size for size, _ in useful_sizes(slow)] == [1, 2]


def test_sizes_that_were_not_measured_follow_the_shards_from_the_nearest_that_was() -> None:
    measured = run("r", 1, 8, shards=8, speeds=((2, 3.0),))
    assert speed_at(measured, 4) == pytest.approx(6.0)
    assert speed_at(measured, 1) == pytest.approx(1.5)


def test_below_its_min_a_run_stands_still() -> None:
    assert speed_at(run("r", 2, 8), 1) == 0.0
