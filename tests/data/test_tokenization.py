"""Which tokens a document has, and which of them are targets: exactly those that are wanted, whatever the text."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.data.rows import Document
from tidepool.data.tokenization import Encoded, Encoder, Unusable, encode_ahead
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
PLAIN = f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}"


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encode(tokenizer: Any, document: Document) -> Encoded:
    [encoded] = Encoder(tokenizer).encode([document])
    assert isinstance(encoded, Encoded)
    return encoded


def targets(tokenizer: Any, document: Document) -> str:
    encoded = encode(tokenizer, document)
    return str(tokenizer.decode(encoded.tokens_T[encoded.targets_T]))


# --- Text ------------------------------------------------------------------------------------------------------------


def test_all_of_a_text_is_target_and_it_ends(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Document("a.txt", text="the tide"))
    assert tokenizer.decode(encoded.tokens_T) == "the tide<|endoftext|>"
    assert encoded.targets_T.all()


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
    assert ending.decode(encode(ending, Document("a", text="the tide")).tokens_T) == "<|im_start|>the tide<|endoftext|>"
    pair = encode(ending, Document("a", prompt="the", completion=" tide"))
    assert ending.decode(pair.tokens_T) == "<|im_start|>the tide<|endoftext|>"
    assert ending.decode(pair.tokens_T[pair.targets_T]) == " tide<|endoftext|>"


def test_a_tokenizer_that_is_set_to_cut_or_to_pad_does_neither(tokenizer: Any) -> None:
    cutting = copy.deepcopy(tokenizer)
    cutting.backend_tokenizer.enable_truncation(2)
    cutting.backend_tokenizer.enable_padding(length=64)
    assert cutting.decode(encode(cutting, Document("a", text="the tide comes in")).tokens_T) == "the tide comes in<|endoftext|>"


# --- Prompts and completions -----------------------------------------------------------------------------------------


@given(prompt=st.text(), completion=st.text(min_size=1))
def test_the_completion_and_the_end_are_targets_and_no_token_of_the_prompt(tokenizer: Any, prompt: str, completion: str) -> None:
    encoded = encode(tokenizer, Document("a:1", prompt=prompt, completion=completion))
    asked = tokenizer(prompt)["input_ids"]
    assert encoded.tokens_T[: len(asked)].tolist() == asked, "the prompt has the tokens that it has when a model is asked"
    assert not encoded.targets_T[: len(asked)].any()
    assert encoded.targets_T[len(asked) :].all()
    assert encoded.tokens_T[len(asked) :].tolist() == [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]


def test_a_word_that_crosses_the_border_is_two_tokens(tokenizer: Any) -> None:
    assert len(tokenizer(" tide")["input_ids"]) == 1
    encoded = encode(tokenizer, Document("a:1", prompt="the ti", completion="de"))
    assert tokenizer.decode(encoded.tokens_T[encoded.targets_T]) == "de<|endoftext|>"
    assert tokenizer.decode(encoded.tokens_T) == "the tide<|endoftext|>"


def test_all_of_a_prompt_and_its_completion_can_be_learned(tokenizer: Any) -> None:
    assert encode(tokenizer, Document("a:1", prompt="the", completion=" tide", loss="all")).targets_T.all()


def test_a_tokenizer_that_puts_a_space_before_each_text_puts_none_in_the_middle() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<s>", "</s>", "<unk>", "▁", *"abcdxyz"])}
    backend = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spacing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    encoded = encode(spacing, Document("a:1", prompt="ab", completion="cd"))
    assert spacing.convert_ids_to_tokens(encoded.tokens_T) == ["▁", "a", "b", "c", "d", "</s>"]
    assert encoded.targets_T.tolist() == [False, False, False, True, True, True]


# --- Chats -----------------------------------------------------------------------------------------------------------


def test_of_a_chat_the_assistants_turns_and_their_ends_are_targets(tokenizer: Any) -> None:
    encoded = encode(tokenizer, CHAT)
    assert tokenizer.decode(encoded.tokens_T).startswith(
        "<|im_start|>user\nwhat comes in?<|im_end|>\n<|im_start|>assistant\nthe tide<|im_end|>\n"
    )
    assert targets(tokenizer, CHAT) == "the tide<|im_end|>it goes out<|im_end|>"


def test_a_chat_has_the_tokens_that_transformers_gives_it(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(list(CHAT.messages or ()), return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(tokenizer, CHAT)
    assert encoded.tokens_T.tolist() == rendered["input_ids"]
    assert encoded.targets_T.astype(int).tolist() == rendered["assistant_masks"]


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1).filter(lambda text: bool(text.strip()))


@given(
    turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "assistant"]), words, st.booleans()), min_size=1, max_size=6),
    loss=st.sampled_from(["assistant", "completion", "all"]),
    marked=st.booleans(),
)
def test_the_targets_of_a_chat_are_exactly_those_wanted(tokenizer: Any, turns: Any, loss: Any, marked: bool) -> None:
    """What is wanted is found in the rendered text by counting characters, not by the code under test."""
    tokenizer = tokenizer if marked else with_template(tokenizer, PLAIN)
    messages = tuple({"role": role, "content": text} for role, text, _ in turns)
    muted = tuple(i for i, (role, _, is_muted) in enumerate(turns) if role == "assistant" and is_muted)
    encoded = encode(tokenizer, Document("a:1", messages=messages, muted=muted, loss=loss))

    answers = [i for i, (role, _, _) in enumerate(turns) if role == "assistant"]
    wanted = {"all": range(len(turns)), "assistant": answers, "completion": answers[-1:]}[loss]
    expected: list[tuple[str, bool]] = []
    for i, (role, text, _) in enumerate(turns):
        learned = i in wanted and i not in muted
        expected += [(f"<|im_start|>{role}\n", loss == "all"), (f"{text}<|im_end|>", learned), ("\n", loss == "all")]
    pieces = [tokenizer(text)["input_ids"] for text, _ in expected]
    assert tokenizer.decode(encoded.tokens_T) == "".join(text for text, _ in expected)
    # Borders are where special tokens stand, or the line break before a content: no token crosses them in this vocabulary.
    assert encoded.tokens_T.tolist() == [token for piece in pieces for token in piece]
    assert encoded.targets_T.tolist() == [flag for piece, (_, flag) in zip(pieces, expected, strict=True) for _ in piece]


def test_a_message_of_weight_0_is_read_and_not_learned(tokenizer: Any) -> None:
    document = Document(CHAT.place, messages=CHAT.messages, muted=(1,))
    assert targets(tokenizer, document) == "it goes out<|im_end|>"
    assert encode(tokenizer, document).tokens_T.tolist() == encode(tokenizer, CHAT).tokens_T.tolist()


def test_a_template_without_generation_marks_gives_the_same_targets(tokenizer: Any) -> None:
    marked, unmarked = encode(tokenizer, CHAT), encode(with_template(tokenizer, PLAIN), CHAT)
    assert unmarked.tokens_T.tolist() == marked.tokens_T.tolist()
    assert unmarked.targets_T.tolist() == marked.targets_T.tolist()


def test_a_token_that_crosses_into_a_turn_belongs_to_it(tokenizer: Any) -> None:
    """`User: hi Bot: the tide` has the token ` the`, whose space the template writes: the model must learn it."""
    glued = with_template(
        tokenizer, "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    document = Document("a:1", messages=({"role": "assistant", "content": "the tide"},))
    assert targets(glued, document) == " the tide"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    forgetful = with_template(tokenizer, f"{{% for m in messages[-3:] %}}{TURN}{{% endfor %}}{PROMPT}")
    with pytest.raises(DataError, match=r"renders earlier turns differently .*chat\.jsonl:1.*generation"):
        Encoder(forgetful).encode([CHAT])


def test_a_template_that_marks_too_much_is_refused(tokenizer: Any) -> None:
    eager = with_template(tokenizer, f"{{% for m in messages %}}{{% generation %}}{TURN}{{% endgeneration %}}{{% endfor %}}")
    with pytest.raises(DataError, match=r"marks 4 passages as generated in chat\.jsonl:1, which has 2 messages of the assistant"):
        Encoder(eager).encode([CHAT])


def test_a_template_that_is_no_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"not valid Jinja \(line 2"):
        Encoder(with_template(tokenizer, "{{ messages }}\n{% endfor %}")).encode([CHAT])


def test_a_document_that_the_template_refuses_is_unusable(tokenizer: Any) -> None:
    picky = with_template(tokenizer, "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + PLAIN)
    short = Document("b:1", messages=(CHAT.messages or ())[:2])
    [bad, good] = Encoder(picky).encode([CHAT, short])
    assert bad == Unusable("the chat template refuses it: too long")
    assert isinstance(good, Encoded)


def test_messages_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:1 holds messages, but the tokenizer has no chat template"):
        Encoder(with_template(tokenizer, None)).encode([CHAT])


# --- Many ------------------------------------------------------------------------------------------------------------

documents = st.one_of(
    st.builds(lambda text: Document("t", text=text), st.text()),
    st.builds(lambda prompt, completion: Document("p", prompt=prompt, completion=completion), st.text(), st.text()),
    st.builds(lambda text: Document("m", messages=(*(CHAT.messages or ()), {"role": "assistant", "content": text})), st.text()),
)


@given(many=st.lists(documents, max_size=12))
def test_documents_in_a_batch_have_the_tokens_that_they_have_alone(tokenizer: Any, many: list[Document]) -> None:
    encoder = Encoder(tokenizer)
    together = list(encode_ahead(encoder, many))
    assert [document for document, _ in together] == many
    for document, encoded in together:
        [alone] = encoder.encode([document])
        assert isinstance(encoded, Encoded)
        assert isinstance(alone, Encoded)
        assert np.array_equal(encoded.tokens_T, alone.tokens_T)
        assert np.array_equal(encoded.targets_T, alone.targets_T)


def test_many_batches_come_in_order_and_an_error_in_one_comes_out(tokenizer: Any) -> None:
    many = [Document(str(number), text=f"tide {number}") for number in range(3000)]
    encoded = [(document.place, tokenizer.decode(one.tokens_T[:-1])) for document, one in encode_ahead(Encoder(tokenizer), many)]  # type: ignore[union-attr]
    assert encoded == [(str(number), f"tide {number}") for number in range(3000)]
    with pytest.raises(DataError, match="no chat template"):
        list(encode_ahead(Encoder(with_template(tokenizer, None)), [*many, CHAT]))
