"""Choosing the next token of a request from the model's logits.

Invariants: a sampler has a random generator of its own and draws from it once a token, so that a request with a seed gets
the same tokens whatever else is computed beside it; temperature 0 draws nothing. Arithmetic is float64 on the CPU.
"""

import torch
from torch import Tensor

from tidepool.errors import ModelError
from tidepool.inference.engine import SamplingParameters


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, parameters: SamplingParameters) -> None:
        self._temperature, self._top_p = parameters.temperature, parameters.top_p
        self._generator = torch.Generator()
        if parameters.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(parameters.seed % 2**63)  # torch takes 64 bits; a client may send any integer

    def choose(self, logits_V: Tensor) -> int:
        """The next token from logits of any float dtype on any device. Raises `ModelError` if one is not a number."""
        highest, likeliest = logits_V.max(dim=-1)
        if not highest.isfinite():
            raise ModelError("The model's logits are not finite: its weights are broken, or their values too large for their dtype.")
        if self._temperature == 0:
            return int(likeliest)
        # The highest logit becomes 0 first, so that no temperature makes a logit infinite.
        scaled_V = (logits_V.to("cpu", torch.float64) - highest.to("cpu", torch.float64)) / self._temperature
        return self._draw(scaled_V.softmax(dim=-1))

    def _draw(self, probabilities_V: Tensor) -> int:
        """Inverse transform sampling among the fewest tokens that together reach top_p (Holtzman et al. 2020)."""
        tokens = None
        if self._top_p < 1:
            probabilities_V, tokens = probabilities_V.sort(descending=True, stable=True)
            before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
            probabilities_V = probabilities_V[: max(1, int((before_V < self._top_p).sum()))]
        cumulative = probabilities_V.cumsum(dim=-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        index = min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)
        return index if tokens is None else int(tokens[index])
