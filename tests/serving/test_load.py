"""Hundreds of streams at a time on a gateway in a process of its own, by the parts of `benchmarks/load.py`: none waits for the others,
and nothing is left of them.
"""

from collections.abc import Iterator

import pytest

from benchmarks.load import Clients, Server, Work

NUM_STREAMS, NUM_LEAVING = 200, 100
STREAM = Work(64)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Clients() as clients, Server("ours", clients) as server:
        yield server


def test_streams_go_on_together_and_reach_their_clients_as_they_are_made(server: Server) -> None:
    with server.held(STREAM, NUM_STREAMS, at=32) as found:
        pass  # inside, every client has the first half of its answer, and the model has made no more
    assert (found["num_answers"], found["num_failures"]) == (NUM_STREAMS, 0)
    assert found["least_progress"] > 0.9, "when the first one was done"


def test_nothing_is_left_of_streams_that_ended_or_whose_clients_left(server: Server) -> None:
    def rounds(number: int) -> None:
        for _ in range(number):
            with server.held(STREAM, NUM_STREAMS, at=32, num_leaving=NUM_LEAVING) as found:
                pass
            assert (found["num_answers"], found["num_failures"]) == (NUM_STREAMS - NUM_LEAVING, 0)

    rounds(2)  # caches, and memory that Python keeps
    before = server.settled()
    rounds(3)
    after = server.settled()
    num_streams = 3 * NUM_STREAMS
    assert after["num_objects"] - before["num_objects"] < num_streams / 4
    assert after["rss_bytes"] - before["rss_bytes"] < 4096 * num_streams
