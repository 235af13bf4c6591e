"""What an engine is: five calls, and the messages that travel through them.

Five, because that is all a server has to ask of whatever computes tokens (our paged engine, or another
project's): take a request and stream its tokens, stop one, make an adapter usable, forget one, and tell how busy
it is. Which model is behind it is decided when it is built. Knows no Ray, no HTTP and no names: adapters go by digest.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tidepool.inference.sampling_parameters import SamplingParameters

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and of the likeliest ones in its place: the best first, of equals the lower number."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt of at least one token to continue, with the adapter of this digest (None: the base model alone).

    Requests with the same adapter and `fairness_key` share what one client gets of a busy engine. An embedding is asked for with
    `is_embedding`: then the prompt alone is computed, `sampling` says nothing, and the one output holds it.

    `resumed`: this request was taken by another engine, and these are the tokens of each of its answers whose outputs have been told.
    The engine goes on after them as if they were its own, tells nothing of them again, and does not say that it is busy. Of an answer
    that had ended with them it tells the end once more, in an output without tokens.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParameters
    adapter: str | None = None
    fairness_key: str = ""
    is_embedding: bool = False
    resumed: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Output:
    """What an answer of a request got since its last output: tokens, and the text that is certain now.

    Texts put together are the whole answer: valid UTF-8, without stop strings and special tokens. The last output of each answer
    alone has a `finish_reason`. `logprobs` has one entry for each of `token_ids`, if the request asks for them; `prompt_logprobs`, in
    the first output of answer 0, one for each token of the prompt (None for the first). `embedding` is the mean of the prompt's last hidden
    states, after the model's last norm.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    answer: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """How busy an engine is now, in answers; `adapters`: digests that are loaded. The rest is counted from its start.

    `num_placements` counts adapters that were given one of the slots that a step computes with.
    A step is one turn of the engine; `num_chunks` are prompts' pieces but for the last of each; `num_prefix_hits` answers began with
    `num_prefix_tokens` that were in the cache; of `num_drafted_tokens` that were guessed, `num_accepted_tokens` were right.
    """

    num_running: int
    num_queued: int
    num_generated_tokens: int
    adapters: tuple[str, ...]
    num_steps: int = 0
    num_chunks: int = 0
    num_preemptions: int = 0
    num_prefix_hits: int = 0
    num_prefix_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_placements: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    has_failed: bool = False
    """A fault of the engine's own: it takes no more requests, and its process is to be replaced."""


class Engine(Protocol):
    """See the module's docstring. All calls are made in one event loop."""

    def submit(self, request: GenerationRequest) -> AsyncIterator[Output]:
        """Stream a request's outputs. Leaving the iteration early (`aclose`) cancels it.

        Raises `RequestError` at once for a request that can never be served (no prompt, too long, unknown adapter, id in
        use), and `EngineBusyError` if the queue is full.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, whose stream then ends with `cancelled`; no error if there is none (it may just have ended)."""
        ...

    async def load_adapter(self, digest: str, folder: Path) -> None:
        """Make an adapter usable, from a local folder, while other requests go on; nothing if it is loaded.

        Raises `ModelError` (`BaseMismatchError`) if it does not belong to this engine's model, `EngineBusyError` if there is no room now.
        """
        ...

    async def drop_adapter(self, digest: str) -> None:
        """Forget an adapter once the requests that use it have ended; no error if it is not there."""
        ...

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        ...
