"""The summed cross-entropy on a GPU, in two kernels that read the logits once each: one for the loss, one for its gradient.

What torch does in some ten passes over what is by far the largest tensor of a step. All is computed in float32, one program for
each token, in a fixed order: the bits depend on the logits alone. (The online softmax is that of Milakov and Gimelshein 2018.)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidepool.training.objective import IGNORED

_BLOCK_SIZE = 4096


@triton.jit
def _forward(
    logits,
    labels,
    losses,
    log_sums,
    num_columns: tl.constexpr,
    row_stride,
    IGNORED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, label = logits + row * row_stride, tl.load(labels + row)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        tl.store(log_sums + row, 0.0)
        return
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK_SIZE):
        columns = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(first + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(first + label).to(tl.float32))
    tl.store(log_sums + row, log_sum)


@triton.jit
def _backward(
    logits,
    labels,
    log_sums,
    factor,
    gradient,
    num_columns: tl.constexpr,
    row_stride,
    IGNORED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label, log_sum, scale = tl.load(labels + row), tl.load(log_sums + row), tl.load(factor)
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    is_there = columns < num_columns
    if label == IGNORED:
        p = tl.zeros((BLOCK_SIZE,), tl.float32)
    else:
        x = tl.load(logits + row * row_stride + columns, mask=is_there, other=float("-inf")).to(tl.float32)
        p = (tl.exp(x - log_sum) - tl.where(columns == label, 1.0, 0.0)) * scale
    tl.store(gradient + row * num_columns + columns, p.to(gradient.dtype.element_ty), mask=is_there)


class FusedCrossEntropy(torch.autograd.Function):
    """Of logits_MV (rows contiguous) and labels_M, int64, some of them `IGNORED`: a float32 scalar."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor) -> Tensor:
        num_rows, num_columns = logits_MV.shape
        assert logits_MV.stride(1) == 1
        losses_M, log_sums_M = logits_MV.new_empty(2, num_rows, dtype=torch.float32)
        _forward[(num_rows,)](
            logits_MV, labels_M, losses_M, log_sums_M, num_columns, logits_MV.stride(0), IGNORED, _BLOCK_SIZE, num_warps=8
        )
        ctx.save_for_backward(logits_MV, labels_M, log_sums_M)
        total: Tensor = losses_M.sum()
        return total

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None]:
        logits_MV, labels_M, log_sums_M = ctx.saved_tensors
        num_rows, num_columns = logits_MV.shape
        gradient_MV = torch.empty(num_rows, num_columns, dtype=logits_MV.dtype, device=logits_MV.device)
        blocks, stride = (num_rows, triton.cdiv(num_columns, _BLOCK_SIZE)), logits_MV.stride(0)
        _backward[blocks](
            logits_MV, labels_M, log_sums_M, loss_gradient, gradient_MV, num_columns, stride, IGNORED, _BLOCK_SIZE, num_warps=8
        )
        return gradient_MV, None
