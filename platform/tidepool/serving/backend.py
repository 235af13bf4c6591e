"""What travels between the gateway and the replicas, and the one call that carries it. Knows no Ray and no HTTP."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tidepool.errors import RequestError
from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.registry import ModelVersion


class ContextLengthError(RequestError):
    """A prompt that is too long for the model, by itself or with the tokens that it asks for."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made in an earlier turn; `arguments` are a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `tool_calls` are an assistant's; `tool_call_id` says which of them a tool answers, `name` which tool it is."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Chat:
    """Turns, and the tools that the model is told of, each as OpenAI describes a tool: the model's template turns them into text."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


Prompt = str | tuple[int, ...] | Chat
Task = Literal["generate", "embed", "tokenize"]


@dataclass(frozen=True)
class Call:
    """One request to a base model's replicas.

    `task` is what is asked for: answers (`sampling` says how), the prompt's embedding, or its tokens. With `echo` the first frame holds
    the prompt. `client` is whom the engine is fair to: the id of the key that asks. `resumed`: what was told by a replica that is gone, see
    `GenerationRequest.resumed`.
    """

    request_id: str
    base_digest: str
    adapter: ModelVersion | None
    prompt: Prompt
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    task: Task = "generate"
    echo: bool = False
    client: str = ""
    resumed: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Started:
    """The first frame of a stream: the request has been taken, and its prompt has so many tokens.

    `prompt_tokens` and `prompt_text` are there for those who asked for them.
    """

    num_prompt_tokens: int
    prompt_tokens: tuple[int, ...] = ()
    prompt_text: str = ""


@dataclass(frozen=True)
class Spelling:
    """The bytes of tokens that the log-probabilities of the next frame name for the first time; `special` ones are no part of a text."""

    of_tokens: Mapping[int, bytes]
    special: frozenset[int] = frozenset()


Frame = Started | Spelling | Output


class Backend(Protocol):
    """The replicas of all base models, seen from the gateway."""

    def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """One `Started`, then outputs up to the one with a finish reason of each answer. Closing it early cancels the request.

        Raises at the first frame `RequestError`, `EngineBusyError`, `ModelError` or `StoreError` (the adapter cannot be
        loaded); at any frame `ClusterError` if replicas are lost and nothing helps.
        """
        ...
