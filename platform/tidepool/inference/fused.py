"""Parts of a model that are computed in C where that gives the same: gated MLPs, root mean square norms and rotary positions.

A module is recognised by what it has, not by its class, and its faster way is taken only if it gives on random numbers what the
module's own code gives; so a new architecture is computed by its own code until it fits, and never wrongly.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tidepool.inference import native
from tidepool.inference.linear import Part

_KINDS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Forward = Callable[[Any, Tensor], Tensor]


@torch.inference_mode()
def fuse(model: PreTrainedModel) -> int:
    """Give the modules of a model on a CPU their faster ways, where they have one; returns how many do."""
    if model.device.type != "cpu" or model.dtype not in _TOLERANCE or native.library() is None:
        return 0
    num_fused = 0
    for module in model.modules():
        for forward, size in [*_norms(module), *_gates(module)]:
            if _is_same(module, forward, size, model.dtype):
                module.forward = MethodType(forward, module)
                num_fused += 1
                break
        if (attention := _with_our_rotation(type(module).forward, model.dtype)) is not None:
            module.forward = MethodType(attention, module)
            num_fused += 1
    return num_fused


_ROTATION = "apply_rotary_pos_emb"
"""What transformers' attention calls its function for rotary positions: (q, k, cos, sin) to (q, k), heads before tokens."""


@cache
def _with_our_rotation(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any] | None:
    """A class's `forward` with ours in place of the function that it calls; None where it calls none, or another one."""
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(_ROTATION)
    if own is None or not _rotates_alike(own, dtype):
        return None

    def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        is_plain = (
            not more and not named and query.shape[-1] == cosine.shape[-1] and query.stride(-1) == key.stride(-1) == query.shape[0] == 1
        )
        if not is_plain or not cosine.dtype == sine.dtype == query.dtype == key.dtype == dtype:
            both: tuple[Tensor, Tensor] = own(query, key, cosine, sine, *more, **named)
            return both
        cosine, sine = cosine.contiguous(), sine.contiguous()
        return native.rotate(query, cosine, sine), native.rotate(key, cosine, sine)

    names = {**forward.__globals__, _ROTATION: rotate}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _rotates_alike(own: Callable[..., Any], dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 5, num_heads, 16, generator=generator).to(dtype).transpose(1, 2) for num_heads in (4, 2))
    cosine, sine = (torch.randn(1, 5, 16, generator=generator).to(dtype) for _ in range(2))
    try:
        expected = own(query, key, cosine, sine)
    except (TypeError, ValueError, IndexError, RuntimeError):  # it wants something else, or something of another shape
        return False
    if [one.shape for one in expected] != [query.shape, key.shape]:
        return False
    found = native.rotate(query, cosine, sine), native.rotate(key, cosine, sine)
    return all(torch.allclose(*pair, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]) for pair in zip(found, expected, strict=True))


def _gates(module: nn.Module) -> list[tuple[Forward, int]]:
    gate, kind = getattr(module, "gate_proj", None), _KINDS.get(type(getattr(module, "act_fn", None)).__name__)
    if not isinstance(gate, Part) or kind is None or not hasattr(module, "down_proj"):
        return []

    def forward(self: Any, input: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(native.gate(self.gate_proj.product.whole(input), kind)))

    return [(forward, gate.in_features)]


def _norms(module: nn.Module) -> list[tuple[Forward, int]]:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float) or getattr(module, "bias", None) is not None:
        return []
    if len(inspect.signature(module.forward).parameters) != 1:
        return []

    def with_weight(weight_N: Tensor, rounds_first: bool) -> Forward:
        return lambda _, input: native.norm(input, weight_N, epsilon, rounds_first)

    weight_N = weight.detach().float()
    return [(with_weight(weight_N.clone(), True), len(weight_N)), (with_weight(1 + weight_N, False), len(weight_N))]


def _is_same(module: nn.Module, forward: Forward, size: int, dtype: torch.dtype) -> bool:
    """Whether a way gives what the module's own gives, for inputs small and large."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        input = (torch.randn(1, 5, size, generator=generator) * scale).to(dtype)
        expected, found = module(input), forward(module, input)
        if not torch.allclose(found, expected, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype] * float(expected.abs().max())):
            return False
    return True
