"""What a request has got so far, and the call that gets it the rest when its replica is gone. Pure.

A replica that dies or must go leaves its requests unfinished. Another one takes the same prompt and the tokens that were told, makes
everything else anew from them (see `GenerationRequest.resumed`), and goes on.

Invariants:
- What the client gets is the frames of one undisturbed answer: each token once, in order, one `Started`, one end for each answer.
- A request without a seed is given one, so that another replica draws what the first one would have drawn.
- A request during which replica after replica breaks without a token more is given up: it may be what breaks them.
"""

import secrets
from dataclasses import replace

from tidepool.errors import ClusterError
from tidepool.inference.engine import Output
from tidepool.serving.backend import Call, Frame, Started

MAX_IN_VAIN = 3
"""So many replicas may be lost in a row without a token more."""


class Replay:
    """One request: `take` in what replicas say, and ask for the `call` to send them."""

    def __init__(self, call: Call) -> None:
        self._call = call if call.sampling.seed is not None else replace(call, sampling=replace(call.sampling, seed=secrets.randbits(63)))
        self._tokens: list[list[int]] = [[] for _ in range(call.sampling.n)]
        self._ended: set[int] = set()
        self.is_taken = False
        """Whether a replica took it, and the client was told so."""
        self._num_in_vain = 0

    @property
    def call(self) -> Call:
        """What to send to a replica now."""
        if not self.is_taken or self._call.task != "generate":
            return self._call
        return replace(self._call, resumed=tuple(map(tuple, self._tokens)))

    def take(self, frame: Frame) -> Frame | None:
        """Take in what a replica says; returns it if the client has not been told yet."""
        if isinstance(frame, Started):
            is_new, self.is_taken = not self.is_taken, True
            return frame if is_new else None
        if not isinstance(frame, Output):
            return frame
        if frame.answer in self._ended:
            return None
        self._tokens[frame.answer] += frame.token_ids
        self._num_in_vain = 0
        if frame.finish_reason is not None:
            self._ended.add(frame.answer)
        return frame

    def lose(self) -> None:
        """The replica broke. Raises `ClusterError` if too many did in vain."""
        self._num_in_vain += 1
        if self._num_in_vain >= MAX_IN_VAIN:
            raise ClusterError(f"{MAX_IN_VAIN} replicas were lost, one after the other, with this request: try again later.")
