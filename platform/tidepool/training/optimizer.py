"""AdamW as the spec asks for it: which weights decay, the learning rate of each step, the clipping of the gradient.

The kernel (fused, foreach, single) is part of a run's numerics: they give different bits.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from tidepool.specs import OptimizerSpec

_PIECE_SIZE = 2**14


def build_optimizer(parameters: Mapping[str, Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW over `parameters`; vectors (norms, biases) do not decay."""
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    kernel = {"fused": spec.kernel == "fused", "foreach": spec.kernel == "foreach"}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, **kernel)


def learning_rate(step: int, num_steps: int, spec: OptimizerSpec) -> float:
    """The rate of step `step` (from 0): linear warm-up, then the schedule down to the final ratio at the last step."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, num_steps - 1 - spec.warmup_steps)
    final = spec.final_learning_rate_ratio
    factor = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - final) * progress,
        "cosine": final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[spec.schedule]
    return spec.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together, a float64 scalar on their device.

    Of pieces in float32, then of these in float64: as exact as float64 throughout, without a copy in float64.
    """
    if gradients[0].device.type == "cuda":
        norms = torch.stack(torch._foreach_norm(list(gradients)))  # in pieces by itself
    else:
        norms = torch.cat([norm for gradient in gradients for norm in _piece_norms(gradient.view(-1))])
    norm: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return norm


def _piece_norms(flat: Tensor) -> list[Tensor]:
    start_of_rest = flat.numel() // _PIECE_SIZE * _PIECE_SIZE
    pieces = torch.linalg.vector_norm(flat[:start_of_rest].view(-1, _PIECE_SIZE), dim=1)
    return [pieces, torch.linalg.vector_norm(flat[start_of_rest:])[None]]


def scale(gradients: Sequence[Tensor], factor: float, norm: float, clip_norm: float | None) -> None:
    """Multiply the gradients by `factor`, in place, and by what is needed more if `norm`, which they have then, exceeds `clip_norm`."""
    if clip_norm is not None and norm > clip_norm:
        factor *= clip_norm / norm
    torch._foreach_mul_(list(gradients), factor)
