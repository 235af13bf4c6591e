"""Making tokens less likely (or more) that have come before.

- repetition_penalty r (Keskar et al. 2019, CTRL): the logit of each token of the prompt and of the answer is divided by r if
  it is above 0, and multiplied by r if not.
- frequency_penalty f and presence_penalty p (OpenAI's API): c times f is taken from the logit of a token that the answer has
  c times, and p if it has it at all. The prompt does not count.

In that order, as in vLLM. The work grows with the tokens that have come, not with the vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidepool.inference.sampling_parameters import SamplingParameters


class TokenCounts:
    """The tokens of a sequence, each once, and how often each is in the answer."""

    def __init__(self, prompt_tokens: Iterable[int]) -> None:
        self._slots: dict[int, int] = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_tokens))}
        self._tokens = np.fromiter(self._slots, np.int64, len(self._slots))
        self._counts = np.zeros(len(self._slots), np.float32)

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            room = np.zeros(max(64, slot))
            self._tokens = np.concatenate([self._tokens, room.astype(np.int64)])
            self._counts = np.concatenate([self._counts, room.astype(np.float32)])
        self._tokens[slot] = token
        self._counts[slot] += 1


@dataclass(frozen=True)
class Penalties:
    """The penalties of one row of the logits."""

    row: int
    asked: SamplingParameters
    seen: TokenCounts


def penalise(logits_BV: Tensor, penalties: Sequence[Penalties]) -> None:
    """Change contiguous float32 logits in place, of one row for each of these; a row's result depends on nothing of the others."""
    sizes = [len(each.seen.tokens) for each in penalties]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), sizes)).to(logits_BV.device)

    places = torch.from_numpy(np.concatenate([each.seen.tokens + each.row * logits_BV.shape[1] for each in penalties]))
    counts = torch.from_numpy(np.concatenate([each.seen.counts for each in penalties])).to(logits_BV.device)
    places, flat = places.to(logits_BV.device), logits_BV.view(-1)
    repetition = spread([each.asked.repetition_penalty for each in penalties])
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * spread([each.asked.frequency_penalty for each in penalties])
    values -= (counts > 0) * spread([each.asked.presence_penalty for each in penalties])
    flat[places] = values
