"""Packing: from documents of any length to samples of exactly `sequence_length` tokens.

Invariants:
- Each piece of a document in a sample has its own number (0, 1, ... in the order they stand), so that a model can keep
  pieces from seeing one another; what is left at the end has document -1, token 0 and no target.
- A target always has the token before it in the same piece: the first token of a piece is never a target.
- A document longer than a sample is cut into pieces that overlap by one token. The token at a seam stands in both pieces
  and is a target in the first alone, so that cutting loses no target and repeats none.
- Every piece, and so every sample, has a target: a piece without one is left out.
- At most `_MAX_OPEN` samples are open: memory does not grow with the corpus.

Packing is best fit (the fullest open sample that has room), which depends on the documents and their order alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tidepool.data.tokenization import Encoded

PADDING = -1
_MAX_OPEN = 64


@dataclass(frozen=True)
class Samples:
    """N samples of T tokens."""

    tokens_NT: NDArray[np.int32]
    loss_mask_NT: NDArray[np.bool_]
    """True where the token is a target (predicted from the tokens before it), never at the first token of a piece."""
    documents_NT: NDArray[np.int32]
    """The number of the piece inside its sample, -1 for padding."""


@dataclass
class _OpenSample:
    room: int
    pieces: list[Encoded] = field(default_factory=list)


class Packer:
    """Takes documents one by one and gives back the samples that they complete, each as its pieces in order."""

    def __init__(self, sequence_length: int) -> None:
        self._length = sequence_length
        self._open: list[_OpenSample] = []

    def add(self, document: Encoded) -> Iterator[list[Encoded]]:
        """Pack a document; yields the samples that are complete now."""
        for piece in _cut(document, self._length):
            room_needed = len(piece.tokens_T)
            fitting = [sample for sample in self._open if sample.room >= room_needed]
            sample = min(fitting, key=lambda one: one.room, default=None)
            if sample is None:
                sample = _OpenSample(self._length)
                self._open.append(sample)
            sample.pieces.append(piece)
            sample.room -= room_needed
            if sample.room < 2:  # too little for any piece: one token has nothing to be predicted from
                yield self._close(sample)
            elif len(self._open) > _MAX_OPEN:
                yield self._close(min(self._open, key=lambda one: one.room))

    def finish(self) -> Iterator[list[Encoded]]:
        """The samples that are still open, in the order in which they were opened."""
        while self._open:
            yield self._close(self._open[0])

    def _close(self, sample: _OpenSample) -> list[Encoded]:
        self._open = [one for one in self._open if one is not sample]
        return sample.pieces


def stack(samples: list[list[Encoded]], sequence_length: int) -> Samples:
    """Lay out N samples, given as their pieces, as arrays of `sequence_length` tokens."""
    shape = (len(samples), sequence_length)
    result = Samples(np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.full(shape, PADDING, np.int32))
    for row, pieces in enumerate(samples):
        start = 0
        for number, piece in enumerate(pieces):
            end = start + len(piece.tokens_T)
            result.tokens_NT[row, start:end] = piece.tokens_T
            result.loss_mask_NT[row, start:end] = piece.targets_T
            result.documents_NT[row, start:end] = number
            start = end
    return result


def _cut(document: Encoded, length: int) -> Iterator[Encoded]:
    num_tokens = len(document.tokens_T)
    for start in range(0, max(1, num_tokens - 1), length - 1):
        targets_T = document.targets_T[start : start + length].copy()
        targets_T[:1] = False
        if targets_T.any():
            yield Encoded(document.tokens_T[start : start + length], targets_T)
