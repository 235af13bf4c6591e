"""A request's answer on its way, as the scheduler sees it: its tokens, and how far they have been computed. Knows no text."""

from dataclasses import dataclass, field

from tidepool.inference.blocks import root_key
from tidepool.inference.sampler import SamplingState


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt and the answer so far; the first `num_computed` of them have keys and values in `blocks`.

    `keys` are those of the full blocks, `num_charged` tokens have been charged to the client. `client` is who is served beside the
    adapter: the scheduler is fair between them. `prompt_logprobs`: that many alternatives for each token of the prompt, each of which
    has to be computed then, whatever is in the cache; so it is for an embedding, which has no `sampling`.
    """

    tokens: list[int]
    adapter: str | None = None
    client: str = ""
    prompt_logprobs: int | None = None
    sampling: SamplingState | None = None
    is_embedding: bool = False
    num_prompt: int = 0
    num_computed: int = 0
    num_charged: int = 0
    is_running: bool = False
    arrival: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.root = root_key(self.adapter)
