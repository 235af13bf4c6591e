"""The messages of a chat, as OpenAI writes them and as templates take them.

Invariants: content of several parts is their texts, a line each, as vLLM joins them; parts that are no text are refused. `developer` is
OpenAI's newer name for `system`, and is told to templates by that one. What an assistant's message of ours holds can be sent back as it
came.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from tidepool.serving.api.fields import Neutral, Part, only_null
from tidepool.serving.backend import Message, ToolCall

_TEXT_TYPES = ("text", "input_text", "output_text")


def joined_text(value: Any) -> Any:
    """Content as one text; what is neither text nor parts is left for the check of its type."""
    if not isinstance(value, list):
        return value
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_TYPES or not isinstance(part.get("text"), str):
            raise ValueError(f'part {index} is no text: give {{"type": "text", "text": ...}}')
        if unknown := [key for key in part if key not in ("type", "text") and part[key] not in (None, [])]:
            raise ValueError(f"part {index} has `{unknown[0][:100]}`, which is not supported")
    if not value:
        raise ValueError("give at least one part")
    return "\n".join(part["text"] for part in value)


def content_schema(kind: str) -> dict[str, Any]:
    part = {
        "type": "object",
        "properties": {"type": {"const": kind}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]}


Content = Annotated[str, BeforeValidator(joined_text), WithJsonSchema(content_schema("text"))]


def _object(text: str) -> str:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("give the text of a JSON object")
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class CalledFunction(Part):
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str, AfterValidator(_object)]


class CalledTool(Part):
    neutral: ClassVar[Neutral] = only_null("index")

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Part):
    neutral: ClassVar[Neutral] = {"annotations": ([],), **only_null("audio", "function_call", "refusal")}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[CalledTool] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("has no content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("has `tool_calls`, which are an assistant's alone")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("`tool_call_id` belongs to a tool's message, and to no other one")
        if self.name is not None and self.role != "tool":
            raise ValueError("`name` is supported for a tool's message alone: leave it out")
        return self

    def message(self) -> Message:
        calls = [ToolCall(call.id, call.function.name, json.loads(call.function.arguments)) for call in self.tool_calls]
        role = "system" if self.role == "developer" else self.role
        return Message(role, self.content or "", tuple(calls), self.tool_call_id, self.name)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
