"""Text from tokens: whatever the tokens are, the pieces make the whole, and no piece holds part of a character."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tidepool.inference.detokenizer import Detokenizer

FIXTURES_ARE_CONSTANT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, tokens), detokenizer.finish()]


@FIXTURES_ARE_CONSTANT
@given(text=st.text())
def test_pieces_of_any_text_are_whole_characters_and_make_the_text(tokenizer: Any, text: str) -> None:
    found = pieces(tokenizer, tokenizer(text, split_special_tokens=True)["input_ids"])
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@FIXTURES_ARE_CONSTANT
@given(tokens=st.lists(st.integers(0, 299)))
def test_pieces_of_any_tokens_make_what_the_tokenizer_decodes(tokenizer: Any, tokens: list[int]) -> None:
    tokens = [token % len(tokenizer) for token in tokens]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@FIXTURES_ARE_CONSTANT
@given(tokens=st.lists(st.integers(0, 309), max_size=20))
def test_bytes_that_make_no_character_are_replaced_as_the_tokenizer_does(tokens: list[int]) -> None:
    """Tokens that are single bytes, in any order; tokens added as they are written; special ones; numbers that are no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=["<|x|>"])
    tokenizer.add_tokens(["tide pool", "é🌊", "Ġ"])
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Any) -> None:
    tokens = tokenizer("a🌊b")["input_ids"]
    assert len(tokens) == 6
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "🌊", "b", ""]
    assert pieces(tokenizer, tokens[:3]) == ["a", "", "", "\ufffd"]


def test_a_decoder_that_strips_the_first_space_strips_no_other() -> None:
    vocabulary = {"<s>": 0, "▁the": 1, "▁tide": 2, "s": 3, "<unk>": 4, "<0xE2>": 5, "<0x82>": 6, "<0xAC>": 7}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    tokens = [0, 1, 2, 0, 2, 3, 5, 6, 7, 0, 0, 1, 5, 6]
    assert pieces(tokenizer, tokens) == ["", "the", " tide", "", " tide", "s", "", "", "€", "", "", " the", "", "", "\ufffd\ufffd"]


def test_the_window_does_not_grow_with_the_answer(tokenizer: Any) -> None:
    sizes = []

    class Counting:
        def decode(self, tokens: list[int], **rest: Any) -> str:
            sizes.append(len(tokens))
            text: str = tokenizer.decode(tokens, **rest)
            return text

    pieces(Counting(), tokenizer("the tide comes in 🌊 " * 20)["input_ids"])
    assert max(sizes) < 12
