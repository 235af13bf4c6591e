"""From what a request gives to the tokens of a prompt, and back: text, token ids, chats by the model's own template.

What a template has no place for (tools, calls of tools) is refused, since it would be left out in silence.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tidepool.errors import RequestError
from tidepool.inference.engine import Output
from tidepool.inference.grammar import JSON_OPTIONS
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.inference.spelling import TokenBytes
from tidepool.serving.backend import Chat, Message, Prompt, Spelling

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_TOOL_MARKERS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>", _CALL, _CALL_END)


class Prompts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        # Special tokens that begin or part calls of tools: a text without them would not show the calls.
        self._tool_token_ids = frozenset(tokenizer.convert_tokens_to_ids(one) for one in _TOOL_MARKERS if self._is_special(one))

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Raises `RequestError` for a chat that the model's template does not take."""
        if isinstance(prompt, str):
            return tuple(self._tokenizer(prompt)["input_ids"])
        return self._chat_tokens(prompt) if isinstance(prompt, Chat) else prompt

    def sampling(self, prompt: Prompt, sampling: SamplingParameters) -> SamplingParameters:
        """What a prompt's tools ask of its answer: that calls can be seen in it, and hold to their schemas where one is `strict`.

        Raises `RequestError` for a model that writes its calls in another way than the grammar's.
        """
        if not isinstance(prompt, Chat) or not prompt.tools:
            return sampling
        sampling = replace(sampling, shown_token_ids=self._tool_token_ids)
        if sampling.has_grammar or not any(tool["function"].get("strict") for tool in prompt.tools):
            return sampling
        if _CALL not in self._tokenizer.get_chat_template(tools=[dict(tool) for tool in prompt.tools]) or self._is_special(_CALL):
            raise RequestError(
                f"`strict` can be kept by models that write calls as {_CALL} alone, unless `tool_choice` requires one: leave it out."
            )
        return replace(sampling, grammar=_strict_calls(prompt.tools))

    def text(self, tokens: tuple[int, ...]) -> str:
        """Without special tokens, as answers have it."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def spell(self, tokens: Iterable[int]) -> Spelling:
        found = {token: self._bytes[token] for token in tokens}
        return Spelling(found, self._bytes.special & found.keys())

    def _chat_tokens(self, chat: Chat) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise RequestError("This model has no chat template, so it cannot chat: use /v1/completions.")
        tools = [dict(tool) for tool in chat.tools] or None
        template: str = self._tokenizer.get_chat_template(tools=tools)
        if tools and "tools" not in template:
            raise RequestError("This model's chat template has no place for tools: leave `tools` out, or ask another model.")
        if "tool_calls" not in template and any(message.tool_calls for message in chat.messages):
            raise RequestError("This model's chat template has no place for calls of tools: leave `tool_calls` out of the messages.")
        messages = [_for_template(message) for message in chat.messages]
        try:
            tokens = self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"The model's chat template refuses these messages: {error}") from error
        return tuple(tokens)

    def _is_special(self, text: str) -> bool:
        return self._tokenizer.get_added_vocab().get(text) in self._bytes.special


def _strict_calls(tools: Iterable[Mapping[str, Any]]) -> str:
    """A grammar of free text in which each `<tool_call>` is followed by the call of a tool, with arguments by its schema, and its end."""
    bodies = []
    for tool in tools:
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or {"additionalProperties": False}), "x-guidance": JSON_OPTIONS}
        begin = f'\n{{"name": {json.dumps(function["name"])}, "arguments": '
        bodies.append(f"{json.dumps(begin)} %json {json.dumps(schema)} {json.dumps(f'}}{chr(10)}{_CALL_END}')}")
    rules = [f"body_{index}: {body}" for index, body in enumerate(bodies)]
    named = " | ".join(f"body_{index}" for index in range(len(bodies)))
    return "\n".join(["start: call* TEXT", f"call: mark ({named})", f'mark[lazy]: TEXT "{_CALL}"', r"TEXT: /(.|\n)*/", *rules])


def tokens_named(output: Output) -> set[int]:
    """The tokens that an output's log-probabilities name."""
    told = [one for one in (*output.logprobs, *output.prompt_logprobs) if one is not None]
    return {one.token_id for one in told} | {token for one in told for token, _ in one.top}


def _for_template(message: Message) -> dict[str, Any]:
    """As templates take it: the arguments of calls are objects there, not their JSON."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn | {key: given for key, given in (("tool_call_id", message.tool_call_id), ("name", message.name)) if given is not None}
