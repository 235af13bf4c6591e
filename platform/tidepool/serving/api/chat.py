"""/v1/chat/completions: messages, tools, forms of answers, log-probabilities."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import MAX_TOP_LOGPROBS
from tidepool.serving.api.ask import Ask, Event, Head
from tidepool.serving.api.fields import Neutral, Part, only_null, parse, refuse
from tidepool.serving.api.logprobs import Vocabulary, chat_logprobs
from tidepool.serving.api.messages import Messages
from tidepool.serving.api.sampling import JsonSchema, NumTokens, SamplingRequest
from tidepool.serving.api.tool_calls import ForcedCall, Found, FoundCall, ToolCallParser
from tidepool.serving.api.tools import NamedFunction, ToolChoice, Tools, check_tools, forced_schema
from tidepool.serving.backend import Chat, Spelling, Started
from tidepool.serving.problem import Problem


class NamedSchema(Part):
    name: str
    description: str | None = None
    json_schema: JsonSchema = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ChatRequest(SamplingRequest):
    neutral: ClassVar[Neutral] = {
        "functions": ([],),
        "function_call": ("none",),
        "store": (False,),
        "modalities": (["text"],),
        "metadata": ({},),
        **only_null("audio", "moderation", "prediction", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort"),
        **only_null("safety_identifier", "service_tier", "verbosity", "web_search_options"),
    }

    messages: Messages
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True


def parse_chat(body: bytes) -> Ask:
    """The body of POST /v1/chat/completions. Raises `Refusal` (400)."""
    request = parse(body, ChatRequest)
    request.check()
    check_tools(request.tools, request.tool_choice)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        refuse("`max_tokens` and `max_completion_tokens` mean the same: give one of them.", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        refuse("`top_logprobs` has a meaning only with `logprobs: true`.", "top_logprobs")
    offers_tools = bool(request.tools) and request.tool_choice != "none"
    schema, of_tools = format_schema(request.response_format), forced_schema(request.tools, request.tool_choice)
    if offers_tools and (schema is not None or request.structured_outputs is not None):
        refuse('An answer in a given form calls no tools: leave `tools` out, or give `tool_choice: "none"`.', "tools", "unsupported_value")
    tools = tuple(tool.model_dump(exclude_none=True) for tool in request.tools) if offers_tools else ()
    sampling = request.sampling(
        next(iter(limits), None), (request.top_logprobs or 0) if request.logprobs else None, schema=of_tools if schema is None else schema
    )
    form = ChatForm(
        request.n,
        request.logprobs,
        request.include_usage,
        frozenset(tool.function.name for tool in request.tools) if offers_tools else frozenset(),
        request.tool_choice if isinstance(request.tool_choice, NamedFunction) or request.tool_choice == "required" else None,
        request.parallel_tool_calls,
    )
    prompt = Chat(tuple(message.message() for message in request.messages), tools)
    return Ask(request.model, (prompt,), form, sampling, stream=request.stream)


def format_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that a `response_format` holds an answer to. Raises `Refusal`."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        refuse("`response_format.json_schema` is missing.", "response_format.json_schema")
    return wanted.json_schema.json_schema


@dataclass(frozen=True)
class ChatForm:
    """Calls of `tool_names` are looked for in the text, unless it is held to one: any (`forced` is "required"), or of one function."""

    n: int = 1
    has_logprobs: bool = False
    include_usage: bool = False
    tool_names: frozenset[str] = frozenset()
    forced: Literal["required"] | NamedFunction | None = None
    has_parallel_calls: bool = True
    prefix: ClassVar[str] = "chatcmpl"
    has_named_events: ClassVar[bool] = False

    def begin(self, head: Head) -> "ChatAnswer":
        return ChatAnswer(self, head)

    def reader(self) -> "ToolCallParser | ForcedCall | None":
        """What finds the calls in an answer's text; None where there are none."""
        if self.forced is not None:
            return ForcedCall(self.forced.name if isinstance(self.forced, NamedFunction) else None)
        return ToolCallParser(self.tool_names) if self.tool_names else None


class _Choice:
    """One answer on its way."""

    def __init__(self, form: ChatForm) -> None:
        self._reader, self._is_parallel = form.reader(), form.has_parallel_calls
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def add(self, output: Output) -> list[dict[str, Any]]:
        """The deltas of what an output brings."""
        if self._reader is None:
            found: list[Found] = [output.text] if output.text else []
        else:
            found = self._reader.push(output.text) + (self._reader.finish() if output.finish_reason is not None else [])
        deltas = [delta for one in found if (delta := self._delta(one))]
        if output.finish_reason is not None:
            self.finish_reason = "tool_calls" if self.calls and output.finish_reason == "stop" else output.finish_reason
        return deltas

    def _delta(self, found: Found) -> dict[str, Any] | None:
        if self.calls and not self._is_parallel:  # the first call was to be the last word
            return None
        if isinstance(found, str):
            self.texts.append(found)
            return {"content": found}
        call = _call(found)
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}

    def message(self) -> dict[str, Any]:
        text = "".join(self.texts)
        message = {"role": "assistant", "content": text if text or not self.calls else None, "refusal": None}
        return message | ({"tool_calls": self.calls} if self.calls else {})


def _call(found: FoundCall) -> dict[str, Any]:
    number = uuid.uuid4().hex
    call_id = number[:9] if found.is_mistral else f"call_{number[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": found.name, "arguments": found.arguments}}


class ChatAnswer:
    """See `Answer`."""

    def __init__(self, form: ChatForm, head: Head) -> None:
        self._form, self._head = form, head
        self._chunk_head = head.of("chat.completion.chunk") | ({"usage": None} if form.include_usage else {})
        self._vocabulary = Vocabulary()
        self._choices = [_Choice(form) for _ in range(form.n)]

    def opening(self) -> list[Event]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._form.n)]

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        if isinstance(frame, Spelling):
            self._vocabulary.learn(frame)
        if not isinstance(frame, Output):
            return []
        choice = self._choices[frame.answer]
        deltas = choice.add(frame)
        logprobs = chat_logprobs(self._vocabulary, frame.logprobs) if frame.logprobs else None
        if logprobs:
            choice.logprobs += logprobs
            deltas = deltas or [{"content": ""}]
        chunks = [self._chunk(frame.answer, delta, None if index else logprobs) for index, delta in enumerate(deltas)]
        return chunks + ([self._chunk(frame.answer, {}, None, choice.finish_reason)] if frame.finish_reason is not None else [])

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        return [{**self._chunk_head, "choices": [], "usage": usage}] if self._form.include_usage else []

    def failure(self, problem: Problem) -> Event:
        return problem.body

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._form.has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._head.of("chat.completion") | {"choices": choices, "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None, finish_reason: str | None = None
    ) -> Event:
        told = None if logprobs is None else {"content": logprobs, "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish_reason}
        return {**self._chunk_head, "choices": [choice]}
