"""Guessing an answer's next tokens from its own text: what followed the last time that the sequence ended as it does now.

Prompt look-up (Saxena 2023): a speculative draft without a second model. A guess costs nothing but the step in which it is verified, and
changes no token; summaries, edits of code and quotations have many that are right.
"""

from collections.abc import Sequence

SIZES = (3, 2)
"""Tokens that must agree before what followed them is a guess; the longer match is believed."""


class PromptLookup:
    """The n-grams of a list of tokens that only grows, and what came after the latest of each."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, tokens: Sequence[int], num: int) -> tuple[int, ...]:
        """Up to `num` tokens that may follow these; a repetition that has begun goes on."""
        for end in range(max(self._num_indexed, 1), len(tokens)):
            for size in SIZES:
                if end >= size:
                    self._next[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)
        for size in SIZES:
            if (place := self._next.get(tuple(tokens[-size:]))) is not None:
                known = list(tokens[place : place + num])
                while len(known) < num:
                    known.append(known[len(known) - (len(tokens) - place)])
                return tuple(known)
        return ()
