"""Prompts, and what their tools ask of the answer."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.serving.local import TOOL_TEMPLATE
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.backend import Chat, Message, ToolCall
from tidepool.serving.prompts import Prompts

TOOL: Any = {"type": "function", "function": {"name": "f"}}
CHAT = Chat((Message("user", "hi"),), (TOOL,))


def tokenizer_of(*special: str) -> PreTrainedTokenizerFast:
    """A word is a token, and a word that it does not know is `<unk>`, a special token."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", chat_template=TOOL_TEMPLATE)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def test_special_tokens_that_mark_calls_are_shown_and_no_others() -> None:
    plain, marked = Prompts(tokenizer_of()), tokenizer_of("[TOOL_CALLS]", "[ARGS]", "<|other|>")
    assert plain.sampling(CHAT, SamplingParameters()).shown_token_ids == frozenset()
    shown = Prompts(marked).sampling(CHAT, SamplingParameters()).shown_token_ids
    assert shown == {marked.convert_tokens_to_ids("[TOOL_CALLS]"), marked.convert_tokens_to_ids("[ARGS]")}
    for prompt in ("hi", (1,), Chat((Message("user", "hi"),))):
        assert Prompts(marked).sampling(prompt, SamplingParameters()) == SamplingParameters()


@pytest.mark.parametrize(("strict", "asked", "has_grammar"), [(True, {}, True), (False, {}, False), (True, {"json_schema": "{}"}, False)])
def test_a_strict_tool_brings_a_grammar_where_no_call_is_required(strict: bool, asked: Any, has_grammar: bool) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "strict": strict}}
    found = Prompts(tokenizer_of()).sampling(Chat(CHAT.messages, (tool,)), SamplingParameters(**asked))
    assert (found.grammar is not None) == has_grammar
    assert found.json_schema == asked.get("json_schema")


def test_templates_get_the_arguments_of_calls_as_objects() -> None:
    tokenizer = tokenizer_of()
    seen: list[Any] = []
    tokenizer.apply_chat_template = lambda messages, **given: seen.append((messages, given["tools"])) or [1]  # type: ignore[method-assign]
    turns = (Message("assistant", "", (ToolCall("c1", "f", {"a": 1}),)), Message("tool", "2", tool_call_id="c1", name="f"))
    assert Prompts(tokenizer).tokens(Chat(turns)) == (1,)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    made = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert seen == [([made, {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"}], None)]
