"""The bytes of single tokens make the bytes of the text."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tidepool.inference.detokenizer import Detokenizer
from tidepool.inference.spelling import TokenBytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(text=st.text())
def test_the_bytes_of_a_texts_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    spelled = TokenBytes(tokenizer)
    assert b"".join(spelled[token] for token in tokenizer(text, split_special_tokens=True)["input_ids"]).decode() == text


def test_special_tokens_are_spelled_as_they_are_written_and_numbers_without_a_token_are_nothing(tokenizer: Any) -> None:
    spelled = TokenBytes(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert spelled[end] == b"<|im_end|>"
    assert end in spelled.special
    assert spelled[len(tokenizer) + 5] == b""


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: a mark for spaces, and bytes for what has no token."""
    pieces = ["<unk>", "<s>", "[CALL]", "\u2581the", "\u2581ti", "de", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CALL]"]})
    return tokenizer


def test_marks_of_spaces_and_single_bytes(sentencepiece: PreTrainedTokenizerFast) -> None:
    spelled = TokenBytes(sentencepiece)
    wave = [6 + byte for byte in "🌊".encode()]
    assert b"".join(spelled[token] for token in [3, 4, 5, *wave]) == " the tide🌊".encode()
    assert spelled[1] == b"<s>"


@pytest.mark.parametrize("kind", ["bytes", "window"])
def test_a_special_token_that_is_to_be_shown_stands_in_the_text(tokenizer: Any, sentencepiece: Any, kind: str) -> None:
    if kind == "bytes":
        used, shown, hidden = tokenizer, tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
        words, expected = tokenizer("the tide")["input_ids"], "the tide<|im_start|>the tide"
    else:
        used, shown, hidden, words, expected = sentencepiece, 2, 1, [3, 4, 5], "the tide[CALL]the tide"
    detokenizer = Detokenizer(used, frozenset([shown]))
    texts = [detokenizer.push(token) for token in [*words, shown, hidden, *words]]
    assert "".join([*texts, detokenizer.finish()]) == expected
