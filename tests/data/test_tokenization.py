"""Which tokens a document has, and which of them are targets."""

import copy
from typing import Any

import pytest

from tidepool.data.sources import Document
from tidepool.data.tokenization import Encoder, UnusableDocumentError
from tidepool.errors import DataError

CHAT = Document(
    "chat.jsonl:1",
    messages=(
        {"role": "user", "content": "what comes in?"},
        {"role": "assistant", "content": "the tide"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "it goes out"},
    ),
)
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def targets(tokenizer: Any, document: Document) -> str:
    encoded = Encoder(tokenizer).encode(document)
    return str(tokenizer.decode(encoded.tokens_T[encoded.targets_T]))


def test_all_of_a_text_is_target_and_it_ends(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer).encode(Document("a.txt", text="the tide"))
    assert tokenizer.decode(encoded.tokens_T) == "the tide<|endoftext|>"
    assert encoded.targets_T.all()


def test_of_a_chat_the_assistants_turns_and_their_ends_are_targets(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer).encode(CHAT)
    assert tokenizer.decode(encoded.tokens_T).startswith(
        "<|im_start|>user\nwhat comes in?<|im_end|>\n<|im_start|>assistant\nthe tide<|im_end|>\n"
    )
    assert targets(tokenizer, CHAT) == "the tide<|im_end|>it goes out<|im_end|>"


def test_a_template_without_generation_marks_gives_the_same_targets(tokenizer: Any) -> None:
    plain = with_template(tokenizer, f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}")
    marked, unmarked = Encoder(tokenizer).encode(CHAT), Encoder(plain).encode(CHAT)
    assert unmarked.tokens_T.tolist() == marked.tokens_T.tolist()
    assert unmarked.targets_T.tolist() == marked.targets_T.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    forgetful = with_template(tokenizer, f"{{% for m in messages[-3:] %}}{TURN}{{% endfor %}}{PROMPT}")
    with pytest.raises(DataError, match=r"renders earlier turns differently .*chat\.jsonl:1.*generation"):
        Encoder(forgetful).encode(CHAT)


def test_a_document_that_the_template_refuses_is_unusable(tokenizer: Any) -> None:
    picky = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UnusableDocumentError, match="roles must alternate"):
        Encoder(picky).encode(CHAT)


def test_messages_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:1 holds messages, but the tokenizer has no chat template"):
        Encoder(with_template(tokenizer, None)).encode(CHAT)


def test_a_tokenizer_needs_an_end_of_text(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        Encoder(endless)


def test_a_tokenizer_that_ends_texts_itself_is_not_helped(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    tokens = Encoder(ending).encode(Document("a", text="the tide")).tokens_T
    assert ending.decode(tokens) == "<|im_start|>the tide<|endoftext|>"
