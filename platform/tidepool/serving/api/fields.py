"""Bodies of requests, read strictly: a request is served as it is written, or refused with the field that stands in the way.

Invariants:
- No field is dropped silently. A field of OpenAI's that Tidepool does not serve may only have the value that changes
  nothing (null, `store: false`); a field that OpenAI does not have is refused, and the nearest one named.
- `user` is the one field that is read and has no effect: it tells OpenAI about abuse, and changes no answer.

What needs the model to decide (a context's length, a token's existence, a template) is left to the replica.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, PlainValidator, ValidationError, WithJsonSchema, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from tidepool.serving.backend import Prompt
from tidepool.serving.problem import Problem, Refusal

INT64 = 2**63
Neutral = Mapping[str, tuple[Any, ...]]
"""Fields that are not served, with the values that change nothing; null is one always."""


def only_null(*names: str) -> dict[str, tuple[Any, ...]]:
    """Fields that may be left out or null."""
    return dict.fromkeys(names, ())


class Part(BaseModel):
    """An object in a request. Null is as good as leaving a field out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the fields that change nothing, for the OpenAPI document."""
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema)["properties"].update({key: {"enum": [None, *values]} for key, values in cls.neutral.items()})
        return schema

    @model_validator(mode="before")
    @classmethod
    def _served(cls, value: Any) -> Any:
        served = [field.alias or name for name, field in cls.model_fields.items()]
        return _without_neutral(value, served, cls.neutral) if isinstance(value, dict) else value


class Request(Part):
    """What every request names: the model."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    user: str | None = None


def _without_neutral(value: dict[str, Any], served: list[str], neutral: Neutral) -> dict[str, Any]:
    """The fields that are served; an error for one that is not there, or not with this value."""
    for key, given in value.items():
        if key in served or (key in neutral and (given is None or any(_same(given, one) for one in neutral[key]))):
            continue
        if key in neutral:
            allowed = [json.dumps(one) for one in neutral[key]]
            hint = f"leave it out, or give {' or '.join(allowed)}" if allowed else "leave it out"
            raise _error("unsupported_value", key, f"is not supported with this value: {hint}")
        near = difflib.get_close_matches(key, served, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(f'`{name}`' for name in served)}"
        raise _error("unknown_field", key[:100], f"is no field here; {hint}")
    return {key: given for key, given in value.items() if key in served and given is not None}


def _error(code: str, key: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(code, "{text}", {"text": message, "key": key})


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, where true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# --- From bytes to an object -----------------------------------------------------------------------------------------

RequestT = TypeVar("RequestT", bound=Request)


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """Raises `Refusal` (400)."""
    try:
        return kind.model_validate(_read(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        context = first.get("ctx", {})
        where = _path((*first["loc"], context["key"]) if "key" in context else first["loc"])
        message = "is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ").rstrip(".")
        code = first["type"] if first["type"] in ("unsupported_value", "unknown_field") else "invalid_value"
        ending = "" if message.endswith("?") else "."
        raise Refusal(Problem(400, f"`{where}` {message}{ending}" if "key" in context else f"`{where}`: {message}.", code, where)) from None


def refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    raise Refusal(Problem(400, message, code, param))


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


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`, as OpenAI writes it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


# --- Prompts ---------------------------------------------------------------------------------------------------------

_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT64 - 1}, "minItems": 1}


def _prompts(value: Any) -> tuple[Prompt, ...]:
    values = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    return tuple(_prompt(one) for one in values)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(type(token) is int and 0 <= token < INT64 for token in value):
        raise ValueError("give a text, a list of token ids, or a list of either")
    return tuple(value)


OnePrompt = Annotated[str | tuple[int, ...], PlainValidator(_prompt), WithJsonSchema({"anyOf": [{"type": "string"}, _TOKENS]})]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TOKENS,
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ]
        }
    ),
]
"""One or several, each a text or token ids."""
