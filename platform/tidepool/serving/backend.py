"""What travels between the gateway and the replicas, and the one call that carries it. Knows no Ray and no HTTP."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from tidepool.errors import RequestError
from tidepool.inference.engine import Output
from tidepool.registry import ModelVersion


class ContextLengthError(RequestError):
    """A prompt that is too long for the model, by itself or with the tokens that it asks for."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""Text, token ids, or a chat that the model's template turns into text."""


@dataclass(frozen=True)
class Call:
    """One request to a base model's replicas. `max_tokens` None: as many as the context has room for."""

    request_id: str
    base_digest: str
    adapter: ModelVersion | None
    prompt: Prompt
    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    client: str = ""
    """Whom the engine is fair to: the id of the key that asks."""


@dataclass(frozen=True)
class Started:
    """The first frame of a stream: the engine has taken the request, whose prompt has so many tokens."""

    num_prompt_tokens: int


Frame = Started | Output


class Backend(Protocol):
    """The replicas of all base models, seen from the gateway."""

    def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """One `Started`, then outputs up to the one with a finish reason. Closing it early cancels the request.

        Raises at the first frame `RequestError`, `EngineBusyError`, `ModelError` or `StoreError` (the adapter cannot be
        loaded); at any frame `ClusterError` if the replica is gone.
        """
        ...
