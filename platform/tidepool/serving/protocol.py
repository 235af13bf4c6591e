"""OpenAI's requests, parsed strictly: a request is served as it is written, or refused with the field that stands in the way.

Invariants:
- No field is dropped silently. A field of OpenAI's that Tidepool does not serve may only have the value that changes
  nothing (null, `n: 1`, `presence_penalty: 0`); a field that OpenAI does not have is refused, and the nearest one named.
- `user` is the one field that is read and has no effect: it tells OpenAI about abuse, and changes no answer.

What needs the model to decide (a context's length, a token's existence, a template) is left to the replica.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.backend import Chat, Message, Prompt
from tidepool.serving.problem import Problem, Refusal

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""
_MAX_STOPS = 4
_INT64 = 2**63


@dataclass(frozen=True)
class Ask:
    """A request as it was understood."""

    model: str
    prompt: Prompt
    sampling: SamplingParameters
    stream: bool
    include_usage: bool


def parse_completion(body: bytes) -> Ask:
    """The body of POST /v1/completions. Raises `Refusal` (400)."""
    request = _validate(_read(body), _Completion, _NEUTRAL_COMPLETION)
    return _ask(request, request.prompt, request.max_tokens)


def parse_chat(body: bytes) -> Ask:
    """The body of POST /v1/chat/completions. Raises `Refusal` (400)."""
    value = _read(body)
    messages = value.get("messages")
    if isinstance(messages, list):
        value["messages"] = [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    request = _validate(value, _Chat, _NEUTRAL_CHAT)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        _refuse("`max_tokens` and `max_completion_tokens` mean the same: give one of them.", "max_tokens")
    return _ask(request, Chat(tuple(Message(message.role, message.content) for message in request.messages)), next(iter(limits), None))


# --- What is served --------------------------------------------------------------------------------------------------


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(type(token) is int and 0 <= token < _INT64 for token in value):
        raise ValueError("give one text, or a list of token ids; several prompts in one request are not supported")
    return tuple(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"give a text that is not empty, or a list of up to {_MAX_STOPS} of them")
    return tuple(stops)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _StreamOptions(_Part):
    include_usage: bool = False


class _Request(_Part):
    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop)] = ()
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = None


class _Completion(_Request):
    prompt: Annotated[str | tuple[int, ...], PlainValidator(_prompt)]
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = COMPLETION_MAX_TOKENS


class _ChatMessage(_Part):
    role: Literal["system", "user", "assistant"]
    content: str


class _Chat(_Request):
    messages: Annotated[list[_ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None


# --- What may be given only with the value that changes nothing ------------------------------------------------------

_NEUTRAL_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_NEUTRAL_COMPLETION = _NEUTRAL_BOTH | {"best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
_NEUTRAL_CHAT = _NEUTRAL_BOTH | {
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "store": (False,),
    "modalities": (["text"],),
    "metadata": ({},),
    **dict.fromkeys(
        ("audio", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort"), ()
    ),
    **dict.fromkeys(("safety_identifier", "service_tier", "top_logprobs", "verbosity", "web_search_options"), ()),
}
_NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "tool_calls": ([],),
    **dict.fromkeys(("audio", "function_call", "name", "refusal", "tool_call_id"), ()),
}


def _plain_message(message: Any, where: str) -> Any:
    return _without_neutral(message, _ChatMessage, _NEUTRAL_MESSAGE, f"{where}.") if isinstance(message, dict) else message


def _without_neutral(
    value: Mapping[str, Any], kind: type[BaseModel], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """The fields that are served; raises `Refusal` for one that is not there, or not with this value."""
    for key, given in value.items():
        if key in kind.model_fields or (key in neutral and (given is None or any(_same(given, one) for one in neutral[key]))):
            continue
        if key in neutral:
            allowed = [json.dumps(one) for one in neutral[key]]
            hint = f"leave it out, or give {' or '.join(allowed)}" if allowed else "leave it out"
            _refuse(f"`{where}{key}` is not supported with this value: {hint}.", f"{where}{key}", "unsupported_value")
        near = difflib.get_close_matches(key, list(kind.model_fields), n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(f'`{name}`' for name in kind.model_fields)}."
        _refuse(f"There is no field `{where}{key[:100]}`; {hint}", f"{where}{key[:100]}", "unknown_field")
    return {key: given for key, given in value.items() if key in kind.model_fields and given is not None}


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, where true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# --- From bytes to an Ask --------------------------------------------------------------------------------------------

RequestT = TypeVar("RequestT", bound=_Request)


def _read(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode())
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise Refusal(Problem(400, f"The body is not valid JSON: {error}", "invalid_json")) from error
    if not isinstance(value, dict):
        raise Refusal(Problem(400, "The body must be a JSON object.", "invalid_json"))
    return value


def _validate(value: Mapping[str, Any], kind: type[RequestT], neutral: Mapping[str, tuple[Any, ...]]) -> RequestT:
    served = _without_neutral(value, kind, neutral)
    if isinstance(served.get("stream_options"), dict):
        served["stream_options"] = _without_neutral(
            served["stream_options"], _StreamOptions, {"include_obfuscation": (False,)}, "stream_options."
        )
    try:
        request = kind.model_validate(served)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _path(first["loc"])
        message = "is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise Refusal(Problem(400, f"`{where}`: {message}.", "invalid_value", where)) from None
    if request.stream_options is not None and not request.stream:
        _refuse("`stream_options` has a meaning only with `stream: true`.", "stream_options")
    return request


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI writes it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _ask(request: _Request, prompt: Prompt, max_tokens: int | None) -> Ask:
    return Ask(
        model=request.model,
        prompt=prompt,
        sampling=SamplingParameters(max_tokens, request.temperature, request.top_p, request.seed, request.stop),
        stream=request.stream,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
    )


def _refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    raise Refusal(Problem(400, message, code, param))
