"""/v1/embeddings: the mean of a model's last hidden states over an input's tokens, not scaled to any length."""

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tidepool.inference.engine import Output
from tidepool.serving.api.ask import Ask, Event, Head
from tidepool.serving.api.fields import Neutral, Prompts, Request, only_null, parse, refuse
from tidepool.serving.backend import Spelling, Started
from tidepool.serving.problem import Problem

MAX_INPUTS = 2048
"""OpenAI's."""


class EmbeddingRequest(Request):
    neutral: ClassVar[Neutral] = only_null("dimensions")

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"


def parse_embedding(body: bytes) -> Ask:
    """The body of POST /v1/embeddings. Raises `Refusal` (400)."""
    request = parse(body, EmbeddingRequest)
    if len(request.input) > MAX_INPUTS:
        refuse(f"At most {MAX_INPUTS} inputs can be given at once, not {len(request.input)}.", "input")
    return Ask(request.model, request.input, EmbeddingForm(len(request.input), request.encoding_format == "base64"), task="embed")


@dataclass(frozen=True)
class EmbeddingForm:
    num_inputs: int = 1
    is_base64: bool = False
    prefix: ClassVar[str] = "embd"
    has_named_events: ClassVar[bool] = False

    def begin(self, head: Head) -> "EmbeddingAnswer":
        return EmbeddingAnswer(self, head)


class EmbeddingAnswer:
    """See `Answer`; it is not streamed."""

    def __init__(self, form: EmbeddingForm, head: Head) -> None:
        self._form, self._head = form, head
        self._embeddings: list[tuple[float, ...]] = [()] * form.num_inputs

    def opening(self) -> list[Event]:
        return []

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        if isinstance(frame, Output):
            self._embeddings[prompt] = frame.embedding
        return []

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        return []

    def failure(self, problem: Problem) -> Event:
        return problem.body

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        data = [{"object": "embedding", "index": index, "embedding": self._encoded(one)} for index, one in enumerate(self._embeddings)]
        counts = {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]}
        return {"object": "list", "data": data, "model": self._head.model, "usage": counts}

    def _encoded(self, embedding: tuple[float, ...]) -> str | tuple[float, ...]:
        """As numbers, or as the base64 of float32 in the order of bytes that all clients assume."""
        return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode() if self._form.is_base64 else embedding
