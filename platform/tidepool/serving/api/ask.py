"""What a request asks for, once it is understood, and what an answer to it must be able to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tidepool.inference.engine import Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Prompt, Spelling, Started, Task
from tidepool.serving.problem import Problem

Event = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What the parts of one answer have in common. `model` is the name asked for, `fingerprint` the version that answers."""

    request_id: str
    created: int
    model: str
    fingerprint: str

    def of(self, kind: str) -> dict[str, Any]:
        """The first fields of an answer of OpenAI's."""
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Answer(Protocol):
    """The answer to one request, in one endpoint's shape: it takes in frames, and gives events as they come or the whole in the end."""

    def opening(self) -> list[Event]:
        """The events before the first frame."""
        ...

    def take(self, prompt: int, frame: Started | Spelling | Output) -> list[Event]:
        """What a frame of the prompt of this number brings."""
        ...

    def ending(self, usage: Mapping[str, int]) -> list[Event]:
        """The events after the last frame."""
        ...

    def failure(self, problem: Problem) -> Event:
        """The last event of a stream that fails."""
        ...

    def whole(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer in one piece, after the last frame."""
        ...


class Form(Protocol):
    """How an answer is to look. `prefix` begins its id; `has_named_events` is true of streams in which each event has its name."""

    @property
    def prefix(self) -> str: ...

    @property
    def has_named_events(self) -> bool: ...

    def begin(self, head: Head) -> Answer:
        """An answer that has got nothing yet."""
        ...


@dataclass(frozen=True)
class Ask:
    """A request as it was understood: `task` is done for each of the prompts, and the answer has this form.

    With `is_prompt_alone` nothing of an answer is wanted (`max_tokens: 0`), though the engine makes one token.
    """

    model: str
    prompts: tuple[Prompt, ...]
    form: Form
    sampling: SamplingParameters = SamplingParameters()  # noqa: RUF009  it is frozen
    task: Task = "generate"
    stream: bool = False
    echo: bool = False
    is_prompt_alone: bool = False


def usage_of(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def fingerprint(version: ModelVersion) -> str:
    """Which version answered: `name@3-0123456789ab`."""
    return f"{version.ref}-{version.digest[:12]}"
