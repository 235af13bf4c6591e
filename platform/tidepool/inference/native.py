"""What is computed in C (`attention.c`, `linear.c`, `lora.c`), compiled when it is first wanted and kept for the next time.

Where there is no C compiler, or for tensors that it does not know, `can_attend` says so, and the caller computes with torch;
`quantize` and `scale` compute with torch themselves then.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("attention.c")
_LINEAR = Path(__file__).with_name("linear.c")
_LORA = Path(__file__).with_name("lora.c")
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC", "-std=gnu11", "-fno-math-errno"]
# Additions may be reordered once, when it is compiled; nothing is assumed of numbers that are not finite.
_REORDERING = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
_SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = frozenset(_SUFFIXES)
"""What can be computed in C."""
_COMPILE_TIMEOUT_S = 60
_BAND = 32
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "attend": [_POINTER, _LONG, _LONG, *[_POINTER] * 5, *[_INT] * 7, ctypes.c_float, _INT, _INT],
    "quantize": [*[_POINTER] * 3, _LONG, _LONG, _INT],
    "scale": [*[_POINTER] * 4, _LONG, _LONG, _INT],
    "gate": [_POINTER, _POINTER, _LONG, _LONG, _INT, _INT],
    "norm": [*[_POINTER] * 3, _LONG, _LONG, ctypes.c_float, _INT, _INT],
    "rotate": [_POINTER, _LONG, _LONG, *[_POINTER] * 3, *[_LONG] * 3, _INT],
}
_LINEAR_ARGUMENTS = {"multiply": [*[_POINTER] * 4, *[_LONG] * 3, _INT]}
_LORA_ARGUMENTS = {"lora": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT, *[_POINTER] * 4, *[_INT] * 4]}


def can_attend(query_DHK: Tensor, keys: Tensor) -> bool:
    """Whether `attend` can compute this here."""
    return (
        query_DHK.device.type == "cpu" and query_DHK.dtype == keys.dtype in _SUFFIXES and query_DHK.stride(2) == 1 and library() is not None
    )


def attend(
    query_DHK: Tensor, keys: Tensor, values: Tensor, blocks_DN: Tensor, lengths_D: Tensor, block_size: int, scale: float, window: int | None
) -> Tensor:
    """The attention of D queries, each over the first `lengths_D` tokens in its blocks, or the last `window` of them: (D, H, V)."""
    loaded = library()
    assert loaded is not None
    num, num_heads, key_size = query_DHK.shape
    output_DHV = torch.empty(num, num_heads, values.shape[2], dtype=query_DHK.dtype)
    tensors = [one.data_ptr() for one in (keys, values, blocks_DN, lengths_D, output_DHV)]
    sizes = [num, blocks_DN.shape[1], num_heads, keys.shape[1], key_size, values.shape[2], block_size]
    function = getattr(loaded, f"attend_{_SUFFIXES[query_DHK.dtype]}")
    strides = query_DHK.stride(0), query_DHK.stride(1)
    if function(query_DHK.data_ptr(), *strides, *tensors, *sizes, scale, window or 0, torch.get_num_threads()):
        raise MemoryError("No memory for the scores of attention: lower engine.max_sequence_length or engine.threads.")
    return output_DHV


def quantize(input_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers from 1 to 255, 128 for 0 (uint8), and their scale (T, float32)."""
    loaded = library()
    if loaded is None or input_TK.dtype not in _SUFFIXES:
        scale_T = input_TK.abs().amax(dim=1).float().clamp(min=1e-30) / 127
        return ((input_TK.float() / scale_T[:, None]).round() + 128).to(torch.uint8), scale_T
    input_TK = input_TK.contiguous()
    numbers_TK, scale_T = torch.empty(input_TK.shape, dtype=torch.uint8), torch.empty(len(input_TK))
    function = getattr(loaded, f"quantize_{_SUFFIXES[input_TK.dtype]}")
    function(input_TK.data_ptr(), numbers_TK.data_ptr(), scale_T.data_ptr(), *input_TK.shape, torch.get_num_threads())
    return numbers_TK, scale_T


