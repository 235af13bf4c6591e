"""How many replica groups are started."""

import pytest

from tidepool.training.growth import num_to_start, useful_groups


@pytest.mark.parametrize(
    ("limit", "workers", "shards", "useful"), [(8, 1, 8, 8), (7, 1, 8, 4), (3, 1, 8, 3), (4, 1, 6, 3), (4, 2, 8, 4), (0, 1, 8, 0)]
)
def test_only_sizes_that_make_a_step_faster(limit: int, workers: int, shards: int, useful: int) -> None:
    assert useful_groups(limit, workers, shards) == useful


def test_the_minimum_is_started_without_room_and_more_only_into_room() -> None:
    assert num_to_start(0, 0, least=2, wanted=8, workers_per_group=1, num_shards=8) == 2
    assert num_to_start(2, 0, least=2, wanted=8, workers_per_group=1, num_shards=8) == 0
    assert num_to_start(2, 2, least=2, wanted=8, workers_per_group=1, num_shards=8) == 2
    assert num_to_start(2, 9, least=2, wanted=3, workers_per_group=1, num_shards=8) == 1
    assert num_to_start(4, 9, least=1, wanted=3, workers_per_group=1, num_shards=8) == 0
