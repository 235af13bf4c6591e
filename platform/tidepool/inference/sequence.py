"""A request's answer on its way, as the scheduler sees it: its tokens, and how far they have been computed. Knows no text."""

import sys
from dataclasses import dataclass, field

from tidepool.inference.blocks import root_key
from tidepool.inference.lookup import PromptLookup
from tidepool.inference.sampler import SamplingState

PENDING = -1
"""In place of a token that a step is choosing now."""


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt and the answer so far; the first `num_computed` of them have keys and values in `blocks`.

    The last `num_pending` of them are not known yet. There are never more than `max_length`. `keys` are those of the full blocks, of which
    the first `num_published` can be found by others; `num_charged` tokens have been charged to the client. `client` is who is served
    beside the adapter: the scheduler is fair between them. `prompt_logprobs`: that many alternatives for each token of the prompt, each of
    which has to be computed then, whatever is in the cache; so it is for an embedding, which has no `sampling`. `lookup` guesses its next
    tokens, if it may.
    """

    tokens: list[int]
    adapter: str | None = None
    client: str = ""
    prompt_logprobs: int | None = None
    sampling: SamplingState | None = None
    is_embedding: bool = False
    max_length: int = sys.maxsize
    lookup: PromptLookup | None = None
    num_prompt: int = 0
    num_pending: int = 0
    num_computed: int = 0
    num_published: int = 0
    num_charged: int = 0
    is_running: bool = False
    arrival: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.root = root_key(self.adapter)

    @property
    def num_known(self) -> int:
        return len(self.tokens) - self.num_pending

    @property
    def has_work(self) -> bool:
        """Whether something of it is still to be computed; the last token that it may have is never an input."""
        return self.num_computed < len(self.tokens) and (len(self.tokens) < self.max_length or self.is_embedding)

    def expect(self) -> None:
        """A step that has been launched will choose the next token."""
        self.tokens.append(PENDING)
        self.num_pending += 1

    def append(self, token: int) -> None:
        """The next token is known: the first one that was expected, if any was."""
        if self.num_pending:
            self.tokens[self.num_known] = token
            self.num_pending -= 1
        else:
            self.tokens.append(token)