def scale(sums_TN: Tensor, scale_T: Tensor, bias_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of products (float32, contiguous) times each row's scale, plus a bias."""
    loaded = library()
    if loaded is None or dtype not in _SUFFIXES:
        return (sums_TN * scale_T[:, None] + bias_N).to(dtype)
    output_TN = torch.empty(sums_TN.shape, dtype=dtype)
    pointers = [one.data_ptr() for one in (sums_TN, scale_T, bias_N, output_TN)]
    getattr(loaded, f"scale_{_SUFFIXES[dtype]}")(*pointers, *sums_TN.shape, torch.get_num_threads())
    return output_TN


def gate(input_TN: Tensor, kind: int) -> Tensor:
    """The first half of each row through `silu` (kind 0) or `gelu_pytorch_tanh` (kind 1), times the second half. Needs `library()`."""
    size = input_TN.shape[-1] // 2
    output_TN = torch.empty(*input_TN.shape[:-1], size, dtype=input_TN.dtype)
    function = getattr(library(), f"gate_{_SUFFIXES[input_TN.dtype]}")
    function(input_TN.data_ptr(), output_TN.data_ptr(), input_TN.numel() // (2 * size), size, kind, torch.get_num_threads())
    return output_TN


def norm(input_TN: Tensor, weight_N: Tensor, epsilon: float, rounds_first: bool) -> Tensor:
    """The root mean square norm of the last dimension, with float32 weights. Needs `library()`."""
    input_TN = input_TN.contiguous()
    size = input_TN.shape[-1]
    output_TN = torch.empty_like(input_TN)
    function = getattr(library(), f"norm_{_SUFFIXES[input_TN.dtype]}")
    pointers = input_TN.data_ptr(), weight_N.data_ptr(), output_TN.data_ptr()
    function(*pointers, input_TN.numel() // size, size, epsilon, rounds_first, torch.get_num_threads())
    return output_TN


def rotate(input_1HTK: Tensor, cosine_1TK: Tensor, sine_1TK: Tensor) -> Tensor:
    """Halves of each head turned into one another, as Llama's rotary positions are. Needs `library()`, and heads that are whole rows."""
    _, num_heads, num_tokens, size = input_1HTK.shape
    output_THK = torch.empty(num_tokens, num_heads, size, dtype=input_1HTK.dtype)
    function = getattr(library(), f"rotate_{_SUFFIXES[input_1HTK.dtype]}")
    strides = input_1HTK.stride(2), input_1HTK.stride(1)
    pointers = [one.data_ptr() for one in (cosine_1TK, sine_1TK, output_THK)]
    function(input_1HTK.data_ptr(), *strides, *pointers, num_tokens, num_heads, size, torch.get_num_threads())
    return output_THK.transpose(0, 1)[None]


def bands(weight_NK: Tensor) -> Tensor:
    """Weights in the order in which `multiply` reads them."""
    whole_NK = pad(weight_NK, (0, 0, 0, -len(weight_NK) % _BAND))
    parts = 1 if weight_NK.dtype == torch.float32 else 2
    return whole_NK.view(-1, parts, _BAND // parts, weight_NK.shape[1]).permute(0, 3, 2, 1).contiguous()


def multiply(input_TK: Tensor, weights: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    """Inputs times weights in `bands`, plus a bias (float32): (T, N) in the weights' dtype. Needs `linear_library()`."""
    wide_TK = input_TK.float().contiguous()
    output_TN = torch.empty(len(wide_TK), num_outputs, dtype=weights.dtype)
    bias = None if bias_N is None else bias_N.data_ptr()
    pointers = wide_TK.data_ptr(), weights.data_ptr(), bias, output_TN.data_ptr()
    function = getattr(linear_library(), f"multiply_{_SUFFIXES[weights.dtype]}")
    function(*pointers, *wide_TK.shape, num_outputs, torch.get_num_threads())
    return output_TN


def lora(
    input_TK: Tensor,
    output_TN: Tensor,
    groups_G3: Tensor,
    addresses_SP2: Tensor,
    ranks_SP: Tensor,
    scales_SP: Tensor,
    columns_P2: Tensor,
    num_parts: int,
    most_ranks: int,
) -> None:
    """Add to each row of the output what its group's adapter has for it. For the tables see `lora_layers`. Needs `lora_library()`."""
    function = getattr(lora_library(), f"lora_{_SUFFIXES[input_TK.dtype]}")
    tables = [one.data_ptr() for one in (addresses_SP2, ranks_SP, scales_SP, columns_P2)]
    rows = input_TK.data_ptr(), input_TK.stride(0), input_TK.shape[1], output_TN.data_ptr(), output_TN.stride(0)
    sizes = num_parts, ranks_SP.shape[1], most_ranks, torch.get_num_threads()
    if function(*rows, groups_G3.data_ptr(), len(groups_G3), *tables, *sizes):
        raise MemoryError("No memory for a few rows of an adapter: lower engine.threads.")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be compiled, which is said once."""
    return _load(_SOURCE, [*_FLAGS, *_REORDERING], _of_each_dtype(_ARGUMENTS))


@cache
def linear_library() -> ctypes.CDLL | None:
    """The same for `multiply`, which keeps additions in their order."""
    return _load(_LINEAR, _FLAGS, _of_each_dtype(_LINEAR_ARGUMENTS))


@cache
def lora_library() -> ctypes.CDLL | None:
    """The same for `lora`, which does so too."""
    return _load(_LORA, _FLAGS, _of_each_dtype(_LORA_ARGUMENTS))


def _of_each_dtype(functions: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {f"{name}_{suffix}": arguments for name, arguments in functions.items() for suffix in _SUFFIXES.values()}


def _load(source: Path, flags: list[str], functions: Mapping[str, list[Any]]) -> ctypes.CDLL | None:
    try:
        path, is_new = _compiled(source, flags)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # torn by a crash, or made for another C library
            if is_new:
                raise
            path.unlink()
            loaded = ctypes.CDLL(str(_compiled(source, flags)[0]))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("torch computes in its place, which is slower, since %s could not be compiled: %s", source.name, error)
        return None
    for name, arguments in functions.items():
        getattr(loaded, name).argtypes = arguments
    return loaded


def _compiled(source: Path, flags: list[str]) -> tuple[Path, bool]:
    """The library's path, and whether it was made now; its name tells source, flags and processor, so that nothing stale is loaded.

    One that somebody else has put there is not loaded: it would be their code.
    """
    text = source.read_bytes() + " ".join(flags).encode() + _processor().encode()
    folder = Path(os.environ.get("TIDEPOOL_CACHE") or Path.home() / ".cache" / "tidepool") / "compiled"
    path = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:24]}.so"
    if path.is_file() and path.stat().st_uid in (0, os.geteuid()):
        return path, False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / path.name
        command = [os.environ.get("CC", "cc"), *flags, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.replace(path)
    return path, True


def _processor() -> str:
    """What `-march=native` means here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor() + platform.machine())
