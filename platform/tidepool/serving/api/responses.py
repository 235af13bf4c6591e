"""/v1/responses, without a memory: input and instructions in, one message out. What needs a stored response or a tool is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.api.ask import Ask, Event, Head
from tidepool.serving.api.fields import Neutral, Part, Request, only_null, parse, refuse
from tidepool.serving.api.messages import content_schema, joined_text
from tidepool.serving.api.sampling import JsonSchema, NumTokens
from tidepool.serving.backend import Chat, Message, Spelling, Started
from tidepool.serving.problem import Problem


class InputMessage(Part):
    neutral: ClassVar[Neutral] = only_null("id", "phase") | {"status": ("completed",)}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text), WithJsonSchema(content_schema("input_text"))]


def _input(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(Part):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    json_schema: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Part):
    neutral: ClassVar[Neutral] = only_null("verbosity")

    format: TextFormat = TextFormat()


class ResponseRequest(Request):
    neutral: ClassVar[Neutral] = {
        "store": (False,),
        "background": (False,),
        "truncation": ("disabled",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "include": ([],),
        "metadata": ({},),
        "top_logprobs": (0,),
        "stream_options": ({}, {"include_obfuscation": False}),
        **only_null("previous_response_id", "conversation", "prompt", "reasoning", "service_tier", "max_tool_calls"),
        **only_null("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "context_management", "moderation"),
    }

    input: Annotated[
        list[InputMessage],
        BeforeValidator(_input),
        Field(min_length=1),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": InputMessage.model_json_schema()}]}),
    ]
    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    text: TextOptions = TextOptions()
    stream: bool = False


def parse_response(body: bytes) -> Ask:
    """The body of POST /v1/responses. Raises `Refusal` (400)."""
    request = parse(body, ResponseRequest)
    first = [] if request.instructions is None else [Message("system", request.instructions)]
    turns = [Message("system" if one.role == "developer" else one.role, one.content) for one in request.input]
    wanted = request.text.format
    schema = None if wanted.type == "text" else (wanted.json_schema or {"type": "object"})
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        refuse("`text.format.schema` has a meaning only with the type `json_schema`.", "text.format.schema")
    sampling = SamplingParameters(
        request.max_output_tokens, request.temperature, request.top_p, json_schema=None if schema is None else json.dumps(schema)
    )
    settings = {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True)},
    }
    return Ask(request.model, (Chat((*first, *turns)),), ResponseForm(settings), sampling, stream=request.stream)


@dataclass(frozen=True)
class ResponseForm:
    """`settings` are those of the request that a response repeats."""

    settings: Mapping[str, Any]
    prefix: ClassVar[str] = "resp"
    has_named_events: ClassVar[bool] = True

    def begin(self, head: Head) -> "ResponseAnswer":
        return ResponseAnswer(self, head)


class ResponseAnswer:
    """See `Answer`."""

    def __init__(self, form: ResponseForm, head: Head) -> None:
        self._form, self._head = form, head
        self._item_id = f"msg_{head.request_id.partition('-')[2]}"
        self._texts: list[str] = []
        self._is_cut = False
        self._num_events = 0

    def opening(self) -> list[Event]:
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress")),
            self._of_part("response.content_part.added", part=_part("")),
        ]

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        if not isinstance(frame, Output):
            return []
        self._is_cut |= frame.finish_reason == "length"
        if not frame.text:
            return []
        self._texts.append(frame.text)
        return [self._of_part("response.output_text.delta", delta=frame.text, logprobs=[])]

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        status = "incomplete" if self._is_cut else "completed"
        return [
            self._of_part("response.output_text.done", text=self._text, logprobs=[]),
            self._of_part("response.content_part.done", part=_part(self._text)),
            self._event("response.output_item.done", output_index=0, item=self._item(status)),
            self._event(f"response.{status}", response=self.whole(usage)),
        ]

    def failure(self, problem: Problem) -> Event:
        return self._event("error", code=problem.code, message=problem.message, param=problem.param)

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        status = "incomplete" if self._is_cut else "completed"
        return self._response(status) | {"output": [self._item(status)], "usage": counts}

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(self._text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._head.request_id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "model": self._head.model,
            "output": [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "store": False,
            "previous_response_id": None,
            "parallel_tool_calls": True,
            "tools": [],
            "tool_choice": "auto",
            "truncation": "disabled",
            "metadata": {"system_fingerprint": self._head.fingerprint},
            "usage": None,
            **self._form.settings,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
