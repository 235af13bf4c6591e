"""Drawing one token of each row: random numbers that belong to a place in an answer, and inverse transform sampling.

Invariants: a random number is a function of (seed, answer, index of the token) alone; a draw is a function of its row's weights
and its random number alone, with the same bits in any batch. A token of weight 0 is never drawn.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidepool.inference.transfer import upload

BLOCK = 128
"""Weights are added up in blocks of this many, in float32, and blocks in float64."""

_LOWEST = -80.0  # of the logarithms of weights: far below, numbers are denormal, and exp and sums twenty times slower
NOTHING = math.exp(_LOWEST + 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_Words = NDArray[np.uint64]  # their arithmetic is modulo 2**64


def stream_key(seed: int, answer: int) -> int:
    """The key of the random numbers of one answer to a request."""
    return int(_mix(_mix(np.array([seed % 2**64], np.uint64)) + np.array([answer], np.uint64) * _GOLDEN)[0])


def uniforms(keys_B: _Words, indices_B: _Words) -> NDArray[np.floating]:
    """Numbers between 0 and 1 (float64, from 2**-53 to 1 - 2**-53).

    They are the index-th ones of the SplitMix64 generators (Steele et al. 2014) of these keys.
    """
    words_B = _mix(keys_B + (indices_B + np.uint64(1)) * _GOLDEN)
    return ((words_B >> np.uint64(12)) + 0.5) * 2.0**-52


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def weigh(logits_BV: Tensor, temperature_B1: Tensor, weights_BV: Tensor) -> None:
    """Write probabilities (float32) times whatever makes the highest of a row 1; no number where a row has no highest logit."""
    logits_BV = logits_BV.float()
    # The highest becomes 0 first, so that no temperature makes a logit infinite.
    torch.sub(logits_BV, logits_BV.amax(dim=1, keepdim=True), out=weights_BV)
    weights_BV.div_(temperature_B1).clamp_(min=_LOWEST).exp_()


def block_edges(weights_BN: Tensor) -> Tensor:
    """The sums (float64) of each row's weights up to the end of each block."""
    return weights_BN.view(len(weights_BN), -1, BLOCK).sum(dim=2).cumsum(dim=1, dtype=torch.float64)


def draw(weights_BN: Tensor, uniforms_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokens in proportion to weights (float32, N a multiple of `BLOCK`), and whether the row had weights that make sense.

    Both on the device of the weights, for which nobody waits here.
    """
    blocks = weights_BN.view(len(weights_BN), -1, BLOCK)
    edges = block_edges(weights_BN)
    point = upload(torch.from_numpy(uniforms_B), edges.device)[:, None] * edges[:, -1:]
    block = torch.searchsorted(edges, point, right=True).clamp(max=edges.shape[1] - 1)
    before = torch.where(block > 0, edges.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].cumsum(dim=1, dtype=torch.float64)
    # The block's float32 sum may be above this one: then the last token of the block that can be drawn is.
    rest = torch.minimum(point - before, inside[:, -1:] * (1 - 2.0**-53))
    offset = torch.searchsorted(inside, rest, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + offset)[:, 0], edges[:, -1].isfinite()
