"""Adapters' low-rank products on a GPU, in two Triton kernels on a grid that depends on nothing but sizes: shrink (A), then expand (B).

`tests/inference/test_gpu.py` runs them on a GPU, `tests/inference/test_lora_triton.py` in Triton's interpreter.

Each row of a step has a slot (-1: the base alone). A program is started for each row; the first row of a slot among 16 in succession
computes for all of these that have it, the others have nothing to do. So nothing is sorted, decoding has a program for each row, and rows
of one prompt share what is read. Ranks, addresses and scales are read from tables in the device's memory: a captured CUDA graph stays
right when slots change, as long as `slots_T` and the tables are the same tensors.

A row's sums are made in one order, whatever is beside it. Products of float32 are those of float32, never of TF32. Matrices lie as
`lora` says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidepool.inference.lora import INPUT_STEP, OUTPUT_STEP, RANK_STEP

_ROWS = 16  # the fewest that tensor cores multiply
_RANKS = 16
_INPUTS = 64


@triton.jit
def _shrink(
    inputs,
    input_stride,
    shrunk,
    slots,
    num_rows,
    addresses,
    ranks,
    scales,
    input_size,
    num_parts: tl.constexpr,
    most_ranks: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    INPUT_STEP: tl.constexpr,
):
    row, first_rank, part = tl.program_id(0), tl.program_id(1) * RANKS, tl.program_id(2)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    entry = slot * num_parts + part
    rank = tl.load(ranks + entry)
    if first_rank >= rank:
        return
    rows = row // ROWS * ROWS + tl.arange(0, ROWS)
    is_own = tl.load(slots + rows, mask=rows < num_rows, other=-1) == slot
    if tl.min(tl.where(is_own, rows, num_rows)) < row:
        return
    a = tl.load(addresses + 2 * entry).to(tl.pointer_type(inputs.dtype.element_ty))
    r = first_rank + tl.arange(0, RANKS)
    width = (input_size + INPUT_STEP - 1) // INPUT_STEP * INPUT_STEP
    of_rank = r // RANK_STEP * RANK_STEP * width + r % RANK_STEP * INPUT_STEP
    sums = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, input_size, INPUTS):
        k = start + tl.arange(0, INPUTS)
        x = tl.load(
            inputs + rows[:, None].to(tl.int64) * input_stride + k[None, :], mask=is_own[:, None] & (k < input_size)[None, :], other=0.0
        )
        of_input = k // INPUT_STEP * (RANK_STEP * INPUT_STEP) + k % INPUT_STEP
        weights = tl.load(a + of_input[:, None] + of_rank[None, :], mask=(k < width)[:, None] & (r < rank)[None, :], other=0.0)
        sums = tl.dot(x, weights, sums, input_precision="ieee")
    sums *= tl.load(scales + entry)
    to = shrunk + (rows[:, None] * num_parts + part) * most_ranks + r[None, :]
    tl.store(to, sums, mask=is_own[:, None] & (r < most_ranks)[None, :])


@triton.jit
def _expand(
    shrunk,
    outputs,
    output_stride,
    slots,
    num_rows,
    addresses,
    ranks,
    columns,
    num_parts: tl.constexpr,
    most_ranks: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    row, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    entry = slot * num_parts + part
    rank, size = tl.load(ranks + entry), tl.load(columns + 2 * part + 1)
    if (rank == 0) | (tile * OUTPUTS >= size):
        return
    rows = row // ROWS * ROWS + tl.arange(0, ROWS)
    is_own = tl.load(slots + rows, mask=rows < num_rows, other=-1) == slot
    if tl.min(tl.where(is_own, rows, num_rows)) < row:
        return
    b = tl.load(addresses + 2 * entry + 1).to(tl.pointer_type(outputs.dtype.element_ty)) + tile * OUTPUTS * rank
    n = tl.arange(0, OUTPUTS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        from_rows = shrunk + (rows[:, None] * num_parts + part) * most_ranks + r[None, :]
        y = tl.load(from_rows, mask=is_own[:, None] & (r < rank)[None, :], other=0.0)
        weights = tl.load(b + r[:, None] * OUTPUTS + n[None, :], mask=(r < rank)[:, None], other=0.0)
        sums = tl.dot(y, weights.to(tl.float32), sums, input_precision="ieee")
    column = tile * OUTPUTS + n
    to = outputs + rows[:, None].to(tl.int64) * output_stride + tl.load(columns + 2 * part) + column[None, :]
    is_there = is_own[:, None] & (column < size)[None, :]
    tl.store(to, (tl.load(to, mask=is_there).to(tl.float32) + sums).to(outputs.dtype.element_ty), mask=is_there)


def add(
    input_TK: Tensor,
    output_TN: Tensor,
    slots_T: Tensor,
    addresses_SP2: Tensor,
    ranks_SP: Tensor,
    scales_SP: Tensor,
    columns_P2: Tensor,
    most_ranks: int,
) -> None:
    """Add to each row of the output what its slot has for it; for the tables see `lora_layers`. `most_ranks`: of any slot."""
    num_rows, num_parts = len(input_TK), ranks_SP.shape[1]
    most_ranks = triton.cdiv(most_ranks, _RANKS) * _RANKS
    shrunk_TPR = torch.empty(num_rows, num_parts, most_ranks, dtype=torch.float32, device=input_TK.device)
    constants = {"num_parts": num_parts, "most_ranks": most_ranks, "ROWS": _ROWS, "RANKS": _RANKS}
    _shrink[(num_rows, most_ranks // _RANKS, num_parts)](
        input_TK,
        input_TK.stride(0),
        shrunk_TPR,
        slots_T,
        num_rows,
        addresses_SP2,
        ranks_SP,
        scales_SP,
        input_TK.shape[1],
        INPUTS=_INPUTS,
        RANK_STEP=RANK_STEP,
        INPUT_STEP=INPUT_STEP,
        **constants,
    )
    _expand[(num_rows, triton.cdiv(output_TN.shape[1], OUTPUT_STEP), num_parts)](
        shrunk_TPR,
        output_TN,
        output_TN.stride(0),
        slots_T,
        num_rows,
        addresses_SP2,
        ranks_SP,
        columns_P2,
        OUTPUTS=OUTPUT_STEP,
        **constants,
    )
