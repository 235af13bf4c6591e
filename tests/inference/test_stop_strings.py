"""Stop strings: nothing of them gets out, and everything else does, however the text is cut."""

import itertools
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidepool.inference.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)


def play(stops: tuple[str, ...], chunks: list[str]) -> tuple[str, bool]:
    matcher, out, so_far = StopStrings(stops), "", ""
    for chunk in chunks:
        so_far += chunk
        text, stopped = matcher.push(chunk)
        out += text
        if stopped:
            return out, True
        assert not any(stop.startswith(so_far[index:]) for stop in stops for index in range(len(out)))
    return out + matcher.finish(), False


@settings(max_examples=300)
@example(text="abb", stops=["abb", "b"], cuts=[])
@example(text="aab", stops=["b", "ab"], cuts=[])
@given(text=LETTERS, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cuts=st.lists(st.integers(0, 12)))
def test_text_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(edges)]
    ends = [(match.end(1), match.start()) for stop in stops for match in re.finditer(f"(?=({stop}))", text)]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert play(tuple(stops), chunks) == expected


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopStrings(("\n\nUser:",))
    assert matcher.push("Hello\n") == ("Hello", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("e it\n") == ("\n\nUse it", False)
    assert matcher.finish() == "\n"
