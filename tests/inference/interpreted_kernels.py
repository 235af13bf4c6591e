"""The kernels for GPUs in Triton's interpreter, against dense attention in float64. `test_kernels` runs it in a process of its own.

Triton decides when it is imported whether kernels are interpreted or compiled. Its interpreter has no products of
bfloat16: float16 stands for it.
"""

import itertools
import sys

import torch

from tidepool.inference.paged_attention import attend, best_num_splits

BLOCK_SIZE = 16
LENGTHS = [1, 15, 16, 17, 64, 65, 200]


def dense(query_HK: torch.Tensor, keys_LGK: torch.Tensor, values_LGV: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """One sequence's attention, as it is written in the books."""
    if window:
        keys_LGK, values_LGV = keys_LGK[-window:], values_LGV[-window:]
    num_shared = query_HK.shape[0] // keys_LGK.shape[1]
    keys_HLK, values_HLV = (one.double().repeat_interleave(num_shared, dim=1).transpose(0, 1) for one in (keys_LGK, values_LGV))
    weights_HL = (torch.einsum("hk,hlk->hl", query_HK.double(), keys_HLK) * scale).softmax(dim=1)
    return torch.einsum("hl,hlv->hv", weights_HL, values_HLV)


def check(heads: tuple[int, int], sizes: tuple[int, int], window: int | None, splits: int, dtype: torch.dtype) -> None:
    """Sequences of all lengths, whose blocks lie anywhere; what is not theirs is no number."""
    (num_heads, num_groups), (key_size, value_size) = heads, sizes
    generator = torch.Generator().manual_seed(key_size + splits)
    num_columns = -(-max(LENGTHS) // BLOCK_SIZE)
    num_blocks = num_columns * len(LENGTHS)
    blocks_DN = torch.randperm(num_blocks, generator=generator).int().view(len(LENGTHS), num_columns)
    places = [
        (row[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:length] for row, length in zip(blocks_DN, LENGTHS, strict=True)
    ]
    keys = torch.full((num_blocks * BLOCK_SIZE, num_groups, key_size), torch.nan)
    values = torch.full((num_blocks * BLOCK_SIZE, num_groups, value_size), torch.nan)
    for one in places:
        keys[one] = torch.randn(len(one), num_groups, key_size, generator=generator)
        values[one] = torch.randn(len(one), num_groups, value_size, generator=generator)
    keys, values = keys.to(dtype), values.to(dtype)
    # As a model gives them: heads before rows, and part of a larger product.
    query_DHK = torch.randn(num_heads, len(LENGTHS), key_size + 3, generator=generator).to(dtype)[..., :key_size].transpose(0, 1)
    scale = key_size**-0.5
    found_DHV = attend(query_DHK, keys, values, blocks_DN, torch.tensor(LENGTHS, dtype=torch.int32), BLOCK_SIZE, scale, window, splits)
    expected_DHV = torch.stack([dense(query, keys[one], values[one], scale, window) for query, one in zip(query_DHK, places, strict=True)])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found_DHV.double(), expected_DHV, rtol=tolerance, atol=tolerance)
    assert found_DHV.dtype == dtype


def main() -> None:
    """Raises what is wrong."""
    num = 0
    for heads, sizes in itertools.product([(4, 4), (6, 2), (8, 1)], [(64, 64), (80, 80), (128, 128), (32, 48)]):
        for window, splits in [(None, 1), (None, 3), (40, 1), (40, 4), (1, 2)]:
            if (num := num + 1) % int(sys.argv[1]) == 0:
                check(heads, sizes, window, splits, (torch.float32, torch.float16)[num % 2])
    for num_programs, num_tokens in itertools.product([1, 8, 64, 2048], [16, 300, 4096, 131072]):
        splits = best_num_splits(num_programs, num_tokens, 132)
        assert 1 <= splits <= 32
        assert splits == 1 or num_tokens / splits >= 256
    print(f"{num} shapes")


if __name__ == "__main__":
    main()
