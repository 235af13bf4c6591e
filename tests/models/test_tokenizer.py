"""Trained tokenizers: lossless, repeatable, with a chat template that plain transformers uses."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tidepool.errors import ModelError
from tidepool.models import load_tokenizer, train_tokenizer

CHAT = [{"role": "user", "content": "what comes in?"}, {"role": "assistant", "content": " the tide "}]


@pytest.mark.parametrize("text", ["the tide", "  spaces \t\n\n and lines\n", "Ωλ 潮 🌊 \x00 \x7f", "don't , stop .", ""])
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    texts = [f"the tide number {number} comes in, {number * 7919} goes out" for number in range(300)]
    for name in ("one", "two"):
        train_tokenizer(iter(texts), vocab_size=400).save_pretrained(tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_the_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert set(tokenizer.all_special_ids) == {0, 1, 2}


def test_the_chat_template_is_chatml_and_marks_the_assistant(tokenizer: Any) -> None:
    text = "<|im_start|>user\nwhat comes in?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == text
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(rendered["input_ids"]) == text + " the tide <|im_end|>\n"
    marked = [token for token, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == " the tide <|im_end|>"


def test_a_saved_tokenizer_loads_in_plain_transformers_and_saves_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "one")
    plain = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert plain("the tide<|im_end|>")["input_ids"] == tokenizer("the tide<|im_end|>")["input_ids"]
    assert plain.chat_template == tokenizer.chat_template
    load_tokenizer(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_no_text_is_an_error() -> None:
    with pytest.raises(ModelError, match="no text to train a tokenizer on"):
        train_tokenizer([], vocab_size=300)


def test_a_folder_without_a_usable_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="Cannot load the tokenizer"):
        load_tokenizer(tmp_path)
