"""What is guessed from a text's own past."""

import random

import pytest

from tidepool.inference.lookup import SIZES, PromptLookup


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([], ()),
        ([1, 2, 3, 4], ()),
        ([1, 2, 3, 9, 8, 7, 6, 1, 2, 3], (9, 8, 7, 6)),
        ([2, 3, 5, 1, 2, 3, 9, 8, 7, 6, 1, 2, 3], (9, 8, 7, 6)),  # the longer match
        ([1, 2, 5, 6, 7, 8, 1, 2, 9, 9, 9, 9, 1, 2], (9, 9, 9, 9)),  # of equals the latest
        ([4, 5, 5, 5], (5, 5, 5, 5)),  # a repetition goes on
        ([1, 2, 3, 1, 2, 3, 1, 2], (3, 1, 2, 3)),
    ],
)
def test_what_came_before_comes_again(tokens: list[int], guess: tuple[int, ...]) -> None:
    assert PromptLookup().propose(tokens, 4) == guess


def test_a_text_that_grows_is_looked_through_once_with_the_same_guesses() -> None:
    rng = random.Random(1)
    tokens: list[int] = []
    growing = PromptLookup()
    num_guesses = 0
    for _ in range(300):
        tokens += rng.choices(range(4), k=rng.randint(1, 3))
        guess = growing.propose(tokens, 3)
        assert guess == PromptLookup().propose(tokens, 3)
        for size in SIZES:
            ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
            if ends and len(tokens) >= size:
                follows = tokens[ends[-1] :][:3]
                assert list(guess[: len(follows)]) == follows
                num_guesses += 1
                break
        else:
            assert guess == ()
    assert num_guesses > 200
