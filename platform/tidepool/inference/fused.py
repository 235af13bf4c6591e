"""Parts of a model that are computed in C where that gives the same: gated MLPs and root mean square norms.

A module is recognised by what it has, not by its class, and its faster way is taken only if it gives on random numbers what the
module's own code gives; so a new architecture is computed by its own code until it fits, and never wrongly.
"""

import inspect
from collections.abc import Callable
from types import MethodType
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
    return num_fused


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
