"""Log-probabilities of tokens, as the model has them.

They are natural logarithms of the model's own distribution: before temperature, penalties, bias, grammar and cuts. So they say
how likely the model finds a token, mean the same in every request and for the prompt as for the answer, and are finite for a
token that was forced. (vLLM's default, `raw_logprobs`, is the same; OpenAI's API does not say.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tidepool.inference.engine import TokenLogprobs
from tidepool.inference.truncation import lower_bound


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int], nums_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits (any float dtype, any device) what it says of its token, with so many alternatives."""
    logprobs_NV = logits_NV.float().log_softmax(dim=1)
    chosen = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])[:, 0].tolist()
    tops = _likeliest(logprobs_NV, nums_top) if any(nums_top) else [()] * len(tokens)
    return [TokenLogprobs(*each) for each in zip(tokens, chosen, tops, strict=True)]


def _likeliest(logprobs_NV: Tensor, nums_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    if logprobs_NV.device.type == "cpu":  # NumPy selects several times faster there
        rows = logprobs_NV.numpy()
        candidates = [np.flatnonzero(row >= lower_bound(row, max(num, 1))) for row, num in zip(rows, nums_top, strict=True)]
        pairs = [zip(ids.tolist(), row[ids].tolist(), strict=True) for ids, row in zip(candidates, rows, strict=True)]
    else:
        values, ids = logprobs_NV.topk(max(nums_top), dim=1)
        pairs = [zip(*each, strict=True) for each in zip(ids.tolist(), values.tolist(), strict=True)]
    return [tuple(sorted(each, key=lambda pair: (-pair[1], pair[0]))[:num]) for each, num in zip(pairs, nums_top, strict=True)]


def prompt_logprobs(logits_NV: Tensor, next_tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """For N consecutive positions of a prompt what their logits say of the tokens that follow them there."""
    return token_logprobs(logits_NV, next_tokens, [num_top] * len(next_tokens))
