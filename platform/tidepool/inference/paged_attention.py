"""Decoding attention over a paged cache on a GPU, in Triton: one query of each sequence, no copy of keys, no mask, no padding.

A sequence is read in splits by several programs at once (split-KV, Flash-Decoding, Dao et al. 2023), so that few long ones keep
all processors busy too; a second kernel adds up the parts. A key and a value are read once for all heads that share them. The grid depends
on the number of sequences alone, never on their lengths: a CUDA graph can be replayed on other ones.

Layouts are those of `attention`. Sums are float32. The bits of a row depend on the number of rows, which decides the splits.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens that a program reads at a time
_MIN_HEADS = 16  # rows of the smallest product of tensor cores
_MAX_SPLITS = 32
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit(do_not_specialize=["num_columns"])  # it changes from step to step
def attend_split(
    query,
    keys,
    values,
    blocks,
    lengths,
    sums,
    highest,
    totals,
    query_row,
    query_head,
    num_columns,
    scale,
    WINDOW: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    NUM_HEADS_PADDED: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_SIZE_PADDED: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_SIZE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    size = (length - first + NUM_SPLITS * TILE - 1) // (NUM_SPLITS * TILE) * TILE
    start = first + split * size
    end = tl.minimum(start + size, length)
    heads, key_columns = tl.arange(0, NUM_HEADS_PADDED), tl.arange(0, KEY_SIZE_PADDED)
    value_columns, offsets = tl.arange(0, VALUE_SIZE_PADDED), tl.arange(0, TILE)
    is_head, is_key, is_value = heads < NUM_SHARED, key_columns < KEY_SIZE, value_columns < VALUE_SIZE
    of_row = query + row.to(tl.int64) * query_row + (group * NUM_SHARED + heads)[:, None].to(tl.int64) * query_head
    q = tl.load(of_row + key_columns[None, :], mask=is_head[:, None] & is_key[None, :], other=0.0)
    largest = tl.full((NUM_HEADS_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((NUM_HEADS_PADDED,), tl.float32)
    sum = tl.zeros((NUM_HEADS_PADDED, VALUE_SIZE_PADDED), tl.float32)
    for tile in range(start, end, TILE):
        tokens = tile + offsets
        is_there = tokens < end
        block = tl.load(blocks + row.to(tl.int64) * num_columns + tokens // BLOCK_SIZE, mask=is_there, other=0)
        place = (block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * NUM_GROUPS + group
        k = tl.load(keys + place[None, :] * KEY_SIZE + key_columns[:, None], mask=is_there[None, :] & is_key[:, None], other=0.0)
        scores = tl.where(is_there[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        shrink = tl.exp(largest - larger)
        v = tl.load(values + place[:, None] * VALUE_SIZE + value_columns[None, :], mask=is_there[:, None] & is_value[None, :], other=0.0)
        sum = sum * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger
    head = (row.to(tl.int64) * NUM_GROUPS + group) * NUM_SHARED + heads
    if NUM_SPLITS == 1:
        part = (sum / total[:, None]).to(sums.dtype.element_ty)
        tl.store(sums + head[:, None] * VALUE_SIZE + value_columns[None, :], part, mask=is_head[:, None] & is_value[None, :])
    else:
        place = head * NUM_SPLITS + split
        tl.store(highest + place, largest, mask=is_head)
        tl.store(totals + place, total, mask=is_head)
        tl.store(sums + place[:, None] * VALUE_SIZE + value_columns[None, :], sum, mask=is_head[:, None] & is_value[None, :])


@triton.jit
def add_splits(
    sums,
    highest,
    totals,
    output,
    VALUE_SIZE: tl.constexpr,
    VALUE_SIZE_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_SPLITS_PADDED: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, NUM_SPLITS_PADDED), tl.arange(0, VALUE_SIZE_PADDED)
    is_split, place = splits < NUM_SPLITS, head * NUM_SPLITS + splits
    high = tl.load(highest + place, mask=is_split, other=float("-inf"))
    weights = tl.exp(high - tl.max(high))  # 0 for a split without tokens
    total = tl.sum(weights * tl.load(totals + place, mask=is_split, other=0.0))
    mask = is_split[:, None] & (columns < VALUE_SIZE)[None, :]
    parts = tl.load(sums + place[:, None] * VALUE_SIZE + columns[None, :], mask=mask, other=0.0)
    sum = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(output + head * VALUE_SIZE + columns, sum.to(output.dtype.element_ty), mask=columns < VALUE_SIZE)


def attend(
    query_DHK: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks_DN: Tensor,
    lengths_D: Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    num_splits: int | None = None,
) -> Tensor:
    """The attention of D queries, each over the first `lengths_D` tokens in its blocks, or the last `window` of them: (D, H, V).

    `keys` and `values` are (places, groups, size) and contiguous, `blocks_DN` int32 and contiguous. Launched, not waited for.
    """
    num_rows, num_heads, key_size = query_DHK.shape
    num_groups, value_size = values.shape[1:]
    assert query_DHK.stride(2) == 1
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert blocks_DN.is_contiguous()
    splits = num_splits or best_num_splits(num_rows * num_groups, blocks_DN.shape[1] * block_size, num_processors(query_DHK.device))
    output_DHV = torch.empty(num_rows, num_heads, value_size, dtype=query_DHK.dtype, device=query_DHK.device)
    parts = output_DHV if splits == 1 else output_DHV.new_empty(num_rows, num_heads, splits, value_size, dtype=torch.float32)
    highest, totals = output_DHV.new_empty(2, num_rows, num_heads, splits, dtype=torch.float32)
    attend_split[num_rows, num_groups, splits](
        query_DHK,
        keys,
        values,
        blocks_DN,
        lengths_D,
        parts,
        highest,
        totals,
        query_DHK.stride(0),
        query_DHK.stride(1),
        blocks_DN.shape[1],
        scale,
        **constants(num_heads, num_groups, key_size, value_size, block_size, window, splits),
    )
    if splits > 1:
        padded = triton.next_power_of_2(value_size), splits, triton.next_power_of_2(splits)
        add_splits[(num_rows * num_heads,)](parts, highest, totals, output_DHV, value_size, *padded)
    return output_DHV


def constants(
    num_heads: int, num_groups: int, key_size: int, value_size: int, block_size: int, window: int | None, num_splits: int
) -> dict[str, int]:
    """What `attend_split` is compiled for."""
    num_shared = num_heads // num_groups
    return {
        "WINDOW": window or 0,
        "NUM_GROUPS": num_groups,
        "NUM_SHARED": num_shared,
        "NUM_HEADS_PADDED": max(_MIN_HEADS, triton.next_power_of_2(num_shared)),
        "KEY_SIZE": key_size,
        "KEY_SIZE_PADDED": max(16, triton.next_power_of_2(key_size)),
        "VALUE_SIZE": value_size,
        "VALUE_SIZE_PADDED": max(16, triton.next_power_of_2(value_size)),
        "BLOCK_SIZE": block_size,
        "NUM_SPLITS": num_splits,
        "TILE": TILE,
    }


def best_num_splits(num_programs: int, num_tokens: int, num_processors: int) -> int:
    """As many as fill the processors, of some tiles each if the sequences are as long as they can be.

    A power of two, since each number is compiled for itself.
    """
    wanted = min(ceil(_PROGRAMS_PER_PROCESSOR * num_processors / num_programs), _MAX_SPLITS, num_tokens // (4 * TILE))
    return 1 << max(0, wanted.bit_length() - 1)


def num_processors(device: torch.device) -> int:
    """Of a GPU; a CPU, where the interpreter runs, counts as one."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
