"""The kernels for GPUs, compiled for an H100 (sm_90), which takes no GPU. `test_kernels` runs it in a process of its own."""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tidepool.inference.paged_attention import add_splits, attend_split, constants

SHARED_MEMORY_BYTES = 227 * 1024  # that a program of an H100 can have


def main() -> None:
    """Raises what is wrong."""
    target = GPUTarget("cuda", 90, 32)
    num, every = 0, int(sys.argv[1])
    for size, dtype, splits, window in itertools.product([64, 80, 128], ["bf16", "fp32"], [1, 8], [None, 4096]):
        num += 1
        if num % every:
            continue
        fixed = constants(32, 8, size, size, 16, window, splits)
        signature = {
            **dict.fromkeys(("query", "keys", "values"), f"*{dtype}"),
            **dict.fromkeys(("blocks", "lengths"), "*i32"),
            "sums": f"*{dtype if splits == 1 else 'fp32'}",
            **dict.fromkeys(("highest", "totals"), "*fp32"),
            **dict.fromkeys(("query_row", "query_head", "num_columns"), "i32"),
            "scale": "fp32",
            **dict.fromkeys(fixed, "constexpr"),
        }
        kernel = triton.compile(ASTSource(attend_split, signature, fixed), target=target)
        assert kernel.metadata.shared <= SHARED_MEMORY_BYTES, (size, dtype, kernel.metadata.shared)
        assert ("wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"]) or dtype == "fp32", "products are not the tensor cores'"
    for size, splits in itertools.product([64, 80, 128], [2, 7, 32]):
        names = ("VALUE_SIZE", "VALUE_SIZE_PADDED", "NUM_SPLITS", "NUM_SPLITS_PADDED")
        num += 1
        if num % every:
            continue
        sizes = size, triton.next_power_of_2(size), splits, triton.next_power_of_2(splits)
        signature = {**dict.fromkeys(("sums", "highest", "totals"), "*fp32"), "output": "*bf16", **dict.fromkeys(names, "constexpr")}
        triton.compile(ASTSource(add_splits, signature, dict(zip(names, sizes, strict=True))), target=target)
    print(f"{num} kernels")


if __name__ == "__main__":
    main()
