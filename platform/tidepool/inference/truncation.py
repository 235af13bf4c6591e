"""Drawing among the likelier tokens only: min_p, then top_k, then top_p (the order of vLLM).

- min_p (Nguyen et al. 2024): no token less likely than min_p times the likeliest.
- top_k (Fan et al. 2018): the k likeliest.
- top_p (Holtzman et al. 2020): the fewest likeliest that together reach top_p of what the other two have left.

Each cut keeps the first tokens in one order: by weight, the highest first, then by number, the lowest first. The draw goes through
the kept tokens in that order. What a row gives depends on that row alone. On the CPU rows are done one by one in NumPy, which
sorts and selects many times faster there than torch does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidepool.inference.draw import NOTHING

_NUM_FIRST = 1024  # likeliest tokens among which a GPU looks before it sorts whole rows
_NUM_PARTS = 32
_ONES = 2**32 - 1


@dataclass(frozen=True)
class Truncation:
    """The cuts of one row. min_p 0, top_k 0 and top_p 1 cut nothing."""

    min_p: float
    top_k: int
    top_p: float

    @property
    def is_any(self) -> bool:
        return (self.min_p, self.top_k, self.top_p) != (0, 0, 1)


def draw_truncated(weights_RV: Tensor, cuts: list[Truncation], uniforms_R: np.ndarray) -> tuple[list[int], list[bool]]:
    """Tokens in proportion to weights (float32) of which the highest of each row is 1, and whether the row had such weights."""
    if weights_RV.device.type != "cpu":
        return draw_truncated_rows(weights_RV, cuts, torch.from_numpy(uniforms_R)[:, None].to(weights_RV.device))
    rows = weights_RV.numpy()
    tokens = [_draw_row(row, cut, uniform) for row, cut, uniform in zip(rows, cuts, uniforms_R, strict=True)]
    return [max(token, 0) for token in tokens], [token >= 0 for token in tokens]


def _draw_row(weights_V: np.ndarray, cuts: Truncation, uniform: float) -> int:
    """A token, or -1 if some weight is no number."""
    size = len(weights_V)
    top_k = min(cuts.top_k or size, size)
    # Few tokens have to be sorted: none below min_p or the bound of top_k is kept, and none below that of top_p, since all of those
    # together weigh less than what top_p leaves out.
    bound, left = max(cuts.min_p, NOTHING), None
    if top_k < size:
        bound = max(bound, lower_bound(weights_V, top_k))
    elif cuts.top_p < 1 and cuts.min_p == 0:
        left = weights_V.sum(dtype=np.float64)
        bound = max(bound, left * (1 - cuts.top_p) / size)
    tokens = (weights_V >= np.float32(bound)).nonzero()[0]
    if not len(tokens):
        return -1
    # Sorted by one integer each: the bits of a float that is not negative have its order, and the lower token is to come first.
    keys = np.empty(len(tokens), np.uint64)
    halves, highest = keys.view(np.uint32), keys.view(np.float32)[1::2]
    highest[:] = weights_V[tokens]
    halves[::2] = _ONES - tokens
    keys.sort()
    sums = highest[::-1][:top_k].cumsum(dtype=np.float64)
    if cuts.top_p < 1:
        sums = sums[: sums.searchsorted(cuts.top_p * (sums[-1] if left is None else left)) + 1]
    place = sums.searchsorted(uniform * sums[-1], side="right")
    return _ONES - int(halves[-2::-2][place])


def lower_bound(values_V: np.ndarray, num: int) -> float:
    """A value that the `num` highest of these reach, and few others do: the num-th highest of the highest of many parts."""
    width, num = len(values_V) // _NUM_PARTS, min(num, len(values_V))
    if num > width:
        return float(np.partition(values_V, -num)[-num])
    highest = values_V[: width * _NUM_PARTS].reshape(_NUM_PARTS, width).max(axis=0)
    return float(np.partition(highest, -num)[-num])


def draw_truncated_rows(weights_RV: Tensor, cuts: list[Truncation], uniforms_R1: Tensor) -> tuple[list[int], list[bool]]:
    """The same for all rows at once, as a GPU does it."""
    size, device = weights_RV.shape[1], weights_RV.device
    lowest_R1 = torch.tensor([[max(cut.min_p, NOTHING)] for cut in cuts], dtype=torch.float32, device=device)
    top_k_R1 = torch.tensor([[min(cut.top_k or size, size)] for cut in cuts], device=device)
    top_p_R1 = torch.tensor([[cut.top_p] for cut in cuts], dtype=torch.float64, device=device)
    weights_RV = torch.where(weights_RV < lowest_R1, 0, weights_RV)
    first, tokens = weights_RV.topk(min(_NUM_FIRST, size))
    tokens, order = tokens.sort()
    tokens_R, is_enough = _draw_sorted(weights_RV, first.gather(1, order), tokens, top_k_R1, top_p_R1, uniforms_R1)
    if not is_enough:
        tokens = torch.arange(size, device=device).expand(weights_RV.shape)
        tokens_R, _ = _draw_sorted(weights_RV, weights_RV, tokens, top_k_R1, top_p_R1, uniforms_R1)
    return tokens_R.tolist(), weights_RV.sum(dim=1).isfinite().tolist()


def _draw_sorted(
    weights_RV: Tensor, some_RN: Tensor, tokens_RN: Tensor, top_k_R1: Tensor, top_p_R1: Tensor, uniforms_R1: Tensor
) -> tuple[Tensor, bool]:
    """Draw among some tokens (in rising order) and their weights, and say whether all that are kept are sure to be among them."""
    num = some_RN.shape[1]
    some_RN, order = some_RN.sort(descending=True, stable=True)
    sums_RN = some_RN.cumsum(dim=1, dtype=torch.float64)
    of_top_k_R1 = sums_RN.gather(1, top_k_R1.clamp(max=num) - 1)
    left_R1 = torch.where(top_k_R1 < weights_RV.shape[1], of_top_k_R1, weights_RV.sum(dim=1, keepdim=True, dtype=torch.float64))
    num_top_p_R1 = torch.searchsorted(sums_RN, top_p_R1 * left_R1) + 1
    kept_R1 = torch.where(top_p_R1 < 1, num_top_p_R1, top_k_R1)
    last_R1 = kept_R1.clamp(max=num) - 1
    point_R1 = uniforms_R1 * sums_RN.gather(1, last_R1)
    drawn_R1 = torch.searchsorted(sums_RN, point_R1, right=True).clamp(max=num - 1)
    knows_left = (top_k_R1 <= num) | (top_k_R1 == weights_RV.shape[1])
    is_sure = (knows_left & (some_RN.gather(1, last_R1) > some_RN[:, -1:])) | (some_RN[:, -1:] == 0)
    return tokens_RN.gather(1, order.gather(1, drawn_R1))[:, 0], num == weights_RV.shape[1] or bool(is_sure.all())
