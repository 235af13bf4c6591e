"""How a request wants its tokens chosen: OpenAI's fields, and vLLM's names for what OpenAI does not have."""

import json
import re
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from tidepool.inference.sampling_parameters import MAX_ANSWERS, MAX_TOP_LOGPROBS, SamplingParameters
from tidepool.serving.api.fields import INT64, Neutral, Part, Request, refuse

_MAX_STOPS = 16  # OpenAI takes 4; lm-evaluation-harness sends more
_TOKEN_ID = re.compile(r"[0-9]{1,9}", re.ASCII)

NumTokens = Annotated[int, Field(ge=1, lt=INT64)]
NumTopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, lt=INT64)]
JsonSchema = Annotated[dict[str, Any], Field()]


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"give a text that is not empty, or a list of up to {_MAX_STOPS} of them")
    return tuple(stops)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or not all(_TOKEN_ID.fullmatch(token) for token in value):
        raise ValueError("give an object whose keys are token ids")
    if not all(isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("give numbers from -100 to 100")
    return tuple((int(token), float(bias)) for token, bias in value.items())


_TEXT = {"type": "string", "minLength": 1}
Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": _MAX_STOPS}]}),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]


class StreamOptions(Part):
    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class StructuredOutputs(Part):
    """vLLM's way to hold an answer to a form, of which these two are served."""

    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: str | None = None


class SamplingRequest(Request):
    """A request for answers."""

    max_tokens: NumTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop = ()
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: LogitBias = ()
    top_k: Annotated[int, Field(ge=0, lt=INT64)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """What no single field says."""
        if self.stream_options is not None and not self.stream:
            refuse("`stream_options` has a meaning only with `stream: true`.", "stream_options")

    def sampling(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None, schema: dict[str, Any] | None = None
    ) -> SamplingParameters:
        """`schema` is what another field of the request holds the answer to."""
        structured = self.structured_outputs or StructuredOutputs()
        forms = [one for one in (schema, structured.json_schema, structured.regex) if one is not None]
        if len(forms) > 1:
            refuse("The answer can be held to one form: give one schema or one regular expression.", "structured_outputs")
        of_json = structured.json_schema if schema is None else schema
        return SamplingParameters(
            max_tokens,
            self.temperature,
            self.top_p,
            self.seed,
            self.stop,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.logit_bias,
            frozenset(self.stop_token_ids),
            self.n,
            logprobs,
            prompt_logprobs,
            None if of_json is None else json.dumps(of_json),
            structured.regex,
        )
