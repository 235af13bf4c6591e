"""What a client gets of a request whose replicas are lost: the frames of one answer, and the call that gets it the rest."""

import pytest

from tests.serving.fakes import BASE_DIGEST
from tidepool.errors import ClusterError
from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.backend import Call, Spelling, Started
from tidepool.serving.replay import MAX_IN_VAIN, Replay


def call_of(**sampling: object) -> Call:
    return Call("r", BASE_DIGEST, None, "the tide", SamplingParameters(max_tokens=8, **sampling))  # type: ignore[arg-type]


def test_a_request_that_was_not_taken_is_sent_as_it_was() -> None:
    replay = Replay(call_of(seed=3))
    assert replay.call == call_of(seed=3)
    replay.lose()
    assert replay.call == call_of(seed=3)


def test_the_tokens_that_were_told_are_sent_along_and_told_once() -> None:
    replay = Replay(call_of(seed=3))
    assert replay.take(Started(5)) == Started(5)
    assert replay.call.resumed == ((),)
    assert [replay.take(Output((token,), "a")) for token in (7, 8)] == [Output((7,), "a"), Output((8,), "a")]
    replay.lose()
    assert replay.call.resumed == ((7, 8),)
    assert replay.take(Started(5)) is None
    assert replay.take(Output((9,), "c", "length")) == Output((9,), "c", "length")
    assert replay.call.resumed == ((7, 8, 9),)


def test_an_answer_that_had_ended_ends_once() -> None:
    replay = Replay(call_of(seed=3, n=2))
    frames = [Started(5), Output((7,), "a", "stop", 0), Output((6,), "b", None, 1)]
    assert [replay.take(frame) for frame in frames] == frames
    replay.lose()
    assert replay.call.resumed == ((7,), (6,))
    assert replay.take(Output((), "", "stop", 0)) is None
    assert replay.take(Output((5,), "c", "stop", 1)) is not None


def test_an_unseeded_request_draws_the_same_at_another_replica() -> None:
    replay, other = Replay(call_of()), Replay(call_of())
    assert replay.call.sampling.seed is not None
    assert replay.call.sampling.seed != other.call.sampling.seed
    before = replay.call.sampling
    replay.take(Started(5))
    assert replay.call.sampling == before


def test_what_is_no_answer_is_asked_again_as_it_was() -> None:
    call = Call("r", BASE_DIGEST, None, "the tide", SamplingParameters(seed=1), task="tokenize")
    replay = Replay(call)
    replay.take(Started(5))
    assert replay.call == call
    assert replay.take(Spelling({5: b"\xff"})) == Spelling({5: b"\xff"})


def test_a_request_that_takes_replica_after_replica_with_it_is_given_up() -> None:
    replay = Replay(call_of())
    replay.take(Started(5))
    for _ in range(10):  # as long as there is a token more each time
        for _ in range(MAX_IN_VAIN - 1):
            replay.lose()
        replay.take(Output((1,), "a"))
    for _ in range(MAX_IN_VAIN - 1):
        replay.lose()
    with pytest.raises(ClusterError, match="one after the other"):
        replay.lose()
